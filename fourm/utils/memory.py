"""Check that a model fits into this machine's memory; otherwise the system would kill the process without a message."""

from __future__ import annotations

import os

from fourm.utils.errors import UserError


def physical_memory() -> int:
    """Return the memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(subject: str, parameters: float, advice: str) -> None:
    """Raise a :class:`UserError` if this machine's memory is too small for a number of parameters.

    Args:
        subject: What has these parameters; the message begins with it.
        parameters: Number of 32-bit parameters.
        advice: What to do; the message ends with it.
    """
    memory = physical_memory()
    if 4 * parameters > memory:
        raise UserError(
            f"{subject}: about {parameters:.1e} parameters take {4 * parameters / 1e9:.0f} GB, but this machine has "
            f"only {memory / 1e9:.0f} GB; {advice}"
        )
