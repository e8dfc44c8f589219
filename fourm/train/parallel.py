"""How several processes train one model: all that differs between one process, DDP and FSDP (:mod:`fourm.train.fsdp`).

The model knows nothing of this, and the training loop only what :class:`Strategy` offers.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fourm.models import FM
from fourm.train.config import TrainConfig
from fourm.utils.errors import UserError
from fourm.utils.memory import check_memory
from fourm.utils.ranks import ranks_of_torchrun
from fourm.utils.transfer import check_url, shown

T = TypeVar("T")

_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"  # its name before torch 2.13, which warns of the old one


class Processes:
    """The processes of a run, of which torchrun tells each its rank; without torchrun there is one.

    Attributes:
        rank, world_size: this process and their number.
        device: of this process.
    """

    def __init__(self, config: TrainConfig):
        self.rank, self.world_size, local_rank = ranks_of_torchrun()
        self.device = _device(config.device, local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.distributed = self.world_size > 1
        if self.distributed:
            # Decisions of the host travel through gloo: they must not wait for the GPUs.
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            _check_meeting_point(config.dist_url)
            try:
                dist.init_process_group(backend, config.dist_url, rank=self.rank, world_size=self.world_size)
            except (ValueError, RuntimeError, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"the {self.world_size} processes did not meet at 'dist_url' {shown(config.dist_url)}: {reason}; start them "
                    "with torchrun, and leave dist_url out"
                ) from error

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

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """``value`` of every process, by rank; ``group`` is of all processes, but not disturbed by what others gather."""
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group)
        return values

    def together(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """What ``function`` returns in every process; a :class:`UserError` or ``OSError`` of any is raised in all."""
        value, error = None, None
        try:
            value = function()
        except (UserError, OSError) as found:
            error = str(found)
        results = self.gather((value, error), group)
        for _, error in results:
            if error is not None:
                raise UserError(error)
        return [value for value, _ in results]

    def from_main(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """What ``function`` returns in the main process; its errors are raised in all, as by :meth:`together`."""
        return self.together(lambda: function() if self.is_main else None, group)[0]  # type: ignore[return-value]

    def is_loss_of_contact(self, error: Exception) -> bool:
        """Whether a collective has failed, as it does when one of the processes dies.

        Every step votes through gloo (:meth:`any`), whose connections break at once, so that nobody waits for long.
        """
        return self.distributed and (isinstance(error, dist.DistError) or "gloo" in str(error))

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


class Strategy(Processes, ABC):
    """A way to train one model in all processes."""

    @abstractmethod
    def place(self, model: FM) -> None:
        """Give a model that was built on the meta device its memory here and its initial values.

        These come from torch's global generator on the CPU, so that they are the same for all strategies and devices.
        """

    @abstractmethod
    def wrap(self, model: FM) -> nn.Module:
        """What the training loop calls. To be called anew when other parameters are to be trained."""

    @abstractmethod
    def accumulate(self, wrapped: nn.Module) -> contextlib.AbstractContextManager:
        """Within it a backward pass only adds to this process's gradients; the next one outside averages them all."""

    @abstractmethod
    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The global 2-norm, alike in all processes, without waiting for the device."""

    @abstractmethod
    def in_step(self, batches: Iterable[T | None], model: FM) -> Iterator[T | None]:
        """``batches``, for forward passes without training. None = the others still need this process to take part.

        Args:
            batches: the same number in all processes, with None where only others have some left.
        """


class DDP(Strategy):
    """Every process holds the whole model and trains it on its own samples; gradients are averaged."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self._find_unused = config.find_unused_params
        self._model = f"'model' {config.model}" + (" with its 'model_kwargs'" if config.model_kwargs else "")

    def place(self, model: FM) -> None:
        check_memory(self._model, sum(parameter.numel() for parameter in model.parameters()), "choose a smaller one")
        model.to_empty(device="cpu").init_weights()
        model.to(self.device)

    def wrap(self, model: FM) -> nn.Module:
        if not self.distributed:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        constant_buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
        return DistributedDataParallel(
            model, devices, gradient_as_bucket_view=True, find_unused_parameters=self._find_unused, **constant_buffers
        )  # fmt: skip

    def accumulate(self, wrapped: nn.Module) -> contextlib.AbstractContextManager:
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return nn.utils.get_total_norm(gradients)

    def in_step(self, batches: Iterable[T | None], model: FM) -> Iterator[T | None]:
        return (batch for batch in batches if batch is not None)


def _check_meeting_point(url: str) -> None:
    """Raise a :class:`UserError` for one at which processes would wait for each other for ever."""
    if url.startswith("tcp:"):
        check_url(url, ("tcp",))
    path = url.removeprefix("file://")
    if path != url and not Path(path.partition("?")[0]).parent.is_dir():
        raise UserError(f"'dist_url' {shown(url)}: there is no such folder")


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"'device' must be auto, cpu, cuda or cuda:N, not {name!r}") from None
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    index = local_rank if device.index is None else device.index
    if index >= count:
        raise UserError(f"'device': there are {count} GPUs here, not {index + 1}; set --device cpu or fewer processes")
    return torch.device("cuda", index)
