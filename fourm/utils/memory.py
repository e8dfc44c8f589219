"""Whether what is going to be made can fit into this machine's memory: the system would end the process without a word."""

from __future__ import annotations

import os

from fourm.utils.errors import UserError


def check_memory(what: str, parameters: float, advice: str) -> None:
    """Raise a :class:`UserError` for a number of 32-bit parameters that this machine cannot hold, whatever else runs on it.

    Args:
        what: is going to have them; the message begins with it.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * parameters > memory:
        raise UserError(
            f"{what}: about {parameters:.1e} parameters take {4 * parameters / 1e9:.0f} GB, and this machine has "
            f"{memory / 1e9:.0f}; {advice}"
        )
