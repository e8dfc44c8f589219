"""Fully sharded data parallelism: every process holds a shard of every parameter, its gradient and its optimizer state.

``fully_shard`` makes each parameter a ``DTensor`` and gathers the parameters of a group of modules just before they are
used. The groups are the parts that a task names, such as the blocks of a transformer; the root holds the rest,
including all parameters that two modules share.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fourm.train.parallel import DDP, ProcessOptions, flatten, in_order, map_shared, share_matrices, unflatten
from fourm.utils.errors import UserError
from fourm.utils.options import option

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FSDPOptions(ProcessOptions):
    """FSDP"""

    fsdp_param_dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "precision of gathered parameters and of their gradients; auto = dtype", "auto"
    )
    fsdp_reduce_dtype: Literal["bfloat16", "float32"] = option("precision in which gradients are averaged", "float32")
    fsdp_reshard_after_forward: bool = option(
        "free the gathered parameters of a block after its forward pass too (ZeRO-3); otherwise keep them until its "
        "backward pass, and between the accum_iter micro-batches of a step (ZeRO-2)",
        True,
    )
    fsdp_shard_size: int = option(
        "number of neighbouring processes that share one copy of the model, e.g. the GPUs of a node; 0 = all",
        0,
        at_least=0,
    )

    def check(self) -> None:
        if self.autocast_dtype == "float32" and self.fsdp_param_dtype not in ("auto", "float32"):
            raise UserError(
                f"'fsdp_param_dtype' {self.fsdp_param_dtype} needs 'dtype' bfloat16 or float16: without autocast, "
                "nothing converts the activations to the precision of the parameters"
            )


class FSDP(DDP):
    """Like :class:`DDP`, but with the model in shards; a single process has nothing to shard.

    Parameters are gathered in ``fsdp_param_dtype``, and autocast decides the precision of everything else: the residual
    stream, norms and losses are as precise as under DDP. Gradients are averaged in ``fsdp_reduce_dtype``.
    """

    def __init__(self, options: FSDPOptions):
        super().__init__(options)
        self._reshard = options.fsdp_reshard_after_forward
        param_dtype = options.autocast_dtype if options.fsdp_param_dtype == "auto" else options.fsdp_param_dtype
        self._precision = MixedPrecisionPolicy(
            None if param_dtype == "float32" else getattr(torch, param_dtype),
            getattr(torch, options.fsdp_reduce_dtype),
            cast_forward_inputs=False,
        )
        self._mesh = self._build_mesh(options.fsdp_shard_size or self.world_size) if self.distributed else None

    def _build_mesh(self, shard_size: int) -> DeviceMesh:
        replicas, rest = divmod(self.world_size, shard_size)
        if rest:
            raise UserError(f"'fsdp_shard_size' {shard_size} does not divide the {self.world_size} processes")
        if replicas == 1:
            return init_device_mesh(self.device.type, (shard_size,), mesh_dim_names=("shard",))
        # Ranks are numbered node by node, so that neighbours, which share a copy of the model, are on the same node.
        mesh = init_device_mesh(self.device.type, (replicas, shard_size), mesh_dim_names=("replicate", "shard"))
        for group in mesh.get_all_groups():  # torch creates them with its own default timeout
            dist.distributed_c10d._set_pg_timeout(self.timeout, group)
        return mesh

    def materialise(self, model: nn.Module, parts: Sequence[nn.Module], name: str = "the model") -> None:
        if self._mesh is None:
            return super().materialise(model, parts, name)
        options: dict[str, Any] = {"mesh": self._mesh, "mp_policy": self._precision}
        for part in parts:
            fully_shard(part, reshard_after_forward=self._reshard, **options)
        # The parameters of the root are needed from the start of the forward pass to the end of the backward pass.
        fully_shard(model, reshard_after_forward=False, **options)
        for method in getattr(model, "forward_methods", ()):
            register_fsdp_forward_method(model, method)
        model.to_empty(device=self.device)
        with _InitialiseShards():
            model.init_weights()  # type: ignore[operator]

    def wrap(self, model: nn.Module) -> nn.Module:
        return super().wrap(model) if self._mesh is None else model

    @contextlib.contextmanager
    def accumulate(self, wrapped: nn.Module) -> Iterator[None]:
        if not isinstance(wrapped, FSDPModule):
            yield
            return
        wrapped.set_requires_gradient_sync(False)
        wrapped.set_reshard_after_backward(self._reshard)
        yield
        wrapped.set_requires_gradient_sync(True)
        wrapped.set_reshard_after_backward(True)

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        norm = super().gradient_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def map_matrices(
        self, function: Callable[[Tensor], Tensor], matrices: Sequence[Tensor], shapes: Sequence[torch.Size]
    ) -> list[Tensor]:
        if self._mesh is None:
            return super().map_matrices(function, matrices, shapes)
        group = self._mesh.get_group("shard")
        rank, processes = dist.get_rank(group), dist.get_world_size(group)
        shares = share_matrices(shapes, processes)
        # The shapes of the rows that process p holds of the matrices that this process computes
        rows = [[(_rows(shapes[i][0], processes, p), shapes[i][1]) for i in shares[rank]] for p in range(processes)]
        received = _exchange([[matrices[i] for i in share] for share in shares], rows, matrices[0], group)
        whole = [torch.cat(parts) for parts in zip(*received, strict=True)]
        if self._mesh.ndim == 2:  # the processes that hold the same rows in other copies of the model have these too
            results = map_shared(function, whole, self._mesh.get_group("replicate"))
        else:
            results = [function(matrix) for matrix in whole]
        split = [result.split([rows[p][k][0] for p in range(processes)]) for k, result in enumerate(results)]
        own = [[matrices[i].shape for i in share] for share in shares]
        returned = _exchange([[parts[p] for parts in split] for p in range(processes)], own, matrices[0], group)
        return in_order(shares, returned)

    def evaluation_batches(self, batches: Iterable[T | None], model: nn.Module) -> Iterator[T | None]:
        try:
            yield from batches  # forward passes gather parameters, so all processes must do the same number of them
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # otherwise the root stays gathered for a backward pass


def _rows(rows: int, processes: int, process: int) -> int:
    """Return how many of the rows of a matrix a process holds, as ``torch.chunk`` distributes them."""
    chunk = -(-rows // processes)
    return min(max(rows - process * chunk, 0), chunk)


def _exchange(
    tensors: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    like: Tensor,
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """Send ``tensors[p]`` to process p, and return what each process sent to this one.

    Args:
        tensors: Tensors of the type of ``like``, by process and in order.
        shapes: The shapes of what process p sends to this one.
    """
    sent = [sum(tensor.numel() for tensor in to_process) for to_process in tensors]
    sizes = [sum(map(math.prod, from_process)) for from_process in shapes]
    received = like.new_empty(sum(sizes))
    dist.all_to_all_single(received, flatten(itertools.chain(*tensors), like), sizes, sent, group)
    return [unflatten(flat, own) for flat, own in zip(received.split(sizes), shapes, strict=True)]


class _InitialiseShards(TorchDispatchMode):
    """A context in which an operation that fills a sharded tensor fills a whole one on the CPU, and keeps this shard.

    The random numbers are therefore those of an unsharded model, while at most one whole parameter is in memory.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = args[0] if args else None
        if not isinstance(target, DTensor) or not func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        whole = torch.empty(target.shape, dtype=target.dtype)
        func(whole, *args[1:], **(kwargs or {}))
        set_shard(target, whole)
        return target


@torch.no_grad()
def set_shard(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, or this process's shard of it, into ``target``."""
    if isinstance(target, DTensor):
        # Without a source rank nothing is sent: every process has the whole tensor and takes its own shard.
        shards = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shards.to_local())
    else:
        target.copy_(whole)
