"""Train a 4M model with one process or DistributedDataParallel: torchrun … run_training_4m.py --config cfgs/….yaml"""

from fourm.train.config import parse_args
from fourm.train.parallel import DDP
from fourm.train.run import train
from fourm.utils.errors import run_cli

if __name__ == "__main__":
    run_cli(lambda: train(parse_args(), DDP))
