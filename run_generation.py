"""Generate with a 4M model: python run_generation.py --config cfgs/….yaml; torchrun distributes the samples."""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds
    from fourm.generation.script import main

    run_cli(main)
