"""Fit a codebook to the images of a data set: python fit_codebook.py --data_root ROOT --modality depth --output FOLDER"""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()  # what follows takes seconds
    from fourm.vq.fit_codebook import main

    run_cli(main)
