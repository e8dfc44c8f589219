"""How several processes train one model: what differs between one process, DDP and FSDP (:mod:`fourm.train.fsdp`).

The model knows nothing about this, and the training loop uses only the methods of :class:`Strategy`.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
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
    _SYNC_BUFFERS = "broadcast_buffers"  # the name before torch 2.13, where it is deprecated


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(DeviceOptions):
    """Processes"""

    dist_url: str = option("rendezvous URL of the process group", "env://")
    process_timeout: float = option(
        "longest wait for other processes in a collective operation, in minutes", 30.0, above=0, at_most=1e5
    )
    find_unused_params: bool = option("let DDP search for unused parameters; there are none", False)
    rlimit: int = option("maximum number of open files of a process", 4096, at_least=0, at_most=2**31)


class Processes:
    """The process group of a run. torchrun gives each process its rank; without torchrun there is one process.

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
            # Decisions of the host are exchanged through gloo, because they must not wait for the GPUs.
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            _check_rendezvous(options.dist_url)
            try:
                dist.init_process_group(
                    backend, options.dist_url, rank=self.rank, world_size=self.world_size, timeout=self.timeout
                )
            except (ValueError, RuntimeError, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"the {self.world_size} processes could not meet at 'dist_url' {redact_url(options.dist_url)}: "
                    f"{reason}; start them with torchrun and leave dist_url out"
                ) from error

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """Return in all processes whether any of them has set each of the flags, without waiting for a GPU."""
        if not self.distributed:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes.bool().tolist()

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Return the ``value`` of every process, by rank.

        Args:
            group: A group of all processes, from :meth:`new_group`; None for the default one.
        """
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group)
        return values

    def together(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """Call ``function`` in every process, and return its results by rank.

        In the default group the function must make no collective operation, and may last longer than :attr:`timeout`.

        Args:
            group: As in :meth:`gather`.

        Raises:
            UserError: In all processes, if the function raised a :class:`UserError` or an ``OSError`` in any of them.
        """
        value, message = None, None
        try:
            value = self._run_with_heartbeat(function) if self.distributed and group is None else function()
        except (UserError, OSError) as error:
            message = str(error)
        results = self.gather((value, message), group)
        for _, message in results:
            if message is not None:
                raise UserError(message)
        return [value for value, _ in results]

    def _run_with_heartbeat(self, function: Callable[[], T]) -> T:
        """Run ``function`` in a thread while the processes exchange a heartbeat, until it has ended in all of them."""
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
        """Call ``function`` in the main process and return its result in all, with errors as in :meth:`together`."""
        return self.together(lambda: function() if self.is_main else None, group)[0]  # type: ignore[return-value]

    def new_group(self) -> Any:
        """Return another group of all processes, for the messages of a thread; None if there is only one process."""
        return dist.new_group(backend="gloo", timeout=self.timeout) if self.distributed else None

    def sum(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum tensors over all processes in place, without waiting for the device, and return them."""
        if self.distributed:
            for tensor in tensors.values():
                dist.all_reduce(tensor)
        return tensors

    def is_peer_failure(self, error: Exception) -> bool:
        """Whether ``error`` is a failed collective operation, as when another process has died.

        The processes vote through gloo (:meth:`any`) in every step; its connections break as soon as a process dies.
        """
        return self.distributed and (isinstance(error, dist.DistError) or "gloo" in str(error))

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


class Strategy(Processes, ABC):
    """A way for all processes to train one model."""

    @abstractmethod
    def materialise(self, model: nn.Module, parts: Sequence[nn.Module], name: str = "the model") -> None:
        """Allocate a model that was built on the meta device on :attr:`device`, and initialise it.

        The values come from torch's global generator on the CPU, so that they are the same for all strategies and
        devices.

        Args:
            parts: Modules of the model, each of which is used as a whole, so that its parameters may be sharded
                together.
            name: The name of the model in messages.

        Raises:
            UserError: This machine cannot hold the parameters.
        """

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module that the training loop calls. Call this again when other parameters are to be trained."""

    @abstractmethod
    def accumulate(self, wrapped: nn.Module) -> contextlib.AbstractContextManager:
        """Return a context in which backward passes only add to the gradients of this process.

        The next backward pass outside it averages the gradients over all processes.
        """

    @abstractmethod
    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the global 2-norm, the same in all processes, without waiting for the device."""

    @abstractmethod
    def map_matrices(
        self, function: Callable[[Tensor], Tensor], matrices: Sequence[Tensor], shapes: Sequence[torch.Size]
    ) -> list[Tensor]:
        """Apply a costly function to whole matrices, each of which only one process computes.

        Args:
            function: A function of one matrix, (A, B) → (A, B), of the same type.
            matrices: What this process holds of the matrices: all or, under FSDP, some rows of them.
            shapes: The shapes (A, B) of the whole matrices.

        Returns:
            The results, of which each process gets what it holds of the matrices.
        """

    @abstractmethod
    def evaluation_batches(self, batches: Iterable[T | None], model: nn.Module) -> Iterator[T | None]:
        """Yield the batches for which this process must do a forward pass.

        Args:
            batches: The same number in all processes, with None where only others have batches left.

        Yields:
            A batch, or None where the other processes need a forward pass of this one although it has no batch left.
        """


class DDP(Strategy):
    """Distributed data parallelism: every process holds the whole model and trains it on its own samples."""

    def __init__(self, options: ProcessOptions):
        super().__init__(options)
        self._find_unused = options.find_unused_params

    def materialise(self, model: nn.Module, parts: Sequence[nn.Module], name: str = "the model") -> None:
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
        )

    def accumulate(self, wrapped: nn.Module) -> contextlib.AbstractContextManager:
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return nn.utils.get_total_norm(gradients)

    def map_matrices(
        self, function: Callable[[Tensor], Tensor], matrices: Sequence[Tensor], shapes: Sequence[torch.Size]
    ) -> list[Tensor]:
        return map_shared(function, matrices) if self.distributed else [function(matrix) for matrix in matrices]

    def evaluation_batches(self, batches: Iterable[T | None], model: nn.Module) -> Iterator[T | None]:
        return (batch for batch in batches if batch is not None)


def map_shared(
    function: Callable[[Tensor], Tensor], matrices: Sequence[Tensor], group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """Apply ``function`` to matrices that all processes of ``group`` hold, to each of them in only one process."""
    if not matrices:
        return []
    shares = share_matrices([matrix.shape for matrix in matrices], dist.get_world_size(group))
    own = flatten((function(matrices[i]) for i in shares[dist.get_rank(group)]), matrices[0])
    length = max(sum(matrices[i].numel() for i in share) for share in shares)
    gathered = [own.new_empty(length) for _ in shares]
    dist.all_gather(gathered, nn.functional.pad(own, (0, length - len(own))), group)
    results = [
        unflatten(flat, [matrices[i].shape for i in share]) for flat, share in zip(gathered, shares, strict=True)
    ]
    return in_order(shares, results)


def share_matrices(shapes: Sequence[torch.Size], processes: int) -> list[list[int]]:
    """Distribute matrices over processes: the largest first, each to the process that has the least work so far.

    Args:
        shapes: The shapes (A, B) of the matrices.

    Returns:
        The indices of the matrices of each process.
    """
    work = [min(shape) ** 2 * (min(shape) + 2 * max(shape)) for shape in shapes]  # of a Newton-Schulz iteration
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for i in sorted(range(len(shapes)), key=lambda i: -work[i]):
        process = loads.index(min(loads))
        shares[process].append(i)
        loads[process] += work[i]
    return shares


def in_order(shares: Sequence[Sequence[int]], results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the results by index, from those of each share of the indices."""
    indices, tensors = itertools.chain(*shares), itertools.chain(*results)
    return [result for _, result in sorted(zip(indices, tensors, strict=True), key=lambda pair: pair[0])]


def flatten(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """Concatenate the elements of tensors, of which there may be none, of the type of ``like``."""
    return torch.cat([like.new_empty(0), *(tensor.flatten() for tensor in tensors)])


def unflatten(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return the tensors of these shapes that ``flat`` begins with."""
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]


def _check_rendezvous(url: str) -> None:
    """Raise a :class:`UserError` for a rendezvous URL at which the processes would wait for each other for ever."""
    if url.startswith("tcp:"):
        check_url(url, ("tcp",))
    path = url.removeprefix("file://")
    if path != url and not Path(path.partition("?")[0]).parent.is_dir():
        raise UserError(f"'dist_url' {redact_url(url)}: the folder does not exist")
