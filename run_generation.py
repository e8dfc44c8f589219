"""Generate with a 4M model: python run_generation.py --config cfgs/….yaml; torchrun shares the samples out."""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()  # what follows takes seconds
    from fourm.generation.script import main

    run_cli(main)
