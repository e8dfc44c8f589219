"""Values that are not finite: steps that are skipped for them are counted on the device, and many in a row end a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fourm.utils.finite import is_finite


class LostSteps:
    """Steps in a row that were lost because the loss or the gradient norm was not finite.

    Nothing here waits for the device but :meth:`read`. All processes count alike, as they have the same norm.

    Args:
        losses: Names of the losses.
        maximum: So many in a row are too many; what is known of them is then kept.
    """

    def __init__(self, losses: Sequence[str], maximum: int, device: torch.device):
        self._losses, self._maximum = list(losses), maximum
        self._streak = torch.zeros(3, dtype=torch.float64, device=device)  # length, last step, whether it was too long
        self._seen = torch.zeros(len(self._losses), device=device)

    def add(self, step: int, lost: Tensor, not_finite: Tensor) -> None:
        """Count a step.

        Args:
            step: its number, from 1.
            lost: 1 or 0.
            not_finite: (losses,) 1 where a loss of this process was not finite in the step.
        """
        length, last, over = self._streak.unbind()
        counts = lost * (1 - over)
        length = torch.where(over > 0, length, (length + 1) * lost)
        last = torch.where(counts > 0, step, last)
        self._seen = torch.where(over > 0, self._seen, torch.maximum(self._seen * (length > 1), not_finite * lost))
        self._streak = torch.stack([length, last, torch.maximum(over, (length >= self._maximum).double())])

    def read(self) -> tuple[int, int, list[str]] | None:
        """First and last step of too many in a row, and the losses of this process that were not finite; None: all is well."""
        length, last, over = self._streak.tolist()
        if not over:
            return None
        names = [name for name, seen in zip(self._losses, self._seen.tolist(), strict=True) if seen]
        return round(last - length + 1), round(last), names


def first_not_finite(tensors: Iterable[tuple[str, Any]]) -> str | None:
    """The name of the first tensor, or shard of one, on the host with a value that is not finite; None: there is none."""
    for name, tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not is_finite(local):
            return name
    return None


def without_not_finite(value: Any, path: str = "") -> tuple[Any, list[str]]:
    """``value`` for JSON, with None for numbers that are not finite, and where these were: ``losses/caption``."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None, [path]
    if not isinstance(value, Mapping):
        return value, []
    found = {key: without_not_finite(item, f"{path}/{key}" if path else str(key)) for key, item in value.items()}
    return {key: item for key, (item, _) in found.items()}, [where for _, places in found.values() for where in places]
