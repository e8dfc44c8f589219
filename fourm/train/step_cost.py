"""Counts what a model costs on a sample from the shapes of its tensors alone, without computing anything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def count_flops(model: nn.Module, forward: Callable[[], object]) -> float:
    """Count the operations of a forward and backward pass; the latter counts as two forward passes.

    Args:
        model: A model on the meta device, of which some buffers may have values.
        forward: Runs the forward pass of ``model`` on inputs on the meta device, where attention consists
            of matrix products, which count. Other devices have kernels for it, of which the counter does not know all.
    """
    model.to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return 3.0 * counter.get_total_flops()


def count_activations(model: nn.Module, forward: Callable[[], object]) -> float:
    """Count the bytes that the backward pass needs, without those of the parameters.

    Args:
        model: A model on the meta device.
        forward: Runs the forward pass of ``model`` on inputs on the CPU.
    """
    saved: dict[int, torch.UntypedStorage] = {}  # keeps the storages alive, so that no two of them share an id

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):  # on the meta device, attention would keep its n² weights
        model.to_empty(device="cpu")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward()
    return float(sum(storage.nbytes() for storage in saved.values()))
