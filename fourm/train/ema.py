"""The exponential moving average of the weights, which often predicts better than the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourm.utils.options import Options, option


@dataclass(frozen=True, kw_only=True)
class EMAOptions(Options):
    """Moving average of the weights"""

    model_ema: bool = option("keep, evaluate and save a moving average of the weights too", False)
    model_ema_decay: float = option(
        "share of the average that each step keeps", 0.9999, at_least=0, below=1, fixed=True
    )


class EMA:
    """The average of a model's parameters over the steps, in this process's shards of them.

    Args:
        buffers: Names of floating point buffers that are averaged too: those that training changes, in place.

    Attributes:
        tensors: Name → parameter or buffer.
        average: Name → its average, sharded as it is.
    """

    def __init__(self, model: nn.Module, decay: float, buffers: Sequence[str] = ()):
        self._decay = decay
        self.tensors: dict[str, Tensor] = dict(model.named_parameters())
        self.tensors |= {name: model.get_buffer(name) for name in buffers}
        self.average = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Count the weights after optimizer step ``step`` (from 1).

        An early average keeps less, (1 + step) / (10 + step); otherwise the initial weights would stay in it for long.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(_local(self.average), _local(self.tensors), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averages as its parameters and buffers."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, tensor in zip(_local(self.average), _local(self.tensors), strict=True):
            current = tensor.clone()
            tensor.copy_(average)
            average.copy_(current)


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors.values()]
