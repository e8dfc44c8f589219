"""How several processes train one model: all that differs between one process, DDP and other strategies.

The model knows nothing of this, and the training loop only what :class:`Processes` offers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fourm.train.config import TrainConfig
from fourm.utils.errors import UserError

T = TypeVar("T")


class Processes:
    """The processes of a run, of which torchrun tells each its rank; without torchrun there is one.

    Attributes:
        rank, world_size: this process and their number.
        device: of this process.
    """

    def __init__(self, config: TrainConfig):
        self.rank, self.world_size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        self.device = _device(config.device, local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.distributed = self.world_size > 1
        if self.distributed:
            # Decisions of the host travel through gloo: they must not wait for the GPUs.
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, config.dist_url, rank=self.rank, world_size=self.world_size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """Which of ``flags`` is set in any process: all of them decide alike, without waiting for a GPU."""
        if not self.distributed:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes.bool().tolist()

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, by rank."""
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, function: Callable[[], T]) -> T:
        """What ``function`` returns in the main process; its :class:`UserError` is raised in all of them."""
        value, error = None, None
        if self.is_main:
            try:
                value = function()
            except UserError as found:
                error = str(found)
        value, error = self.gather((value, error))[0]
        if error is not None:
            raise UserError(error)
        return value  # type: ignore[return-value]

    def barrier(self) -> None:
        if self.distributed:
            self.any(False)

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


class DDP(Processes):
    """Every process holds the whole model and trains it on its own samples; gradients are averaged."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self._find_unused = config.find_unused_params

    def wrap(self, model: nn.Module) -> nn.Module:
        """What the training loop calls. To be called anew when other parameters are to be trained."""
        if not self.distributed:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model, devices, broadcast_buffers=False, gradient_as_bucket_view=True,
            find_unused_parameters=self._find_unused,
        )  # fmt: skip

    def accumulate(self, wrapped: nn.Module) -> contextlib.AbstractContextManager:
        """Within it a backward pass only adds to this process's gradients; the next one outside averages them all."""
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The global 2-norm, alike in all processes."""
        return nn.utils.get_total_norm(gradients)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"'device' must be auto, cpu, cuda or cuda:N, not {name!r}") from None
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    index = local_rank if device.index is None else device.index
    if index >= count:
        raise UserError(f"'device': there are {count} GPUs here, not {index + 1}; set --device cpu or fewer processes")
    return torch.device("cuda", index)
