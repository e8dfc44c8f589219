"""Weights of a training that has diverged are not taken for weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, aminmax

from fourm.utils.errors import UserError


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, in one pass without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = aminmax(tensor.detach())
    return bool(low.isfinite() & high.isfinite())


def check_finite(name: str, tensor: Tensor, source: str | Path) -> None:
    """Raise a :class:`UserError` if the tensor ``name`` of ``source`` holds values that are not finite."""
    if not is_finite(tensor):
        raise UserError(
            f"{source}: {name} holds values that are not finite, for the training that wrote it had diverged; take earlier ones"
        )
