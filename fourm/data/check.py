"""The former name of :mod:`fourm.tools.check`, so that ``python -m fourm.data.check`` still works."""

from fourm.tools.check import main
from fourm.utils.errors import run_cli

__all__ = ["main"]

if __name__ == "__main__":
    run_cli(main)
