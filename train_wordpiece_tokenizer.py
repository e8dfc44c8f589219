"""Train the text vocabulary: python train_wordpiece_tokenizer.py --input '[wordnet/dict, captions]' --output FILE"""

from fourm.utils.errors import run_cli
from fourm.utils.tokenizer.train_wordpiece import main

if __name__ == "__main__":
    run_cli(main)
