"""Train the text vocabulary: python train_wordpiece_tokenizer.py --input '[wordnet/dict, captions]' --output FILE"""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()  # what follows takes seconds
    from fourm.utils.tokenizer.train_wordpiece import main

    run_cli(main)
