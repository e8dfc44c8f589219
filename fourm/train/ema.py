"""The exponential moving average of the weights, which often predicts better than the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA:
    """The average of a model's parameters over the steps, in this process's shards of them.

    Attributes:
        average: parameter → its average, sharded as it is.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self._parameters = dict(model.named_parameters())
        self.average = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Count the weights after optimizer step ``step`` (from 1). An early average keeps less: (1 + step) / (10 + step),
        or the initial weights would stay in it for long."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(_local(self.average), _local(self._parameters), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averages as its parameters."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, parameter in zip(_local(self.average), _local(self._parameters), strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors.values()]
