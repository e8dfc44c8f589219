"""Train a 4M model with one process or DistributedDataParallel: torchrun … run_training_4m.py --config cfgs/….yaml"""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds
    from fourm.train.parallel import DDP
    from fourm.train.run import main
    from fourm.train.tasks.pretrain import Pretrain

    run_cli(lambda: main(Pretrain, DDP))
