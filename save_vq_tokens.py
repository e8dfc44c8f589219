"""Tokenize the images of a data set: python save_vq_tokens.py --tokenizer FOLDER --data_root ROOT --modality depth"""

from fourm.utils.errors import run_cli
from fourm.vq.save_tokens import main

if __name__ == "__main__":
    run_cli(main)
