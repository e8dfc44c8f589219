"""``python -m fourm.demo``: render, tokenize, train, stop, resume, report."""

from fourm.demo.stages import parse, run
from fourm.utils.errors import run_cli

if __name__ == "__main__":
    run_cli(lambda: run(parse()))
