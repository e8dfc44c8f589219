"""Fully sharded data parallelism: every process holds a part of every parameter, its gradient and optimizer state.

``fully_shard`` makes each parameter a ``DTensor`` and gathers the parameters of a group of modules just before they are
used. The groups are the blocks, the vocabularies and projections of the encoder's embeddings, and the root, with the
rest. In the root are all parameters that two modules share: the decoder's vocabularies, which are also output matrices,
and the modality vectors, which encoder and decoder have in common.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fourm.models import FM
from fourm.train.config import TrainConfig
from fourm.train.parallel import DDP
from fourm.utils.errors import UserError

T = TypeVar("T")


class FSDP(DDP):
    """Like :class:`DDP`, with the model in shards; a single process has nothing to shard.

    Parameters are gathered in ``fsdp_param_dtype`` and autocast does the rest: the residual stream, norms and losses are
    as precise as under DDP. Gradients are averaged in ``fsdp_reduce_dtype``.
    """

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self._reshard = config.fsdp_reshard_after_forward
        param_dtype = config.autocast_dtype if config.fsdp_param_dtype == "auto" else config.fsdp_param_dtype
        self._precision = MixedPrecisionPolicy(
            None if param_dtype == "float32" else getattr(torch, param_dtype),
            getattr(torch, config.fsdp_reduce_dtype),
            cast_forward_inputs=False,
        )
        self._mesh = self._build_mesh(config.fsdp_shard_size or self.world_size) if self.distributed else None

    def _build_mesh(self, shard_size: int) -> DeviceMesh:
        replicas, rest = divmod(self.world_size, shard_size)
        if rest:
            raise UserError(f"'fsdp_shard_size' {shard_size} does not divide the {self.world_size} processes")
        if replicas == 1:
            return init_device_mesh(self.device.type, (shard_size,), mesh_dim_names=("shard",))
        # Ranks are numbered node by node: neighbours, which are on one node, hold the model together.
        return init_device_mesh(self.device.type, (replicas, shard_size), mesh_dim_names=("replicate", "shard"))

    def place(self, model: FM) -> None:
        if self._mesh is None:
            return super().place(model)
        options: dict[str, Any] = {"mesh": self._mesh, "mp_policy": self._precision}
        contents = [part for embedding in model.encoder_embeddings.values() for part in embedding.children()]
        for group in (*contents, *model.encoder, *model.decoder):
            fully_shard(group, reshard_after_forward=self._reshard, **options)
        # What the root holds is needed from the beginning of a forward pass to the end of the backward pass.
        fully_shard(model, reshard_after_forward=False, **options)
        model.to_empty(device=self.device)
        with _InitialiseShards():
            model.init_weights()

    def wrap(self, model: FM) -> nn.Module:
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

    def in_step(self, batches: Iterable[T | None], model: FM) -> Iterator[T | None]:
        try:
            yield from batches  # forward passes gather parameters: all processes must make the same number of them
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # the root would otherwise wait gathered for a backward pass


class _InitialiseShards(TorchDispatchMode):
    """Within it, an operation that fills a sharded tensor fills the whole one on the CPU first, and keeps this shard.

    The random numbers are thus those of an unsharded model, while no more than one whole parameter is ever in memory.
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
        # Without a source rank nothing is sent: every process has the whole tensor, and takes its shard.
        shards = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shards.to_local())
    else:
        target.copy_(whole)
