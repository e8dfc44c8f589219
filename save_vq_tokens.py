"""Tokenize the images of a data set: python save_vq_tokens.py --tokenizer FOLDER --data_root ROOT --modality depth"""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()  # what follows takes seconds
    from fourm.vq.save_tokens import main

    run_cli(main)
