"""What a training run asks of a task: the model, the batches, the loss, the evaluations. All else belongs to the run.

To train something new, write a subclass of :class:`Task` with a configuration that inherits from
:class:`fourm.train.config.RunConfig`, and an entry script with ``run_cli(lambda: main(MyTask, DDP))``
(:func:`fourm.train.run.main`). :mod:`fourm.train.tasks.pretrain` is the training of 4M.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from fourm.data.batch_loader import BatchLoader
from fourm.utils.checkpoints import ModelFormat
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.options import Options

Config = TypeVar("Config", bound=Options)


@dataclass(frozen=True)
class Inputs:
    """A batch on its device, and what the host knows of it.

    Attributes:
        values: What :meth:`Task.loss` reads.
        targets: Loss → the number of targets that it is a mean over.
        tokens: For tokens per second; 0 where there are none.
        flops: Operations of the model's forward and backward pass; 0 if they are not known.
    """

    values: Any
    targets: Mapping[str, int]
    samples: int
    tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Losses:
    """What a forward pass results in.

    Attributes:
        total: What is minimised, a mean over the micro-batch.
        means: Loss → its mean over its targets.
        statistics: Tensors whose sums over the micro-batches and processes of a step :meth:`Task.update` gets. All
            micro-batches have the same ones. Those of an evaluation are for :meth:`Task.evaluation_metrics`.
        pictures: Of an evaluation, to be looked at: (B, 3, h, w) in [0, 1].
    """

    total: Tensor
    means: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    pictures: Tensor | None = None


@dataclass(frozen=True)
class Evaluation:
    """One way to evaluate one data set.

    Attributes:
        kind: Tells ways to evaluate the same data set apart.
        loader: The batches of this process.
        prepare: As :meth:`Task.prepare`, with a generator that every pass seeds alike. A batch that is None stands for an
            empty one: a forward pass in which this process takes part only because the others need it.
    """

    dataset: str
    kind: str
    loader: BatchLoader
    prepare: Callable[[nn.Module, Any, torch.device, torch.Generator], Inputs]


@dataclass(frozen=True)
class StepCost:
    """What a micro-batch takes on one device, from the shapes alone.

    Attributes:
        flops: Operations of forward and backward pass.
        activations: Bytes that are kept for the backward pass.
    """

    flops: float
    activations: float


def add(sums: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``sums`` with ``more`` of the same names added; empty ones are sums of nothing."""
    return {name: sums[name] + value if sums else value for name, value in more.items()} or dict(sums)


class Task(ABC, Generic[Config]):
    """Something that can be trained. An object belongs to one process of one run.

    Attributes:
        name: Of the task, in checkpoints.
        config_class: Its options.
        format: How its models are built from what a checkpoint holds.
        losses: Names of the losses, as in :attr:`Losses.means`.
        num_pictures: How many of the pictures of an evaluation are kept.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[Any]]
    format: ClassVar[ModelFormat]
    losses: Sequence[str]
    num_pictures: int = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            _TASKS[cls.name] = cls

    def __init__(self, config: Config):
        self.config = config

    # The model

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model, on the meta device.

        Its ``init_weights`` gives all parameters and buffers their initial values, drawn from torch's global generator. Its
        ``config``, a dictionary for JSON, is what :attr:`format` builds it from. If evaluations call other methods of it than
        ``forward``, its ``forward_methods`` names them.
        """

    @property
    def model_name(self) -> str:
        """For messages: what the configuration calls the model."""
        return "the model"

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated parts of the model, which ``torch.compile`` compiles one by one."""

    def parts(self, model: nn.Module) -> list[nn.Module]:
        """Modules whose parameters FSDP shards and gathers together, each used as a whole."""
        return self.blocks(model)

    def changing_buffers(self, model: nn.Module) -> list[str]:
        """Names of the buffers that :meth:`update` changes."""
        return []

    def set_trainable(self, model: nn.Module, frozen: bool) -> None:
        """Say which parameters are trained, in the ``frozen`` phase at the beginning of a run or after it."""
        if frozen:
            raise UserError(f"the task {self.name} has no frozen phase: leave frozen_model_epochs and _tokens out")

    def count_parameters(self, model: nn.Module) -> dict[str, int]:
        """Group → its parameters. The last group is what is gathered for a whole step under FSDP with ZeRO-3."""
        total = sum(parameter.numel() for parameter in model.parameters())
        in_blocks = sum(parameter.numel() for block in self.blocks(model) for parameter in block.parameters())
        return {"blocks": in_blocks, "rest": total - in_blocks}

    def describe(self) -> None:
        """Log what is trained on what."""

    def select_weights(self, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of the ``weights`` that ``finetune`` names, by the names of the model, those that the model starts from.

        Args:
            own: The model's own.
        """
        return weights

    # A step

    @abstractmethod
    def train_batches(
        self, rank: int, world_size: int, batches_per_epoch: int, start_batch: int, draws: Mapping[int, int] | None,
        pin_memory: bool,
    ) -> BatchLoader:  # fmt: skip
        """The endless training batches of one rank, from micro-batch ``start_batch`` on.

        Each has a ``position``: a dictionary for JSON with ``stream``, ``epoch`` and ``draws``, where its stream of the data
        stands after it (:mod:`fourm.data.unified_datasets`), and with ``skipped`` and ``missing``, see
        :class:`fourm.train.metrics.Counts`.

        Args:
            draws: Stream → draws that were made in the epoch of ``start_batch``; None at the beginning of an epoch.
        """

    @abstractmethod
    def prepare(self, model: nn.Module, batch: Any, device: torch.device) -> Inputs:
        """A batch on its way to the device; nothing here, nor in :meth:`loss`, may wait for the device."""

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Inputs) -> Losses:
        """Forward pass. ``model`` may be wrapped: it can only be called."""

    def update(self, model: nn.Module, statistics: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Change buffers, in place, by what a step has summed up. Called after the optimizer.

        Args:
            statistics: Sums of :attr:`Losses.statistics` over the micro-batches and processes of the step.
            skipped: 1 if the step is skipped, so that nothing must change, otherwise 0; on the device.
        """

    # Around it

    def evaluations(self, rank: int, world_size: int, is_main: bool) -> list[Evaluation]:
        """What is to be evaluated, by rank ``rank`` of ``world_size``."""
        return []

    def evaluation_loss(self, sums: Mapping[str, float], targets: Mapping[str, int]) -> float:
        """The loss of an evaluation, from the sums of those losses that had targets: the mean of their means."""
        return sum(sums[name] / targets[name] for name in targets) / len(targets)

    def evaluation_metrics(self, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures that are no means over samples, from the sums of :attr:`Losses.statistics` over an evaluation."""
        return {}

    def identity(self) -> dict[str, dict[str, Any]]:
        """Facts for JSON that must not change when a run resumes; what is under ``data`` may when a model is evaluated."""
        return {"data": {}}

    def step_cost(self, model: nn.Module) -> StepCost:
        """For ``--plan``; works without data."""
        return StepCost(0.0, 0.0)


_TASKS: dict[str, type[Task]] = {}


def task_named(name: str) -> type[Task]:
    """The task that has this name, of those that are imported.

    Raises:
        UserError: there is none.
    """
    if name not in _TASKS:
        raise UserError(
            f"unknown task '{name}'{did_you_mean(name, _TASKS)}; if a module of your own defines it, name it with --plugin"
        )
    return _TASKS[name]
