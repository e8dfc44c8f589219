"""The batch-size warm-up: at first, an optimizer step makes several updates, each with a part of its batch.

Early in training, the gradient of a part is nearly as good as that of the batch, so that more updates with the same
samples lower the loss faster. Data, checkpoints and schedules count steps and whole batches as without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fourm.data.unified_datasets import Batch
from fourm.train.schedules import LengthOptions
from fourm.utils.errors import UserError
from fourm.utils.options import option


@dataclass(frozen=True, kw_only=True)
class BatchWarmupOptions(LengthOptions):
    """Batch-size warm-up"""

    batch_warmup_steps: int = option(
        "optimizer steps that update after each part of the batch, at learning rates times the root of its share",
        0,
        at_least=0,
        at_most=10**15,
        fixed=True,
    )
    batch_warmup_parts: int = option(
        "parts of the batch at first, a power of 2; their number is halved at equal intervals",
        4,
        at_least=2,
        at_most=1024,
        fixed=True,
    )

    def check(self) -> None:
        parts = self.batch_warmup_parts
        if parts & (parts - 1):
            raise UserError(f"'batch_warmup_parts' must be a power of 2, not {parts}")
        of_micro_batches = self.accum_iter % parts == 0
        of_samples = parts % self.accum_iter == 0 and self.batch_size % (parts // self.accum_iter) == 0
        if self.batch_warmup_steps and not of_micro_batches and not of_samples:
            raise UserError(
                f"'batch_warmup_parts' {parts}: set it to a number that divides accum_iter {self.accum_iter}, or to "
                f"accum_iter times a number that divides batch_size {self.batch_size}"
            )

    def updates(self, step: int) -> int:
        """Return the number of updates of a step, counted from 0."""
        if step >= self.batch_warmup_steps:
            return 1
        halvings = self.batch_warmup_parts.bit_length() - 1
        return self.batch_warmup_parts >> step * halvings // self.batch_warmup_steps


def divide(batches: list[Batch], updates: int) -> list[list[Batch]]:
    """Divide the micro-batches of a step among its updates."""
    if updates == 1:
        return [batches]
    pieces = math.ceil(updates / len(batches))
    parts = [part for batch in batches for part in batch.split(pieces)]
    size = len(parts) // updates
    return [parts[start : start + size] for start in range(0, len(parts), size)]
