"""Choose the device that a process uses, and the precision of a computation on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from fourm.utils.errors import UserError


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device called ``name``.

    Args:
        name: ``auto`` for a GPU if there is one and the CPU otherwise, or ``cpu``, ``cuda``, ``cuda:N`` or any other
            device of torch.
        local_rank: Rank of this process on its machine, which is the index of the GPU that ``cuda`` stands for; None
            for the current GPU.

    Raises:
        UserError: If there is no such device or it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device '{name}' cannot be used; choose auto, cpu, cuda or cuda:N: {reason}") from error
    count = torch.cuda.device_count()
    index = device.index if device.index is not None else local_rank
    if count == 0 or (index or 0) >= count:
        raise UserError(
            f"device '{name}' cannot be used: GPU {index or 0} is needed, but torch sees {count} GPUs; choose cpu, or "
            "start at most one process per GPU"
        )
    # Do not touch any GPU before the index is known: otherwise each process would hold memory on the first one.
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def share_gpus(local_rank: int) -> None:
    """Select this process's current GPU; if there are more processes than GPUs, several processes share one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context that computes in the types of the tensors, whatever the precision around it.

    On the meta device, on which shapes alone are computed, torch has no autocast to switch off.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
