"""The Halton order of the positions of an image (Besnier et al., arXiv 2503.17076).

Positions that are decoded in the same step do not see each other, so that they should be far apart. A Halton sequence
fills the image evenly: each of its points falls into a gap between the points before it.

Shapes: B batch, h rows, w columns, L = h·w positions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def halton_orders(grid: tuple[int, int], starts: Tensor) -> Tensor:
    """Return the Halton order of each sample, which begins anywhere in the sequence and continues at its beginning.

    Args:
        grid: Rows and columns, (h, w).
        starts: Where each sample begins, in [0, 1), (B,).

    Returns:
        When each position is decoded, in [0, 1), (B, L).
    """
    ranks = halton_ranks(*grid)
    first = (starts[:, None] * len(ranks)).long()
    return (ranks - first) % len(ranks) / len(ranks)


@lru_cache(maxsize=32)
def halton_ranks(height: int, width: int) -> Tensor:
    """Return the rank of each position, (L,), in the order in which the Halton sequence of bases 2 and 3 visits them.

    Points that fall on a position visited before are skipped.
    """
    # The first 2^a · 3^b points lie in different boxes of a grid of 2^a rows and 3^b columns, one in each. If boxes
    # have at most half the height and width of a position, one lies within it, so that every position is visited.
    rows, columns = _power(2, 2 * height), _power(3, 2 * width)
    index = torch.arange(rows * columns)
    cells = _scaled_inverse(index, 2, height) * width + _scaled_inverse(index, 3, width)
    first = torch.full((height * width,), len(index)).scatter_reduce(0, cells, index, "amin")
    return first.argsort().argsort()


def _power(base: int, minimum: int) -> int:
    """Return the smallest power of ``base`` that is at least ``minimum``."""
    power = 1
    while power < minimum:
        power *= base
    return power


def _scaled_inverse(index: Tensor, base: int, size: int) -> Tensor:
    """Return ⌊size · v⌋, where v is the radical inverse of ``index``: its digits mirrored at the point."""
    mirrored, scale = torch.zeros_like(index), _power(base, len(index))
    weight = scale
    while weight > 1:
        weight //= base
        mirrored += index % base * weight
        index = index // base
    return mirrored * size // scale
