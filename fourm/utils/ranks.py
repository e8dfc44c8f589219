"""Read this process's rank from the environment."""

from __future__ import annotations

import os

from fourm.utils.errors import UserError


def torchrun_ranks() -> tuple[int, int, int]:
    """Return rank, world size and local rank from the environment variables that torchrun sets.

    Raises:
        UserError: If a variable is not a number, or they contradict each other.
    """
    values = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not text.isascii() or not text.isdigit():
            raise UserError(
                f"the environment variable {name}={text!r} is not a number; unset it, or start with torchrun"
            )
        values[name] = int(text)
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise UserError(
            f"the environment has RANK={values['RANK']} and WORLD_SIZE={values['WORLD_SIZE']}, but ranks count from 0; "
            "start with torchrun"
        )
    return values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"]
