"""Statistics of a logging interval, which stay on the device: only a line of the log waits for it, never a step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from fourm.data.unified_datasets import Position
from fourm.train.device import peak_memory
from fourm.train.parallel import Processes
from fourm.train.task import Inputs, Losses


@dataclass
class Counts:
    """Counts that the host keeps.

    Attributes:
        batches: The number of micro-batches; a part of one counts by its share of the samples.
        flops: The number of operations of the model.
        targets: The number of targets of each loss; in 4M the target tokens of a modality.
        seconds: The time of each phase of a step.
        bad: The number of samples that could not be used, by data set and reason.
        without, all_samples: The number of samples without a modality, and of all samples, by modality, in the data
            sets whose samples may lack one.
    """

    batches: float = 0
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0
    targets: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    without: Counter[str] = field(default_factory=Counter)
    all_samples: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        for item in dataclasses.fields(self):
            own, more = getattr(self, item.name), getattr(other, item.name)
            if isinstance(own, Counter):
                own.update(more)
            else:
                setattr(self, item.name, own + more)

    def add_batch(self, inputs: Inputs, position: Position) -> None:
        """Count what a batch has; :class:`Interval` counts the batches."""
        self.samples += inputs.samples
        self.tokens += inputs.tokens
        self.flops += inputs.flops
        self.targets.update(inputs.targets)
        self.bad.update(position["skipped"])
        for name, (lacking, total) in position["missing"].items():
            self.without[name] += lacking
            self.all_samples[name] += total

    @property
    def missing(self) -> dict[str, float]:
        """The share of samples without a modality, by modality."""
        return {name: self.without[name] / self.all_samples[name] for name in sorted(self.all_samples)}

    def state(self) -> dict[str, Any]:
        """Return the counts for JSON."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Counts:
        """Restore counts from :meth:`state`, or from the flat form of earlier versions."""
        counts = cls()
        if "targets" in state:
            for name, value in state.items():
                setattr(counts, name, Counter(value) if isinstance(value, Mapping) else value)
            return counts
        counters = {
            "targets": counts.targets,
            "seconds": counts.seconds,
            "without": counts.without,
            "samples": counts.all_samples,
        }
        for key, value in state.items():
            name, _, rest = key.partition(" ")
            if rest:
                counters[name][rest] = value
            else:
                setattr(counts, name, value)
        return counts


@dataclass(frozen=True)
class IntervalMeans:
    """The means of a logging interval over all processes.

    Attributes:
        loss: The mean total loss, in which all samples weigh alike.
        losses: The mean of each loss over its targets; in 4M the cross-entropy of each modality.
        not_finite: The share of the targets of a loss where it was not finite, for losses where this is not 0.
        samples_per_second, tokens_per_second: The throughput of all processes.
        tflops: 10¹² operations of the model per second and process.
        mfu: The share of the device's peak that ``tflops`` is; None if the peak is not known.
        data_wait: The share of the time spent waiting for data.
        seconds: The time of each phase of a step, as a mean over processes.
        peak_memory: Bytes, of the process that uses the most.
        bad_samples: The number of samples that could not be used, by data set and reason.
        missing: The share of samples without a modality, by modality, in the data sets whose samples may lack one.
    """

    loss: float
    losses: dict[str, float]
    not_finite: dict[str, float]
    grad_norm: float
    skipped_steps: int
    samples_per_second: float
    tokens_per_second: float
    tflops: float
    mfu: float | None
    data_wait: float
    seconds: dict[str, float]
    peak_memory: int
    bad_samples: dict[str, int]
    missing: dict[str, float]

    def line(self) -> dict[str, Any]:
        """Return the means for ``log.jsonl``, without ``mfu`` and ``not_finite`` if there are none."""
        values = dataclasses.asdict(self)
        return {
            name: value
            for name, value in values.items()
            if name not in ("mfu", "not_finite") or value not in (None, {})
        }


class Interval:
    """Statistics of this process since the last line of the log.

    Args:
        losses: Names of the losses that a batch has in addition to the total loss.
        batch_size: The number of samples of a micro-batch, whose parts count by their share of it.
        peak_tflops: 10¹² operations per second that the device can do; None if this is not known.
    """

    def __init__(self, losses: Sequence[str], batch_size: int, device: torch.device, peak_tflops: float | None = None):
        self._batch_size, self._device, self._peak_tflops = batch_size, device, peak_tflops
        self._losses = list(losses)
        # Total loss, gradient norm, skipped steps, and each of the losses.
        self._sums = torch.zeros(3 + len(self._losses), dtype=torch.float64, device=device)
        # The number of batches where the total loss, and of targets where each of the losses was not finite.
        self._left_out = torch.zeros(1 + len(self._losses), dtype=torch.float64, device=device)
        self._counts = Counts()
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    def add_batch(self, losses: Losses, inputs: Inputs, position: Position) -> Tensor:
        """Count a micro-batch or a part of one.

        Returns:
            (losses,) 1 where a loss was not finite, otherwise 0. Such losses are left out of the means.
        """
        values = torch.stack([losses.total, *(losses.means[name] for name in self._losses)]).detach()
        finite = values.isfinite()
        share = inputs.samples / self._batch_size
        weights = [share, *(inputs.targets.get(name, 0) for name in self._losses)]
        not_finite = (~finite).float()
        sums = _weighted(torch.where(finite, values, 0), weights)
        self._sums[0] += sums[0]
        self._sums[3:] += sums[1:]
        self._left_out += _weighted(not_finite, weights)
        self._counts.batches += share
        self._counts.add_batch(inputs, position)
        return not_finite[1:]

    def add_step(self, norm: Tensor, skipped: Tensor) -> None:
        """Count an update, which is a step except in a batch-size warm-up; the norm of a skipped one is left out."""
        self._sums[1] += torch.where(skipped > 0, 0, norm)
        self._sums[2] += skipped
        self._counts.steps += 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase ``name``, which a profile shows too.

        On a GPU it is the time between two events in its queue, which are read when the time is logged.
        """
        if self._device.type != "cuda":
            with self.host_phase(name):
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with record_function(name):
            yield
        end.record()
        self._events.append((name, begin, end))

    @contextlib.contextmanager
    def host_phase(self, name: str, paused: bool = False) -> Iterator[None]:
        """Do the same for work of the host alone.

        Args:
            paused: Whether to exclude the time from the interval, whose samples per second are those of training.
        """
        if paused and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the work that is already queued belongs to the training
        start = time.perf_counter()
        with record_function(name):
            yield
        seconds = time.perf_counter() - start
        self._counts.seconds[name] += seconds  # type: ignore[assignment]
        if paused:
            self._start += seconds

    def _read_events(self) -> None:
        """Add the times between the events, after waiting for the last of them."""
        for name, begin, end in self._events:
            end.synchronize()
            self._counts.seconds[name] += begin.elapsed_time(end) / 1000  # type: ignore[assignment]
        self._events.clear()

    def means(self, parallel: Processes) -> IntervalMeans:
        """Return the means over all processes, and start a new interval."""
        self._read_events()
        sums, left_out = [0.0] * len(self._sums), [0.0] * len(self._left_out)
        total, memory = Counts(), 0
        own = self._sums.tolist(), self._left_out.tolist(), self._counts, peak_memory(self._device)
        for other_sums, other_left_out, counts, peak in parallel.gather(own):
            sums = [value + other for value, other in zip(sums, other_sums, strict=True)]
            left_out = [value + other for value, other in zip(left_out, other_left_out, strict=True)]
            total.add(counts)
            memory = max(memory, peak)
        seconds = time.perf_counter() - self._start
        self._sums.zero_()
        self._left_out.zero_()
        self._counts, self._start = Counts(), time.perf_counter()
        tflops = total.flops / seconds / parallel.world_size / 1e12
        phases = {name: value / parallel.world_size for name, value in total.seconds.items()}
        losses, not_finite = {}, {}
        for name, value, missed in zip(self._losses, sums[3:], left_out[1:], strict=True):
            if count := total.targets[name]:
                losses[name] = _mean(value, count - missed)
                not_finite[name] = missed / count
        skipped = sums[2]
        return IntervalMeans(
            loss=_mean(sums[0], total.batches - left_out[0]),
            losses=losses,
            not_finite={name: share for name, share in not_finite.items() if share},
            grad_norm=sums[1] / max(total.steps - skipped, 1),
            skipped_steps=round(skipped / parallel.world_size),
            samples_per_second=total.samples / seconds,
            tokens_per_second=total.tokens / seconds,
            tflops=tflops,
            mfu=tflops / self._peak_tflops if self._peak_tflops else None,
            data_wait=phases.get("data_wait", 0) / seconds,
            seconds=phases,
            peak_memory=memory,
            bad_samples=dict(total.bad),
            missing=total.missing,
        )

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, with which a resumed run logs the same means."""
        self._read_events()
        seconds = time.perf_counter() - self._start
        return {
            "sums": self._sums.tolist(),
            "left_out": self._left_out.tolist(),
            "counts": self._counts.state(),
            "seconds": seconds,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        if "left_out" in state:  # earlier versions did not write it
            self._left_out.copy_(torch.tensor(state["left_out"], dtype=torch.float64))
        self._counts = Counts.from_state(state["counts"])
        if "bad" in state:  # earlier versions wrote it here
            self._counts.bad = Counter(state["bad"])
        self._start = time.perf_counter() - state["seconds"]


def _weighted(values: Tensor, weights: Sequence[float]) -> Tensor:
    """Multiply values by weights in one kernel, without copying the weights to the device."""
    return torch.stack(torch._foreach_mul(values.unbind(), [float(weight) for weight in weights]))


def _mean(total: float, count: float) -> float:
    """Return the mean, or NaN if ``count`` is 0."""
    return total / count if count else math.nan
