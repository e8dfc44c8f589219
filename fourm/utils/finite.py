"""Detect the weights of a training run that has diverged."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, aminmax

from fourm.utils.errors import UserError


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, in one pass and without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = aminmax(tensor.detach())
    return bool(low.isfinite() & high.isfinite())


def check_finite(name: str, tensor: Tensor, source: str | Path) -> None:
    """Raise a :class:`UserError` if the tensor ``name`` of ``source`` has values that are not finite."""
    if not is_finite(tensor):
        raise UserError(
            f"{source}: {name} holds values that are not finite because the training run that wrote it had diverged; "
            "use an earlier checkpoint"
        )
