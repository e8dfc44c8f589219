"""Train a 4M model with fully sharded data parallelism: torchrun … run_training_4m_fsdp.py --config cfgs/….yaml"""

from fourm.train.config import parse_args
from fourm.train.fsdp import FSDP
from fourm.train.run import train
from fourm.utils.errors import run_cli

if __name__ == "__main__":
    run_cli(lambda: train(parse_args(), FSDP))
