"""``fourm demo``: render, tokenize, train, stop, resume, report."""

import os

from fourm.utils.errors import run_cli


def main() -> int:
    # Threads that wait for each other in a loop make a step many times slower as soon as anything else runs beside it.
    # OpenMP reads this when torch is loaded, so torch must not be yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fourm.demo.stages import parse, run

    return run(parse())


if __name__ == "__main__":
    run_cli(main)
