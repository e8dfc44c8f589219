"""Train a VQ-VAE with one process or DistributedDataParallel: torchrun … run_training_vqvae.py --config cfgs/….yaml"""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # what follows takes seconds
    from fourm.train.parallel import DDP
    from fourm.train.run import main
    from fourm.train.tasks.tokenizer import VQVAETraining

    run_cli(lambda: main(VQVAETraining, DDP))
