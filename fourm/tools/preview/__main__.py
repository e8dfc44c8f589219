"""``python -m fourm.tools.preview``; see :mod:`fourm.tools.preview.command`."""

from fourm.tools.preview.command import main
from fourm.utils.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
