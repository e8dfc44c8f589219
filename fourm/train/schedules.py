"""The length of a run and its phases, and the learning rate and weight decay at each micro-batch.

Quantities "in batches" count micro-batches of one rank, as the learning rate schedule does (paper section 2.3 and the
appendix on training details give their values in tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fourm.train.options import Commands
from fourm.utils.config import convert
from fourm.utils.errors import UserError
from fourm.utils.options import option


@dataclass(frozen=True, kw_only=True)
class LengthOptions(Commands):
    """Batches and length"""

    # As in the published YAML files, -1 means "not set".

    batch_size: int = option("samples per rank and micro-batch", 128, at_least=1, at_most=10**6)
    accum_iter: int = option("micro-batches per optimizer step", 1, at_least=1, at_most=10**6)
    epochs: int = option("epochs of epoch_size samples; or set total_tokens", -1, at_least=0, unset=-1, at_most=10**9)
    total_tokens: float = option(
        "billions of input + target tokens; or set epochs", -1.0, at_least=0, unset=-1, at_most=1e9
    )
    epoch_size: int = option("samples per epoch", 10_000_000, at_least=1, at_most=10**15, fixed=True)

    @property
    def tokens_per_sample(self) -> int:
        """Number of input and target tokens of a sample; 0 for a task that does not count tokens."""
        return 0

    def check(self) -> None:
        if (self.epochs >= 0) == (self.total_tokens >= 0) and not self.eval:
            problem = ", not both: leave one at -1" if self.epochs >= 0 else " (neither is set)"
            raise UserError(f"set either 'epochs' or 'total_tokens'{problem}")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(LengthOptions):
    """Learning rate and weight decay"""

    blr: float = option("learning rate per 256 samples", 1e-4, at_least=0, fixed=True)
    min_blr: float = option("final learning rate per 256 samples", 0.0, at_least=0, fixed=True)
    frozen_model_blr: float = option(
        "learning rate per 256 samples of the frozen phase (default: blr)", -1.0, at_least=0, unset=-1, fixed=True
    )
    weight_decay: float = option("weight decay of everything except norms and biases", 0.05, at_least=0, fixed=True)
    weight_decay_end: float | None = option(
        "final weight decay of a cosine schedule (default: constant weight decay)", None, at_least=0, fixed=True
    )
    scheduler: str = option(
        "cosine; inverse_sqrt-T with T in batches; or wsd: warm-up, stable, and decay in the cool-down",
        "cosine",
        fixed=True,
    )
    warmup_epochs: int = option(
        "linear warm-up; set at most one of the three", -1, at_least=0, unset=-1, at_most=10**9, fixed=True
    )
    warmup_steps: int = option("warm-up in batches", -1, at_least=0, unset=-1, at_most=10**15, fixed=True)
    warmup_tokens: float = option("warm-up in billions of tokens", -1.0, at_least=0, unset=-1, at_most=1e9, fixed=True)
    cooldown_epochs: int = option(
        "linear cool-down of inverse_sqrt and wsd; set at most one of the three",
        -1,
        at_least=0,
        unset=-1,
        at_most=10**9,
        fixed=True,
    )
    cooldown_steps: int = option("cool-down in batches", -1, at_least=0, unset=-1, at_most=10**15, fixed=True)
    cooldown_tokens: float = option(
        "cool-down in billions of tokens", -1.0, at_least=0, unset=-1, at_most=1e9, fixed=True
    )
    frozen_model_epochs: int = option(
        "first train only the embeddings for this many epochs", 0, at_least=0, unset=-1, at_most=10**9, fixed=True
    )
    frozen_model_tokens: float = option(
        "the same in billions of tokens", 0.0, at_least=0, unset=-1, at_most=1e9, fixed=True
    )

    def check(self) -> None:
        for phase in ("warmup", "cooldown"):
            given = [key for key in _lengths(phase) if getattr(self, key) >= 0]
            if len(given) > 1:
                raise UserError(f"set only one of {' and '.join(given)}; leave the others at -1")
        if self.frozen_model_epochs > 0 and self.frozen_model_tokens > 0:
            raise UserError("set only one of frozen_model_epochs and frozen_model_tokens")
        timescale = inverse_sqrt_timescale(self.scheduler)
        if timescale == math.inf and not any(getattr(self, key) > 0 for key in _lengths("cooldown")):
            raise UserError(f"'scheduler' wsd needs a cool-down: set one of {', '.join(_lengths('cooldown'))}")


def _lengths(phase: str) -> list[str]:
    return [f"{phase}_{unit}" for unit in ("epochs", "steps", "tokens")]


def inverse_sqrt_timescale(scheduler: str) -> float | None:
    """Return T of ``inverse_sqrt-T``, infinity for ``wsd``, or None for ``cosine``."""
    if scheduler == "cosine":
        return None
    if scheduler == "wsd":
        return math.inf
    name, _, timescale = scheduler.partition("-")
    where = "'scheduler' must be cosine, wsd, or inverse_sqrt-T (T in batches, above 0)"
    if name != "inverse_sqrt":
        raise UserError(f"{where}, not {scheduler!r}")
    try:
        value = convert(timescale or 10_000, float, "T")
    except UserError as error:
        raise UserError(f"{where}, not {scheduler!r}") from error
    if value <= 0:
        raise UserError(f"{where}, not {scheduler!r}")
    return value


@dataclass(frozen=True)
class RunLength:
    """The length of a run and its phases, in micro-batches of one rank unless the name says otherwise."""

    epochs: int
    batches_per_epoch: int
    total_batches: int
    frozen_batches: int
    warmup_batches: int
    cooldown_batches: int


def run_length(options: ScheduleOptions, world_size: int) -> RunLength:
    """Convert tokens and epochs to micro-batches, with the arithmetic of the published runs.

    An epoch ends with a whole optimizer step: its number of micro-batches is rounded down to a multiple of
    ``accum_iter``.

    Raises:
        UserError: The run is too short or too long, or counts tokens although its task does not.
    """
    samples = options.batch_size * world_size
    per_epoch = options.epoch_size // (samples * options.accum_iter) * options.accum_iter
    if per_epoch == 0 and options.eval:
        per_epoch = 1  # an evaluation needs no epochs
    if per_epoch == 0:
        raise UserError(
            f"'epoch_size' {options.epoch_size} is smaller than one optimizer step of batch_size {options.batch_size} "
            f"x accum_iter {options.accum_iter} x {world_size} processes; lower batch_size or raise epoch_size"
        )

    def tokens_per_sample() -> int:
        if not options.tokens_per_sample:
            raise UserError(
                "this task does not count tokens; set the length of the run and its phases in epochs or steps"
            )
        return options.tokens_per_sample

    def epochs_of(billions: float) -> int:
        return math.ceil(billions * 1e9 / (tokens_per_sample() * options.epoch_size))

    def batches_of(phase: str) -> int:
        in_epochs, in_steps, in_tokens = (getattr(options, key) for key in _lengths(phase))
        if in_tokens >= 0:
            return math.ceil(in_tokens * 1e9 / (tokens_per_sample() * samples))
        return max(in_steps, in_epochs * per_epoch, 0)

    epochs = epochs_of(options.total_tokens) if options.total_tokens >= 0 else max(options.epochs, 0)
    frozen = (
        epochs_of(options.frozen_model_tokens)
        if options.frozen_model_tokens > 0
        else max(options.frozen_model_epochs, 0)
    )
    if epochs * options.epoch_size >= 2**62:
        raise UserError(
            f"the run is too long: {epochs} epochs of 'epoch_size' {options.epoch_size} samples; lower one of them"
        )
    length = RunLength(
        epochs, per_epoch, epochs * per_epoch, frozen * per_epoch, batches_of("warmup"), batches_of("cooldown")
    )
    fixed = length.frozen_batches + length.warmup_batches + length.cooldown_batches
    if fixed > length.total_batches and not options.eval:
        raise UserError(
            f"the frozen, warm-up and cool-down phases need {fixed} batches, but the run has only "
            f"{length.total_batches}; shorten them or raise epochs or total_tokens"
        )
    return length


def _cosine(start: float, end: float, done: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay at each micro-batch of the run.

    The learning rate is constant in the frozen phase, and then rises linearly from 0 in the warm-up. After this it
    follows a cosine to ``min_lr``, or ``peak_lr / sqrt(1 + t / T)`` and a linear cool-down to ``min_lr``.
    """

    length: RunLength
    peak_lr: float
    min_lr: float
    frozen_lr: float
    timescale: float | None
    weight_decay_start: float
    weight_decay_end: float

    def frozen(self, batch: int) -> bool:
        """Whether only the embeddings are trained."""
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
        value = self.peak_lr / math.sqrt(1 + min(batch, plateau) / self.timescale)
        if batch < plateau:
            return value
        return value + (self.min_lr - value) * (batch - plateau) / max(1, cooldown - 1)

    def weight_decay(self, batch: int) -> float:
        return _cosine(self.weight_decay_start, self.weight_decay_end, batch / max(1, self.length.total_batches))


def build_schedule(options: ScheduleOptions, length: RunLength, world_size: int) -> Schedule:
    """Scale the learning rates with the global batch size: lr = blr · batch_size · accum_iter · world_size / 256."""
    scale = options.batch_size * options.accum_iter * world_size / 256
    frozen_blr = options.frozen_model_blr if options.frozen_model_blr >= 0 else options.blr
    return Schedule(
        length=length,
        peak_lr=options.blr * scale,
        min_lr=options.min_blr * scale,
        frozen_lr=frozen_blr * scale,
        timescale=inverse_sqrt_timescale(options.scheduler),
        weight_decay_start=options.weight_decay,
        weight_decay_end=options.weight_decay if options.weight_decay_end is None else options.weight_decay_end,
    )
