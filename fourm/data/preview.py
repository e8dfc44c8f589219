"""The former name of :mod:`fourm.tools.preview`, so that ``python -m fourm.data.preview`` still works."""

from fourm.tools.preview.command import main
from fourm.utils.errors import run_cli

__all__ = ["main"]

if __name__ == "__main__":
    run_cli(main)
