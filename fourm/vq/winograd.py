"""3x3 convolutions with a quarter of the multiplications, for decoding on a CPU.

Winograd's algorithm F(4x4, 3x3) (Lavin & Gray, https://arxiv.org/abs/1509.09308): a tile of 6x6 inputs and the 3x3
weights are transformed to 36 numbers each, whose products, summed over the channels, are transformed to a tile of 4x4
outputs. The sums over channels are matrix products. The rounding errors are six to eight times those of a direct
convolution in float32.

Shapes: B images, C and D input and output channels, H x W positions, R x S = H/4 x W/4 tiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_TILE, _INPUT = 4, 6
"""Side lengths of a tile of outputs and of the inputs that it depends on."""
_POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
"""Where the polynomials are evaluated, besides infinity. The usual points give four times the rounding error."""
_MIN_SIDE = 12
"""Smaller maps have so few tiles that reading the transformed weights, four times as large, takes too long."""
_MAX_NUMBERS = 2**22
"""Transformed inputs computed at a time, 16 MB. By default the C library may return larger tensors to the system when
they are freed, and clearing the pages of new ones takes more than a third of the time of a convolution."""

_transformed: ContextVar[dict[nn.Module, Tensor] | None] = ContextVar("_transformed", default=None)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that uses the algorithm inside :func:`fast_convolutions` if its input is large."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1):
        super().__init__(channels, out_channels, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x, (B, C, H, W) → (B, D, H/stride, W/stride)."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return super().forward(x)
        transformed = _transformed.get()
        if transformed is None or self.stride != (1, 1) or min(x.shape[2:]) < _MIN_SIDE:
            return super().forward(x)
        if self not in transformed:
            transformed[self] = _transform_weight(self.weight)
        rows, columns = (-(-side // _TILE) for side in x.shape[2:])
        images = max(_MAX_NUMBERS // (_INPUT**2 * rows * columns * x.shape[1]), 1)
        return torch.cat([_convolve(part, transformed[self], self.bias) for part in x.split(images)])


@contextlib.contextmanager
def fast_convolutions(network: nn.Module) -> Iterator[None]:
    """Use the algorithm inside this context, if the weights of ``network`` are float32 on a CPU and autocast is off.

    Until it ends, it keeps the transformed weights, which are four times as large as the weights of the convolutions.
    """
    weight = next(network.parameters())
    usable = weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    token = _transformed.set({} if usable else None)
    try:
        yield
    finally:
        _transformed.reset(token)


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Return the transforms of inputs (36, 36), weights (36, 9) and products (16, 36), for rows and columns at once."""
    points = np.array(_POINTS)
    others = [np.delete(points, i) for i in range(len(points))]
    inputs, weights, outputs = np.zeros((_INPUT, _INPUT)), np.zeros((_INPUT, 3)), np.zeros((_TILE, _INPUT))
    for i, point in enumerate(points):
        inputs[i, :-1] = np.poly(others[i])[::-1]  # the polynomial that is 0 at all other points
        weights[i] = point ** np.arange(3) / np.prod(point - others[i])
        outputs[:, i] = point ** np.arange(_TILE)
    inputs[-1], weights[-1, -1], outputs[-1, -1] = np.poly(points)[::-1], 1, 1
    to_inputs, to_weights, to_outputs = (
        torch.from_numpy(np.kron(matrix, matrix)).float() for matrix in (inputs, weights, outputs)
    )
    return to_inputs, to_weights, to_outputs


_TO_INPUTS, _TO_WEIGHTS, _TO_OUTPUTS = _matrices()


def _transform_weight(weight: Tensor) -> Tensor:
    """Transform a weight, (D, C, 3, 3) → (36, C, D)."""
    numbers = _TO_WEIGHTS @ rearrange(weight, "d c p q -> (p q) (c d)")
    return numbers.view(_INPUT**2, weight.shape[1], weight.shape[0])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve x (B, C, H, W) → (B, D, H, W), channels last in memory, with a result of :func:`_transform_weight`."""
    batch, channels, height, width = x.shape
    rows, columns = -(-height // _TILE), -(-width // _TILE)
    x = x.permute(0, 2, 3, 1)
    x = F.pad(x, (0, 0, 1, 1 + columns * _TILE - width, 1, 1 + rows * _TILE - height))
    tiles = rearrange(x.unfold(1, _INPUT, _TILE).unfold(2, _INPUT, _TILE), "b r s c p q -> (p q) (b r s c)")
    products = (_TO_INPUTS @ tiles).view(_INPUT**2, -1, channels) @ weight  # (36, B R S, D)
    y = _TO_OUTPUTS @ products.flatten(1)
    y = rearrange(y, "(p q) (b r s d) -> b (r p) (s q) d", p=_TILE, q=_TILE, b=batch, r=rows, s=columns)
    y = y[:, :height, :width]
    return (y if bias is None else y + bias).permute(0, 3, 1, 2)
