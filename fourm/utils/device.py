"""The device on which a process computes."""

from __future__ import annotations

import torch

from fourm.utils.errors import UserError


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device called ``name``.

    Args:
        name: ``auto`` means a GPU if there is one and the CPU otherwise; ``cpu``, ``cuda``, ``cuda:N``, or any other device
            of torch.
        local_rank: Number of this process on its machine: ``cuda`` is the GPU with this number. None: the current GPU.

    Raises:
        UserError: There is no such device, or it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device '{name}' cannot be used, choose auto, cpu, cuda or cuda:N: {reason}") from error
    count = torch.cuda.device_count()
    index = device.index if device.index is not None else local_rank
    if count == 0 or (index or 0) >= count:
        raise UserError(
            f"device '{name}' cannot be used: GPU {index or 0} is needed, but torch sees {count} GPUs; choose cpu, or start at most "
            "one process per GPU"
        )
    # Nothing touches a GPU before its index is known: each process would hold memory on the first one.
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def share_gpus(local_rank: int) -> None:
    """Make one GPU the current one of this process; if there are more processes than GPUs, several share one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
