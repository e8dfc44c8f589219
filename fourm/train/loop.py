"""The training loop: one for all strategies, devices and precisions."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fourm.data.unified_datasets import Batch
from fourm.models import FM, StepFlops, TokenPlan
from fourm.train.config import TrainConfig
from fourm.train.device import autocast, peak_tflops, to_device
from fourm.train.ema import EMA
from fourm.train.metrics import Interval
from fourm.train.nonfinite import LostSteps
from fourm.train.optimizer import GradientStep, set_hyperparameters
from fourm.train.parallel import Strategy
from fourm.train.schedules import Schedule
from fourm.utils.seeds import generator


@dataclasses.dataclass
class Trainer:
    """All that an optimizer step needs, and changes.

    Attributes:
        num_input_tokens, num_target_tokens: slots of the encoder and of the decoder.
        step: optimizer steps that are done.
        positions: newest :attr:`Batch.position` of each of this rank's streams.
    """

    config: TrainConfig
    parallel: Strategy
    model: FM
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    num_input_tokens: int
    num_target_tokens: int
    step: int = 0
    positions: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gradient_step = GradientStep(self.optimizer, self.config, self.parallel)
        self.ema = EMA(self.model, self.config.model_ema_decay) if self.config.model_ema else None
        device = self.parallel.device
        modalities = list(self.model.decoder_embeddings)
        self.interval = Interval(modalities, device, peak_tflops(self.config, device))
        self.lost = LostSteps(modalities, self.config.max_skipped_steps, device)
        self._flops = StepFlops(self.model)
        self._wrapped: nn.Module | None = None
        self._frozen: bool | None = None

    def train_step(self, batches: list[Batch]) -> None:
        """Forward, backward, clip, step, count.

        Args:
            batches: the micro-batches of this rank for one optimizer step.
        """
        config, parallel, phase = self.config, self.parallel, self.interval.phase
        slots = self.num_input_tokens, self.num_target_tokens
        first = self.step * config.accum_iter
        set_hyperparameters(self.optimizer, self.schedule.lr(first), self.schedule.weight_decay(first))
        wrapped = self._model_of_phase(self.schedule.frozen(first))
        not_finite = []
        for index, batch in enumerate(batches):
            seed_of_batch(config.seed, (first + index) * parallel.world_size + parallel.rank)
            with phase("select_and_copy"):
                host_plan = self.model.plan(batch.mod_dict, *slots)
                mod_dict, plan = to_device(batch, host_plan, parallel.device)
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else parallel.accumulate(wrapped):
                with phase("forward"), autocast(config, parallel.device):
                    loss, losses = wrapped(mod_dict, *slots, config.loss_type, plan=plan)
                with phase("backward"):
                    # 0 · loss is 0; or NaN, and with it the gradients, so that all processes skip the step.
                    (loss * (self.gradient_step.scale / len(batches) + 0 * loss.detach())).backward()
            not_finite.append(self._count(batch, host_plan, loss, losses))
        with phase("optimizer"):
            norm, skipped = self.gradient_step(list(self.model.parameters()))
            if self.ema is not None:
                self.ema.update(self.step + 1)
        self.interval.add_step(norm, skipped)
        self.step += 1
        self.lost.add(self.step, self.gradient_step.failed(norm), torch.stack(not_finite).amax(0))

    def _count(self, batch: Batch, plan: TokenPlan, loss: Tensor, losses: dict[str, Tensor]) -> Tensor:
        """Remember a micro-batch for the log, and where its stream of data stands; returns as :meth:`Interval.add_batch`."""
        inputs, targets = plan.encoder.counts, plan.decoder.counts
        samples = len(plan.encoder.modality)
        self.positions[batch.position["stream"]] = batch.position
        return self.interval.add_batch(
            loss, losses, targets, batch.position, samples=samples,
            tokens=sum(inputs.values()) + sum(targets.values()),
            flops=self._flops(samples, self.num_input_tokens, self.num_target_tokens, inputs, targets),
        )  # fmt: skip

    def _model_of_phase(self, frozen: bool) -> nn.Module:
        """The wrapped model; wrapped anew when the frozen phase begins or ends."""
        if self._wrapped is None or frozen != self._frozen:
            set_phase(self.model, frozen, self.config.frozen_embedding_domain)
            self._wrapped, self._frozen = self.parallel.wrap(self.model), frozen
        return self._wrapped


def set_phase(model: FM, frozen: bool, frozen_embedding_domain: str | None) -> None:
    """Train everything or, in the ``frozen`` phase, only the embeddings, less those of ``frozen_embedding_domain``."""
    model.unfreeze_all()
    if frozen and frozen_embedding_domain:
        model.freeze_params_except_specific_embeddings(frozen_embedding_domain)
    elif frozen:
        model.freeze_shared_params()


def seed_of_batch(seed: int, batch: int) -> None:
    """Seed what the model draws (order of modalities, stochastic depth) by the global number of the micro-batch."""
    torch.manual_seed(int(generator(seed, "model", batch).integers(2**63)))
