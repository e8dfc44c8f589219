"""MLPs that encode and decode vectors, such as global features and poses; each position of a grid is independent.

Shapes: B samples, C channels, h x w positions, 1 x 1 for a vector, D width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from fourm.models.fm_utils import LayerNorm
from fourm.utils.errors import UserError
from fourm.vq.vit import MAX_BLOCKS

_SIZE = re.compile(r"BottleneckMLP/B_(\d{1,3})-Wi_(\d{1,5})(?:-E_(\d{1,2}))?")


@dataclass(frozen=True)
class MLPSize:
    """The number of blocks, their width, and the ratio of the width of their hidden layer to it."""

    depth: int
    dim: int
    expansion: int = 4


def mlp_size(name: str) -> MLPSize:
    """Parse the name of a size: ``BottleneckMLP/B_6-Wi_1024`` has 6 blocks of width 1024; ``-E_2`` sets the expansion.

    Raises:
        UserError: The name is not that of a size.
    """
    match = _SIZE.fullmatch(name)
    numbers = [int(number) for number in match.groups() if number] if match else []
    if not numbers or 0 in numbers or numbers[0] > MAX_BLOCKS:
        raise UserError(f"'{name}' is not an MLP such as BottleneckMLP/B_6-Wi_1024, with at most {MAX_BLOCKS} blocks")
    return MLPSize(*numbers)


class BottleneckMLP(nn.Module):
    """Residual MLPs between two linear maps, (B, C, h, w) → (B, C', h, w).

    Args:
        size: The size of the residual MLPs.
        channels: C.
        out_channels: C'.
    """

    def __init__(self, size: MLPSize, channels: int, out_channels: int):
        super().__init__()
        self.linear_in = nn.Linear(channels, size.dim)
        self.blocks = nn.ModuleList(_Block(size) for _ in range(size.depth))
        self.layernorms = nn.ModuleList(LayerNorm(size.dim, eps=1e-5) for _ in range(size.depth))
        self.linear_out = nn.Linear(size.dim, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_in(rearrange(x, "b c h w -> b h w c"))
        for block, norm in zip(self.blocks, self.layernorms, strict=True):
            x = x + block(norm(x))
        return rearrange(self.linear_out(x), "b h w c -> b c h w")


class _Block(nn.Module):
    def __init__(self, size: MLPSize):
        super().__init__()
        hidden = size.expansion * size.dim
        self.block = nn.Sequential(nn.Linear(size.dim, hidden), nn.GELU(), nn.Linear(hidden, size.dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)
