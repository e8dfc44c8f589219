"""The interface of a task: its model, batches, loss and evaluations. Everything else belongs to the run.

To train something new, write a subclass of :class:`Task`, a configuration that inherits from
:class:`fourm.train.config.RunConfig`, and an entry script with ``run_cli(lambda: main(MyTask, DDP))``
(:func:`fourm.train.run.main`). :mod:`fourm.train.tasks.pretrain` trains 4M.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from fourm.data.batch_loader import BatchLoader
from fourm.models.model_card import Tables
from fourm.utils.checkpoints import ModelFormat
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.options import Options

Config = TypeVar("Config", bound=Options)


@dataclass(frozen=True)
class Inputs:
    """A batch on its device, and its counts, which the host knows without asking the device.

    Attributes:
        values: The inputs of :meth:`Task.loss`.
        targets: The number of targets of each loss, by the name of the loss.
        samples: The number of samples.
        tokens: The number of tokens, for the throughput; 0 if the task has none.
        flops: The number of operations of the model in the forward and backward pass; 0 if it is not known.
    """

    values: Any
    targets: Mapping[str, int]
    samples: int
    tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Losses:
    """The result of a forward pass.

    Attributes:
        total: The scalar to minimise, a mean over the micro-batch.
        means: The mean of each loss over its targets, by the name of the loss.
        statistics: Tensors whose sums over the micro-batches and processes of a step are passed to :meth:`Task.update`.
            All micro-batches have the same names and shapes. Those of an evaluation are for
            :meth:`Task.evaluation_metrics`.
        pictures: Pictures of an evaluation to look at, (B, 3, h, w) in [0, 1].
    """

    total: Tensor
    means: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    pictures: Tensor | None = None


@dataclass(frozen=True)
class Evaluation:
    """One way to evaluate one data set.

    Attributes:
        dataset: The name of the data set.
        kind: A name that distinguishes several evaluations of the same data set. All of them are validation losses: in
            4M, ``train`` stands for the token budgets of training, and ``fixed`` for fixed ones.
        loader: The batches of this process.
        prepare: A function like :meth:`Task.prepare`, with a generator that is seeded in the same way for each
            evaluation. The batch is None if this rank has run out of batches but must still take part in the collective
            operations of the forward pass.
    """

    dataset: str
    kind: str
    loader: BatchLoader
    prepare: Callable[[nn.Module, Any, torch.device, torch.Generator], Inputs]


@dataclass(frozen=True)
class StepCost:
    """The cost of a micro-batch on one device, derived from the shapes.

    Attributes:
        flops: The number of operations of the forward and backward pass.
        activations: The bytes that are kept for the backward pass.
    """

    flops: float
    activations: float


def add(sums: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add two dictionaries of tensors by name; an empty one counts as zeros."""
    return {name: sums[name] + value if sums else value for name, value in more.items()} or dict(sums)


class Task(ABC, Generic[Config]):
    """Something that can be trained. Each process of a run has its own object.

    Attributes:
        name: The name of the task in checkpoints.
        config_class: The class of its configuration.
        format: How its models are built from a checkpoint.
        losses: The names of the losses, as in :attr:`Losses.means`.
        num_pictures: The number of pictures that are kept of an evaluation.
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
        """Build the model on the meta device.

        The method ``init_weights`` of the model must initialise all parameters and buffers with torch's global
        generator. Its attribute ``config`` must be a dictionary for JSON, from which :attr:`format` builds the model
        again. If evaluations call other methods of the model than ``forward``, its ``forward_methods`` must name them.
        """

    @property
    def model_name(self) -> str:
        """The name of the model in messages."""
        return "the model"

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the repeated blocks of the model."""

    def compile(self, model: nn.Module, **options: Any) -> None:
        """Compile the model block by block, so that each kind of block is compiled once.

        Args:
            options: Go to ``torch.compile``.
        """
        for block in self.blocks(model):
            block.compile(**options)

    def parts(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules whose parameters FSDP shards and gathers together; each must be used as a whole."""
        return self.blocks(model)

    def changing_buffers(self, model: nn.Module) -> list[str]:
        """Return the names of the buffers that :meth:`update` changes."""
        return []

    def set_trainable(self, model: nn.Module, frozen: bool) -> None:
        """Choose the parameters to train, in the ``frozen`` phase at the beginning of a run or after it."""
        if frozen:
            raise UserError(
                f"the task {self.name} has no frozen phase; remove frozen_model_epochs and frozen_model_tokens"
            )

    def count_parameters(self, model: nn.Module) -> dict[str, int]:
        """Return the number of parameters by group. FSDP with ZeRO-3 keeps the last group gathered for a whole step."""
        total = sum(parameter.numel() for parameter in model.parameters())
        in_blocks = sum(parameter.numel() for block in self.blocks(model) for parameter in block.parameters())
        return {"blocks": in_blocks, "rest": total - in_blocks}

    def describe(self) -> None:
        """Log the model and the data."""

    def select_weights(self, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of the ``weights`` that ``finetune`` names, by the names of the model, those that the model starts from.

        Args:
            own: The model's own.
        """
        return weights

    # A step

    @abstractmethod
    def train_batches(
        self,
        rank: int,
        world_size: int,
        batches_per_epoch: int,
        start_batch: int,
        draws_by_stream: Mapping[int, int],
        pin_memory: bool,
    ) -> BatchLoader:
        """Return the endless training batches of one rank.

        Each batch has a ``position``, a :class:`fourm.data.unified_datasets.Position`.

        Args:
            start_batch: The number of the first micro-batch in the run.
            draws_by_stream: The number of draws that were made in the epoch of ``start_batch``; none by streams that
                are absent.
        """

    def updates(self, step: int) -> int:
        """Return the number of updates of a step, counted from 0: 1, except during a batch-size warm-up."""
        return 1

    @abstractmethod
    def prepare(self, model: nn.Module, batch: Any, device: torch.device) -> Inputs:
        """Copy a batch to the device. Neither this nor :meth:`loss` may wait for the device."""

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Inputs) -> Losses:
        """Do the forward pass. ``model`` may be wrapped, so that it can only be called."""

    def update(self, model: nn.Module, statistics: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Update buffers in place with the statistics of a step, after the optimizer.

        Args:
            statistics: The sums of :attr:`Losses.statistics` over the micro-batches and processes of the step.
            skipped: 1 on the device if the step is skipped and nothing must change, otherwise 0.
        """

    # Everything around the steps

    def evaluations(self, rank: int, world_size: int, is_main: bool) -> list[Evaluation]:
        """Return the evaluations, with the share of the batches that rank ``rank`` of ``world_size`` evaluates."""
        return []

    def evaluation_loss(self, sums: Mapping[str, float], targets: Mapping[str, int]) -> float:
        """Compute the loss of an evaluation from the sums of the losses that had targets: the mean of their means."""
        return sum(sums[name] / targets[name] for name in targets) / len(targets)

    def evaluation_metrics(self, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures that are no means over samples, from the sums of :attr:`Losses.statistics` over an evaluation."""
        return {}

    def identity(self) -> dict[str, dict[str, Any]]:
        """Return facts for JSON that must not change when a run resumes; an evaluation may have other ``data``."""
        return {"data": {}}

    def facts(self) -> Tables:
        """Return what the card of a published model says about its data, without paths."""
        return {}

    def step_cost(self, model: nn.Module) -> StepCost:
        """Return the cost of a micro-batch for ``--plan``, without data."""
        return StepCost(0.0, 0.0)


_TASKS: dict[str, type[Task]] = {}


def task_named(name: str) -> type[Task]:
    """Return the imported task with this name.

    Raises:
        UserError: There is no such task.
    """
    if name not in _TASKS:
        raise UserError(
            f"unknown task '{name}'{did_you_mean(name, _TASKS)}; if a module of yours defines it, import it with "
            "--plugin"
        )
    return _TASKS[name]
