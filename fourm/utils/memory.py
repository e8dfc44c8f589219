"""The memory of this machine: whether a model fits into it, and who keeps what a process frees."""

from __future__ import annotations

import ctypes
import os

from fourm.utils.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt in malloc.h


def physical_memory() -> int:
    """Return the memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(subject: str, parameters: float, advice: str) -> None:
    """Raise a :class:`UserError` if this machine's memory is too small for a number of parameters.

    Otherwise the system would kill the process without a message.

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


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the rest of this process; do nothing with another C library.

    Otherwise it returns every large tensor to the system, which clears its pages when the process needs them again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
