"""How several processes train one model: all that differs between one process, DDP and FSDP (:mod:`fourm.train.fsdp`).

The model knows nothing of this, and the training loop only what :class:`Strategy` offers.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fourm.train.device import DeviceOptions
from fourm.utils.device import choose_device
from fourm.utils.errors import UserError
from fourm.utils.memory import check_memory
from fourm.utils.options import option
from fourm.utils.ranks import torchrun_ranks
from fourm.utils.transfer import check_url
from fourm.utils.urls import redact_url

T = TypeVar("T")

_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"  # its name before torch 2.13, which warns of the old one


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(DeviceOptions):
    """Processes"""

    dist_url: str = option("rendezvous of the process group", "env://")
    process_timeout: float = option(
        "stop after waiting so many minutes for another process in a collective operation", 30.0, above=0, at_most=1e5
    )
    find_unused_params: bool = option("DDP's search for unused parameters; none are unused", False)
    rlimit: int = option("open files that a process may have", 4096, at_least=0, at_most=2**31)


class Processes:
    """The processes of a run, of which torchrun tells each its rank; without torchrun there is one.

    Attributes:
        rank, world_size: The number of this process, from 0, and the number of processes.
        device: The device that this process uses.
        timeout: How long a collective operation may wait for the other processes.
    """

    def __init__(self, options: ProcessOptions):
        self.rank, self.world_size, local_rank = torchrun_ranks()
        self.device = choose_device(options.device, local_rank)
        self.timeout = timedelta(minutes=options.process_timeout)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.distributed = self.world_size > 1
        if self.distributed:
            # Decisions of the host travel through gloo: they must not wait for the GPUs.
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            _check_meeting_point(options.dist_url)
            try:
                dist.init_process_group(
                    backend, options.dist_url, rank=self.rank, world_size=self.world_size, timeout=self.timeout
                )
            except (ValueError, RuntimeError, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"the {self.world_size} processes did not meet at 'dist_url' {redact_url(options.dist_url)}: {reason}; start them "
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
        """What ``function`` returns in every process; a :class:`UserError` or ``OSError`` of any is raised in all.

        It may last longer than :attr:`timeout` in one of them, unless they use a ``group`` of their own: meanwhile the
        processes go on telling each other that they are there.
        """
        value, error = None, None
        try:
            value = self._while_others_wait(function) if self.distributed and group is None else function()
        except (UserError, OSError) as found:
            error = str(found)
        results = self.gather((value, error), group)
        for _, error in results:
            if error is not None:
                raise UserError(error)
        return [value for value, _ in results]

    def _while_others_wait(self, function: Callable[[], T]) -> T:
        """Run ``function``, which makes no collective operation, in a thread, until it has ended in all processes."""
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(function())
            except BaseException as error:  # raised in the main thread
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while True:
            thread.join(1)
            (working,) = self.any(thread.is_alive())
            if not working:
                break
        if errors:
            raise errors[0]
        return results[0]

    def from_main(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """What ``function`` returns in the main process; its errors are raised in all, as by :meth:`together`."""
        return self.together(lambda: function() if self.is_main else None, group)[0]  # type: ignore[return-value]

    def new_group(self) -> Any:
        """A further group of all processes, for the host's messages of a thread; None if there is one process."""
        return dist.new_group(backend="gloo", timeout=self.timeout) if self.distributed else None

    def sum(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums of tensors over all processes, without waiting for the device; in place."""
        if self.distributed:
            for tensor in tensors.values():
                dist.all_reduce(tensor)
        return tensors

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
    def place(self, model: nn.Module, parts: Sequence[nn.Module], name: str = "the model") -> None:
        """Give a model that was built on the meta device its memory on :attr:`device`, and its initial values.

        The values come from torch's global generator on the CPU, so that they are the same for all strategies and devices.

        Args:
            parts: Modules of the model, each of which is used as a whole, so that its parameters may be sharded together.
            name: For messages: what the configuration calls the model.

        Raises:
            UserError: this machine cannot hold its parameters.
        """

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """What the training loop calls. To be called anew when other parameters are to be trained."""

    @abstractmethod
    def accumulate(self, wrapped: nn.Module) -> contextlib.AbstractContextManager:
        """Within it a backward pass only adds to this process's gradients; the next one outside averages them all."""

    @abstractmethod
    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The global 2-norm, alike in all processes, without waiting for the device."""

    @abstractmethod
    def in_step(self, batches: Iterable[T | None], model: nn.Module) -> Iterator[T | None]:
        """``batches``, for forward passes without training. None = the others still need this process to take part.

        Args:
            batches: the same number in all processes, with None where only others have some left.
        """


class DDP(Strategy):
    """Every process holds the whole model and trains it on its own samples; gradients are averaged."""

    def __init__(self, options: ProcessOptions):
        super().__init__(options)
        self._find_unused = options.find_unused_params

    def place(self, model: nn.Module, parts: Sequence[nn.Module], name: str = "the model") -> None:
        check_memory(name, sum(parameter.numel() for parameter in model.parameters()), "choose a smaller one")
        model.to_empty(device="cpu").init_weights()  # type: ignore[operator]
        model.to(self.device)

    def wrap(self, model: nn.Module) -> nn.Module:
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

    def in_step(self, batches: Iterable[T | None], model: nn.Module) -> Iterator[T | None]:
        return (batch for batch in batches if batch is not None)


def _check_meeting_point(url: str) -> None:
    """Raise a :class:`UserError` for one at which processes would wait for each other for ever."""
    if url.startswith("tcp:"):
        check_url(url, ("tcp",))
    path = url.removeprefix("file://")
    if path != url and not Path(path.partition("?")[0]).parent.is_dir():
        raise UserError(f"'dist_url' {redact_url(url)}: there is no such folder")
