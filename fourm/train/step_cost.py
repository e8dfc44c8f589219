"""Counts what a model costs on a sample from the shapes of its tensors alone, without computing anything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fourm.train.task import StepCost


def count_cost(model: nn.Module, forward: Callable[[], object]) -> StepCost:
    """Count the operations of a forward and backward pass, and the bytes that the backward pass needs.

    Args:
        model: A model on the meta device.
        forward: Runs the forward pass of ``model``. The backward pass counts as two forward passes.
    """
    saved: dict[int, torch.UntypedStorage] = {}  # keeps the storages alive, so that no two of them share an id

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):  # unlike the meta device, it knows autocast
        model.to_empty(device="cpu")
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False) as counter, hooks:
            forward()
    return StepCost(3.0 * counter.get_total_flops(), float(sum(storage.nbytes() for storage in saved.values())))
