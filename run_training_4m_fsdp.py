"""Train a 4M model with fully sharded data parallelism."""

from fourm.train.config import parse_args
from fourm.utils.errors import UserError, run_cli


def main() -> None:
    parse_args()
    raise UserError("FSDP is not available yet: run the same config with run_training_4m.py (DDP)")


if __name__ == "__main__":
    run_cli(main)
