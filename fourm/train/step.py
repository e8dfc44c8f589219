"""A training step: the same one for all tasks, strategies, devices and precisions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from fourm.data.unified_datasets import Position
from fourm.train.batch_warmup import divide
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
        self.interval = Interval(task.losses, config.batch_size, device, peak_tflops(config, device))
        self.non_finite_streak = NonFiniteStreak(task.losses, config.max_skipped_steps, device)
        self._wrapped: nn.Module | None = None
        self._frozen: bool | None = None

    def train_step(self, batches: list[Any]) -> None:
        """Do one optimizer step: forward and backward pass of every micro-batch, clipping, update, and statistics.

        In a batch-size warm-up, a step is several updates with parts of its batch.

        Args:
            batches: The micro-batches of this rank for one optimizer step.
        """
        set_hyperparameters(self.optimizer, **self.rates(self.step))
        wrapped = self._wrapped_model(self.schedule.frozen(self._first_batch))
        parts = divide(batches, self.task.updates(self.step))
        outcomes = [self._update(wrapped, part, number) for number, part in enumerate(parts)]
        failed, not_finite = (torch.stack(flags) for flags in zip(*outcomes, strict=True))
        if self.ema is not None:
            with self.interval.phase("optimizer"):
                self.ema.update(self.step + 1)
        self.step += 1
        # A step fails if none of its updates succeeds.
        self.non_finite_streak.add(self.step, failed.amin(0), not_finite.amax(0))

    def rates(self, step: int) -> dict[str, float]:
        """Return the ``lr`` and ``weight_decay`` of a step, counted from 0."""
        first = step * self.config.accum_iter
        lr = self.schedule.lr(first) / math.sqrt(self.task.updates(step))
        return {"lr": lr, "weight_decay": self.schedule.weight_decay(first)}

    @property
    def _first_batch(self) -> int:
        """The number of the first micro-batch of the next step."""
        return self.step * self.config.accum_iter

    def _update(self, wrapped: nn.Module, batches: list[Any], number: int) -> tuple[Tensor, Tensor]:
        """Update the weights.

        Args:
            batches: Micro-batches or parts of them.
            number: The number of the update in its step.

        Returns:
            1 if the loss or gradient norm was not finite, otherwise 0; and the same for each loss of this process.
        """
        config, task, parallel, phase = self.config, self.task, self.parallel, self.interval.phase
        statistics: dict[str, Tensor] = {}
        not_finite: list[Tensor] = []
        for index, batch in enumerate(batches):
            seed_batch(config.seed, (self._first_batch + index) * parallel.world_size + parallel.rank, number)
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
        self.interval.add_step(norm, skipped)
        return self.gradient_step.failed(norm), torch.stack(not_finite).amax(0)

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


def seed_batch(seed: int, batch: int, update: int) -> None:
    """Seed the model's random draws (order of modalities, stochastic depth).

    Args:
        batch: The number of the micro-batch in the run, over all processes. Each update of a step counts from that of
            the first one.
        update: The number of the update in its step.
    """
    key = (batch, update) if update else (batch,)  # the first update has the draws of earlier versions
    torch.manual_seed(int(generator(seed, "model", *key).integers(2**63)))
