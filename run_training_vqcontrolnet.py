"""Train a ControlNet that decodes tokens with Stable Diffusion, with one process or DistributedDataParallel.

torchrun … run_training_vqcontrolnet.py --config cfgs/….yaml
"""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # what follows takes seconds
    from fourm.train.parallel import DDP
    from fourm.train.run import main
    from fourm.train.tasks.diffusion_tokenizer import VQControlNetTraining

    run_cli(lambda: main(VQControlNetTraining, DDP))
