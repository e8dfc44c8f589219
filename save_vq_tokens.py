"""Tokenize the images of a data set: python save_vq_tokens.py --tokenizer FOLDER --data_root ROOT --modality depth"""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds
    from fourm.vq.save_tokens import main

    run_cli(main)
