"""Generate with a 4M model: python run_generation.py --config cfgs/….yaml; torchrun shares the samples out."""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # what follows takes seconds
    from fourm.generation.script import main

    run_cli(main)
