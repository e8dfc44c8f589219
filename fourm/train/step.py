"""A training step: the same one for all tasks, strategies, devices and precisions."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fourm.data.unified_datasets import Position
from fourm.train.config import RunConfig
from fourm.train.device import autocast, peak_tflops
from fourm.train.ema import EMA
from fourm.train.metrics import Interval
from fourm.train.nonfinite import NonFiniteStreak
from fourm.train.optimizer import GradientStep, set_hyperparameters
from fourm.train.parallel import Strategy
from fourm.train.schedules import Schedule
from fourm.train.task import Task, add
from fourm.utils.seeds import generator


@dataclasses.dataclass
class Trainer:
    """Everything that an optimizer step needs and changes.

    Attributes:
        step: The number of optimizer steps that are done.
        positions: The newest ``position`` of each of this rank's data streams, see :meth:`Task.train_batches`.
        total_steps, steps_per_epoch: The length of the run and of an epoch in optimizer steps.
        samples_per_step: The number of samples of an optimizer step in all processes.
    """

    config: RunConfig
    task: Task
    parallel: Strategy
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    step: int = 0
    positions: dict[int, Position] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        config, task, device = self.config, self.task, self.parallel.device
        self.total_steps = self.schedule.length.total_batches // config.accum_iter
        self.steps_per_epoch = self.schedule.length.batches_per_epoch // config.accum_iter
        self.samples_per_step = config.batch_size * config.accum_iter * self.parallel.world_size
        self.gradient_step = GradientStep(self.optimizer, config, self.parallel)
        buffers = task.changing_buffers(self.model)
        self.ema = EMA(self.model, config.model_ema_decay, buffers) if config.model_ema else None
        self.interval = Interval(task.losses, device, peak_tflops(config, device))
        self.non_finite_streak = NonFiniteStreak(task.losses, config.max_skipped_steps, device)
        self._wrapped: nn.Module | None = None
        self._frozen: bool | None = None

    def train_step(self, batches: list[Any]) -> None:
        """Do one optimizer step: forward and backward pass of every micro-batch, clipping, update, and statistics.

        Args:
            batches: The micro-batches of this rank for one optimizer step.
        """
        config, task, parallel, phase = self.config, self.task, self.parallel, self.interval.phase
        first = self.step * config.accum_iter
        set_hyperparameters(self.optimizer, self.schedule.lr(first), self.schedule.weight_decay(first))
        wrapped = self._wrapped_model(self.schedule.frozen(first))
        statistics: dict[str, Tensor] = {}
        not_finite: list[Tensor] = []
        for index, batch in enumerate(batches):
            seed_batch(config.seed, (first + index) * parallel.world_size + parallel.rank)
            with phase("select_and_copy"):
                inputs = task.prepare(self.model, batch, parallel.device)
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else parallel.accumulate(wrapped):
                with phase("forward"), autocast(config, parallel.device):
                    losses = task.loss(wrapped, inputs)
                with phase("backward"):
                    # 0 · loss is 0, or NaN if the loss is not finite: then the gradients are NaN, and all ranks skip.
                    scale = self.gradient_step.scale / len(batches) + 0 * losses.total.detach()
                    (losses.total * scale).backward()
            statistics = add(statistics, {name: value.detach() for name, value in losses.statistics.items()})
            flags = self.interval.add_batch(losses, inputs, batch.position)  # (losses,) 1 where one is not finite
            not_finite.append(flags)
            self.positions[batch.position["stream"]] = batch.position
        with phase("optimizer"):
            norm, skipped = self.gradient_step(list(self.model.parameters()))
            task.update(self.model, parallel.sum(statistics), skipped)
            if self.ema is not None:
                self.ema.update(self.step + 1)
        self.interval.add_step(norm, skipped)
        self.step += 1
        self.non_finite_streak.add(self.step, self.gradient_step.failed(norm), torch.stack(not_finite).amax(0))

    @property
    def epoch(self) -> int:
        """The epoch of the last step."""
        return max(self.step - 1, 0) // self.steps_per_epoch

    def _wrapped_model(self, frozen: bool) -> nn.Module:
        """Return the wrapped model, which is wrapped anew when the frozen phase begins or ends."""
        if self._wrapped is None or frozen != self._frozen:
            self.task.set_trainable(self.model, frozen)
            self._wrapped, self._frozen = self.parallel.wrap(self.model), frozen
        return self._wrapped


def seed_batch(seed: int, batch: int) -> None:
    """Seed the model's random draws (order of modalities, stochastic depth) by the global number of the micro-batch."""
    torch.manual_seed(int(generator(seed, "model", batch).integers(2**63)))
