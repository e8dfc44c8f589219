"""Run ``fourm demo``: render, tokenize, train, stop, resume, generate, report."""

import os

from fourm.utils.errors import run_cli


def main() -> int:
    # Busy-waiting threads make a step many times slower as soon as anything else runs on the machine.
    # OpenMP reads this variable when torch is imported, so set it before that.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fourm.demo.stages import parse, run

    return run(parse())


if __name__ == "__main__":
    run_cli(main)
