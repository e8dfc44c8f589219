"""``python -m fourm.data.preview`` as it was before the commands on data moved to :mod:`fourm.tools.preview`."""

from fourm.tools.preview.command import main
from fourm.utils.errors import run_cli

__all__ = ["main"]

if __name__ == "__main__":
    run_cli(main)
