"""The Halton order visits every position once, fills the image evenly, and differs between samples."""

import pytest
import torch

from fourm.generation.halton import halton_orders, halton_ranks


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 1), (3, 5), (9, 4), (14, 14), (28, 16)])
def test_every_position_is_visited_once(grid):
    ranks = halton_ranks(*grid)
    assert sorted(ranks.tolist()) == list(range(grid[0] * grid[1]))


def test_the_order_is_that_of_the_halton_sequence():
    def inverse(index, base):
        digits = []
        while index:
            digits.append(index % base)
            index //= base
        return sum(digit / base ** (i + 1) for i, digit in enumerate(digits))

    visited = []
    for index in range(500):
        cell = int(5 * inverse(index, 2) + 1e-9) * 7 + int(7 * inverse(index, 3) + 1e-9)
        if cell not in visited:
            visited.append(cell)
    assert halton_ranks(5, 7).argsort().tolist() == visited


def discrepancy(ranks, grid, count):
    """Return the largest difference between the shares of area and of the first positions, over boxes at the origin."""
    first = (ranks < count).view(grid).double()
    share = first.cumsum(0).cumsum(1) / count
    area = torch.ones(grid, dtype=torch.float64).cumsum(0).cumsum(1) / first.numel()
    return (share - area).abs().max().item()


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (9, 20)])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_first_positions_are_spread_more_evenly_than_random_ones(grid, share):
    length, generator = grid[0] * grid[1], torch.Generator().manual_seed(0)
    count = int(share * length)
    random = sorted(discrepancy(torch.randperm(length, generator=generator), grid, count) for _ in range(50))
    assert discrepancy(halton_ranks(*grid), grid, count) < random[25]


def test_samples_begin_at_different_places_of_one_sequence():
    orders = halton_orders((4, 6), torch.tensor([0.0, 0.5, 0.999]))
    ranks = halton_ranks(4, 6)
    assert (orders[0] * 24).round().tolist() == ranks.tolist()
    for order, first in zip(orders, (0, 12, 23), strict=True):
        assert order.argsort().tolist() == ranks.argsort().roll(-first).tolist()
    assert orders.min() >= 0 and orders.max() < 1
