"""Losses on the validation sets: always on the same inputs, whatever the number of processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourm.train.device import DeviceOptions, autocast
from fourm.train.metrics import Counts
from fourm.train.options import RunOptions
from fourm.train.parallel import Strategy
from fourm.train.task import Evaluation, Task, add
from fourm.train.waiting import Waiting
from fourm.utils.errors import DataError
from fourm.utils.options import option


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(RunOptions, DeviceOptions):
    """Evaluation"""

    eval_freq: int = option("evaluate every so many epochs; 0 = never", 1, at_least=0)
    step_eval: bool = option("eval_freq counts optimizer steps instead of epochs", False)
    dist_eval: bool = option("split the validation sets over the ranks", True)


@dataclass(frozen=True)
class Results:
    """What an evaluation has found.

    Attributes:
        loss: As :meth:`Task.evaluation_loss` makes it.
        losses: Loss → its mean over its targets; of 4M the modalities' cross-entropies.
        targets: All of them; of 4M tokens.
        bad_samples: By data set and reason.
        missing: Modality → the share of samples without it, if samples may lack something.
        metrics: As :meth:`Task.evaluation_metrics` makes them.
        pictures: Some of those of this process, (3, h, w) each.
    """

    loss: float
    losses: dict[str, float]
    targets: int
    samples: int
    bad_samples: dict[str, int]
    missing: dict[str, float]
    metrics: dict[str, float]
    pictures: list[Tensor]

    def line(self) -> dict[str, Any]:
        """For ``log.jsonl``, where the losses of an evaluation are called ``per_modality`` and the targets ``tokens``."""
        return {
            "loss": self.loss, "per_modality": self.losses, "tokens": self.targets, "samples": self.samples,
            "bad_samples": self.bad_samples, "missing": self.missing,
        } | ({"metrics": self.metrics} if self.metrics else {})  # fmt: skip


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    evaluation: Evaluation,
    options: EvaluationOptions,
    parallel: Strategy,
    waiting: Waiting,
) -> Results:
    """Go through a validation set once.

    Every target counts the same, so that neither the batch size nor the number of processes matters.

    Raises:
        DataError: there is nothing to predict.
        Stopped: a process was told to stop.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(options.seed)
    sums, counts, statistics = Counter[str](), Counts(), dict[str, Tensor]()
    pictures: list[Tensor] = []
    try:
        for batch in parallel.in_step(waiting.all_of(evaluation.loader), model):
            inputs = evaluation.prepare(model, batch, parallel.device, generator)
            with autocast(options, parallel.device):
                found = task.loss(model, inputs)
            if batch is None:
                continue
            means, statistics = found.means, add(statistics, found.statistics)
            if found.pictures is not None:
                pictures += found.pictures[: task.num_pictures - len(pictures)].cpu().unbind()
            values = torch.stack([mean.double() for mean in means.values()]).tolist()
            sums.update({name: value * inputs.targets.get(name, 0) for name, value in zip(means, values, strict=True)})  # type: ignore[misc]
            counts.add_batch(inputs, batch.position)
    finally:
        model.train(was_training)
    if options.dist_eval:
        shares = parallel.gather((sums, counts, {name: value.cpu() for name, value in statistics.items()}))
        sums, counts, statistics = Counter(), Counts(), {}
        for other_sums, other_counts, other_statistics in shares:
            sums.update(other_sums)
            counts.add(other_counts)
            statistics = add(statistics, other_statistics)
    targets = {name: count for name, count in counts.targets.items() if count}
    if not targets:
        raise DataError(
            f"validation set {evaluation.dataset}: {counts.samples} samples could be read, but there are no targets"
        )
    losses = {name: sums[name] / targets[name] for name in sorted(targets)}
    return Results(
        loss=task.evaluation_loss(sums, dict(sorted(targets.items()))),
        losses=losses,
        targets=sum(targets.values()),
        samples=counts.samples,
        bad_samples=dict(counts.bad),
        missing=counts.missing,
        metrics=task.evaluation_metrics(statistics),
        pictures=pictures,
    )
