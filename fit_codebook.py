"""Fit a codebook to the images of a data set: python fit_codebook.py --data_root ROOT --modality depth --output FOLDER"""

from fourm.utils.errors import run_cli
from fourm.vq.fit_codebook import main

if __name__ == "__main__":
    run_cli(main)
