"""Values that are not finite: the steps skipped because of them are counted, and many in a row end a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fourm.utils.finite import is_finite


class NonFiniteStreak:
    """Counts the steps in a row whose loss or gradient norm was not finite.

    Only :meth:`read` waits for the device. All processes count alike, because they have the same gradient norm.

    Args:
        losses: Names of the losses.
        maximum: The length from which on a streak is too long. The first streak that gets so long is remembered.
    """

    def __init__(self, losses: Sequence[str], maximum: int, device: torch.device):
        self._losses, self._maximum = list(losses), maximum
        # Length, last step, and whether it was too long.
        self._streak = torch.zeros(3, dtype=torch.float64, device=device)
        # (losses,) 1 where a loss was not finite in the streak.
        self._non_finite = torch.zeros(len(self._losses), device=device)

    def add(self, step: int, failed: Tensor, non_finite: Tensor) -> None:
        """Count a step.

        Args:
            step: The number of the step, from 1.
            failed: 1 if the loss or gradient norm of the step was not finite, otherwise 0.
            non_finite: (losses,) 1 where a loss of this process was not finite in the step, otherwise 0.
        """
        length, last, too_long = self._streak.unbind()
        counts = failed * (1 - too_long)
        length = torch.where(too_long > 0, length, (length + 1) * failed)
        last = torch.where(counts > 0, step, last)
        extended = torch.maximum(self._non_finite * (length > 1), non_finite * failed)
        self._non_finite = torch.where(too_long > 0, self._non_finite, extended)
        self._streak = torch.stack([length, last, torch.maximum(too_long, (length >= self._maximum).double())])

    def read(self) -> tuple[int, int, list[str]] | None:
        """Return the streak that was too long, or None if there was none.

        Returns:
            The first step, the last step, and the names of the losses of this process that were not finite in it.
        """
        length, last, too_long = self._streak.tolist()
        if not too_long:
            return None
        names = [name for name, flag in zip(self._losses, self._non_finite.tolist(), strict=True) if flag]
        return round(last - length + 1), round(last), names


def first_non_finite(tensors: Iterable[tuple[str, Any]]) -> str | None:
    """Return the name of the first tensor on the host whose values (of this shard) are not all finite, or None."""
    for name, tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not is_finite(local):
            return name
    return None


def replace_non_finite(value: Any, path: str = "") -> tuple[Any, list[str]]:
    """Replace the numbers that are not finite, which JSON does not have.

    Args:
        value: A number, another value, or nested mappings of these.
        path: The path of ``value`` in what holds it.

    Returns:
        The value with None for these numbers, and their paths, such as ``losses/caption``.
    """
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None, [path]
    if not isinstance(value, Mapping):
        return value, []
    replaced = {key: replace_non_finite(item, f"{path}/{key}" if path else str(key)) for key, item in value.items()}
    return {key: item for key, (item, _) in replaced.items()}, [p for _, paths in replaced.values() for p in paths]
