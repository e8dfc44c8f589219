"""The exponential moving average (EMA) of the weights, which often predicts better than the weights themselves."""

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

    model_ema: bool = option("also keep, evaluate and save a moving average of the weights", False)
    model_ema_decay: float = option(
        "share of the average that each step keeps", 0.9999, at_least=0, below=1, fixed=True
    )


class EMA:
    """Averages the parameters of a model over the steps; each process averages its own shards.

    Args:
        buffers: Names of floating point buffers to average too, namely those that training changes in place.

    Attributes:
        tensors: The parameters and buffers by name.
        average: Their averages by name, sharded as they are.
    """

    def __init__(self, model: nn.Module, decay: float, buffers: Sequence[str] = ()):
        self._decay = decay
        self.tensors: dict[str, Tensor] = dict(model.named_parameters())
        self.tensors |= {name: model.get_buffer(name) for name in buffers}
        self.average = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimizer step ``step`` (from 1) to the average.

        Early steps keep a smaller share, (1 + step) / (10 + step); otherwise the initial weights would last long.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(_local(self.average), _local(self.tensors), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model use the averages as its parameters and buffers within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, tensor in zip(_local(self.average), _local(self.tensors), strict=True):
            current = tensor.clone()
            tensor.copy_(average)
            average.copy_(current)


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors.values()]
