"""The former name of :mod:`fourm.tools.pack`, so that ``python -m fourm.data.pack`` still works."""

from fourm.tools.pack import main
from fourm.utils.errors import run_cli

__all__ = ["main"]

if __name__ == "__main__":
    run_cli(main)
