"""Which of several processes this one is."""

from __future__ import annotations

import os

from fourm.utils.errors import UserError


def ranks_of_torchrun() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, from the variables that torchrun sets.

    Raises:
        UserError: one is no number, or they contradict each other.
    """
    found = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not text.isascii() or not text.isdigit():
            raise UserError(
                f"the environment has {name}={text!r}, which is no number; unset it, or start with torchrun"
            )
        found[name] = int(text)
    if found["RANK"] >= found["WORLD_SIZE"]:
        raise UserError(
            f"the environment has RANK={found['RANK']} and WORLD_SIZE={found['WORLD_SIZE']}: ranks begin with 0; start with "
            "torchrun"
        )
    return found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]
