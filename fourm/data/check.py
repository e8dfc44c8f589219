"""``python -m fourm.data.check`` as it was before the commands on data moved to :mod:`fourm.tools.check`."""

from fourm.tools.check import main
from fourm.utils.errors import run_cli

__all__ = ["main"]

if __name__ == "__main__":
    run_cli(main)
