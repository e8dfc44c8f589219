"""Train a DiVAE with one process or DistributedDataParallel: torchrun … run_training_divae.py --config cfgs/….yaml"""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # what follows takes seconds
    from fourm.train.parallel import DDP
    from fourm.train.run import main
    from fourm.train.tasks.diffusion_tokenizer import DiVAETraining

    run_cli(lambda: main(DiVAETraining, DDP))
