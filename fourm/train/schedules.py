"""Learning rate and weight decay as functions of the micro-batch index."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fourm.train.config import RunLength, TrainConfig, inverse_sqrt_timescale


def _cosine(start: float, end: float, done: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Schedule:
    """What the optimizer uses at a micro-batch of the run.

    First the frozen phase at a constant rate, then linear warm-up from 0, then cosine to ``min_lr``, or
    ``peak_lr / sqrt((t + T) / T)`` followed by a linear cool-down to ``min_lr``.
    """

    length: RunLength
    peak_lr: float
    min_lr: float
    frozen_lr: float
    timescale: float | None
    weight_decay_start: float
    weight_decay_end: float

    def frozen(self, batch: int) -> bool:
        """Whether only the embeddings train."""
        return batch < self.length.frozen_batches

    def lr(self, batch: int) -> float:
        if self.frozen(batch):
            return self.frozen_lr
        batch -= self.length.frozen_batches
        warmup, cooldown = self.length.warmup_batches, self.length.cooldown_batches
        if batch < warmup:
            return self.peak_lr * batch / max(1, warmup - 1)
        batch -= warmup
        total = self.length.total_batches - self.length.frozen_batches - warmup
        if self.timescale is None:
            return _cosine(self.peak_lr, self.min_lr, batch / total)
        plateau = total - cooldown
        value = self.peak_lr / math.sqrt((min(batch, plateau) + self.timescale) / self.timescale)
        if batch < plateau:
            return value
        return value + (self.min_lr - value) * (batch - plateau) / max(1, cooldown - 1)

    def weight_decay(self, batch: int) -> float:
        return _cosine(self.weight_decay_start, self.weight_decay_end, batch / max(1, self.length.total_batches))


def build_schedule(config: TrainConfig, length: RunLength, world_size: int) -> Schedule:
    """Rates scale with the global batch: lr = blr · batch_size · accum_iter · world_size / 256."""
    scale = config.batch_size * config.accum_iter * world_size / 256
    frozen_blr = config.frozen_model_blr if config.frozen_model_blr >= 0 else config.blr
    return Schedule(
        length=length,
        peak_lr=config.blr * scale,
        min_lr=config.min_blr * scale,
        frozen_lr=frozen_blr * scale,
        timescale=inverse_sqrt_timescale(config.scheduler),
        weight_decay_start=config.weight_decay,
        weight_decay_end=config.weight_decay if config.weight_decay_end is None else config.weight_decay_end,
    )
