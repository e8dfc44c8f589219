"""Train the text vocabulary: python train_wordpiece_tokenizer.py --input '[wordnet/dict, captions]' --output FILE"""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds
    from fourm.utils.tokenizer.train_wordpiece import main

    run_cli(main)
