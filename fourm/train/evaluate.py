"""Losses on the validation sets, always on the same inputs, whatever the number of processes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourm.train.coordinator import Coordinator
from fourm.train.device import DeviceOptions, autocast
from fourm.train.metrics import Counts
from fourm.train.options import RunOptions
from fourm.train.parallel import Strategy
from fourm.train.task import Evaluation, Task, add
from fourm.utils.errors import DataError
from fourm.utils.options import option


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(RunOptions, DeviceOptions):
    """Evaluation"""

    eval_freq: int = option("epochs between two evaluations; 0 = never evaluate", 1, at_least=0)
    step_eval: bool = option("eval_freq counts optimizer steps instead of epochs", False)
    dist_eval: bool = option("split the validation sets over the ranks", True)


@dataclass(frozen=True)
class Results:
    """The results of an evaluation.

    Attributes:
        loss: The loss that :meth:`Task.evaluation_loss` computes.
        losses: The mean of each loss over its targets, in 4M the cross-entropy of each modality, and the means over
            samples of other metrics of the task.
        targets: The number of all targets; in 4M tokens.
        bad_samples: The number of samples that could not be used, by data set and reason.
        missing: The share of samples without a modality, by modality, where samples may lack one.
        metrics: What :meth:`Task.evaluation_metrics` computes.
        pictures: Some pictures of this process, (3, h, w) each.
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
        """Return the results for ``log.jsonl``, which calls the losses ``per_modality`` and the targets ``tokens``."""
        return {
            "loss": self.loss,
            "per_modality": self.losses,
            "tokens": self.targets,
            "samples": self.samples,
            "bad_samples": self.bad_samples,
            "missing": self.missing,
        } | ({"metrics": self.metrics} if self.metrics else {})


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    evaluation: Evaluation,
    options: EvaluationOptions,
    parallel: Strategy,
    coordinator: Coordinator,
) -> Results:
    """Compute the losses on a validation set.

    Every target has the same weight, so that neither the batch size nor the number of processes matters.

    Raises:
        DataError: There is nothing to predict.
        StopRequested: A process was told to stop.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(options.seed)
    sums: dict[str, float] = defaultdict(float)
    counts, statistics = Counts(), dict[str, Tensor]()
    pictures: list[Tensor] = []
    try:
        for batch in parallel.evaluation_batches(coordinator.iterate(evaluation.loader), model):
            inputs = evaluation.prepare(model, batch, parallel.device, generator)
            with autocast(options, parallel.device):
                result = task.loss(model, inputs)
            if batch is None:
                continue
            means, statistics = result.means, add(statistics, result.statistics)
            if result.pictures is not None:
                pictures += result.pictures[: task.num_pictures - len(pictures)].cpu().unbind()
            values = torch.stack([mean.double() for mean in means.values()]).tolist()
            for name, value in zip(means, values, strict=True):
                sums[name] += value * inputs.targets.get(name, 0)
            counts.add_batch(inputs, batch.position)
    finally:
        model.train(was_training)
    if options.dist_eval:
        shares = parallel.gather((sums, counts, {name: value.cpu() for name, value in statistics.items()}))
        sums, counts, statistics = defaultdict(float), Counts(), {}
        for rank_sums, rank_counts, rank_statistics in shares:
            statistics = add(statistics, rank_statistics)
            for name, value in rank_sums.items():
                sums[name] += value
            counts.add(rank_counts)
    targets = {name: count for name, count in counts.targets.items() if count}
    if not targets:
        raise DataError(
            f"validation set {evaluation.dataset}: {counts.samples} samples were read, but they have no targets; "
            "check its out_domains and target budgets"
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
