"""Generate with a 4M model: python run_generation.py --config cfgs/….yaml; torchrun shares the samples out."""

from fourm.generation.script import main
from fourm.utils.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
