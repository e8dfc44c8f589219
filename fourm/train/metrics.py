"""Sums over a logging interval. They stay on the device: a step never waits for it, only a line of the log does."""

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

from fourm.train.device import peak_memory
from fourm.train.parallel import Processes
from fourm.train.task import Inputs, Losses


@dataclass
class Counts:
    """What the host counts.

    Attributes:
        flops: Operations of the model.
        targets: Loss → what it is a mean over; of 4M a modality's target tokens.
        seconds: Phase of a step → its time.
        bad: Data set and reason → samples that could not be used.
        without, all_samples: Modality → samples without it, and all samples, of the data sets where samples may lack one.
    """

    batches: int = 0
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

    def add_batch(self, inputs: Inputs, position: Mapping[str, Any]) -> None:
        """Count a batch; ``position`` as of :class:`fourm.data.unified_datasets.Batch`."""
        self.batches += 1
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
        """Modality → share of samples without it."""
        return {name: self.without[name] / self.all_samples[name] for name in sorted(self.all_samples)}

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Counts:
        """Counts as :meth:`state` gives them, or in the flat form of earlier versions."""
        counts = cls()
        if "targets" in state:
            for name, value in state.items():
                setattr(counts, name, Counter(value) if isinstance(value, Mapping) else value)
            return counts
        counters = {
            "targets": counts.targets, "seconds": counts.seconds, "without": counts.without, "samples": counts.all_samples,
        }  # fmt: skip
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
        losses: Loss → its mean over its targets; of 4M the modalities' cross-entropies.
        not_finite: Loss → the share of its targets where it was not finite, unless that is 0.
        samples_per_second, tokens_per_second: Of all processes.
        tflops: 10¹² operations of the model per second and process.
        mfu: Their share of what the device can do; None if that is not known.
        data_wait: Share of the time spent waiting for data.
        seconds: Phase of a step → its time, as a mean over processes.
        peak_memory: Bytes, of the process with the most.
        bad_samples: By data set and reason.
        missing: Modality → the share of samples without it, of the data sets where samples may lack something.
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
        """For ``log.jsonl``: without ``mfu`` and ``not_finite`` where there is none."""
        values = dataclasses.asdict(self)
        return {
            name: value
            for name, value in values.items()
            if name not in ("mfu", "not_finite") or value not in (None, {})
        }


class Interval:
    """What happened since the last line of the log, in this process.

    Args:
        losses: Names of the losses that a batch has beside the total one.
        peak_tflops: 10¹² operations per second that the device can do; None if that is not known.
    """

    def __init__(self, losses: Sequence[str], device: torch.device, peak_tflops: float | None = None):
        self._device, self._peak_tflops = device, peak_tflops
        self._losses = list(losses)
        # loss, gradient norm, skipped steps, each of the losses
        self._sums = torch.zeros(3 + len(self._losses), dtype=torch.float64, device=device)
        # Per loss, the batches (targets) where it was not finite.
        self._left_out = torch.zeros(1 + len(self._losses), dtype=torch.float64, device=device)
        self._counts = Counts()
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    def add_batch(self, losses: Losses, inputs: Inputs, position: Mapping[str, Any]) -> Tensor:
        """Count a micro-batch.

        Args:
            position: As of :class:`fourm.data.unified_datasets.Batch`.

        Returns:
            (losses,) 1 where a loss was not finite, otherwise 0; the means leave such a one out.
        """
        values = torch.stack([losses.total, *(losses.means[name] for name in self._losses)]).detach()
        finite, weights = values.isfinite(), [1, *(inputs.targets.get(name, 0) for name in self._losses)]
        not_finite = (~finite).float()
        sums = _weighted(torch.where(finite, values, 0), weights)
        self._sums[0] += sums[0]
        self._sums[3:] += sums[1:]
        self._left_out += _weighted(not_finite, weights)
        self._counts.add_batch(inputs, position)
        return not_finite[1:]

    def add_step(self, norm: Tensor, skipped: Tensor) -> None:
        """Count an optimizer step; the norm of a skipped one does not enter the mean."""
        self._sums[1] += torch.where(skipped > 0, 0, norm)
        self._sums[2] += skipped
        self._counts.steps += 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within under ``name``, and show it so in a profile.

        On a GPU it is the time between two marks in its queue, which is read when it is logged.
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
        """The same for what the host does alone.

        Args:
            paused: it takes no time of the interval, whose samples per second are those of training.
        """
        if paused and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what was queued before belongs to the training
        start = time.perf_counter()
        with record_function(name):
            yield
        seconds = time.perf_counter() - start
        self._counts.seconds[name] += seconds  # type: ignore[assignment]
        self._start += seconds * paused

    def _read_events(self) -> None:
        """Add the times between the events; waits for the last of them."""
        for name, begin, end in self._events:
            end.synchronize()
            self._counts.seconds[name] += begin.elapsed_time(end) / 1000  # type: ignore[assignment]
        self._events.clear()

    def means(self, parallel: Processes) -> IntervalMeans:
        """The means over all processes; begins a new interval."""
        self._read_events()
        size = len(self._losses)
        sums, left_out, total, memory = [0.0] * (3 + size), [0.0] * (1 + size), Counts(), 0
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
        """For a checkpoint within the interval: a resumed run logs the same means."""
        self._read_events()
        seconds = time.perf_counter() - self._start
        return {
            "sums": self._sums.tolist(), "left_out": self._left_out.tolist(),
            "counts": self._counts.state(), "seconds": seconds,
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        if "left_out" in state:  # which earlier versions did not write
            self._left_out.copy_(torch.tensor(state["left_out"], dtype=torch.float64))
        self._counts = Counts.from_state(state["counts"])
        if "bad" in state:  # where earlier versions wrote it
            self._counts.bad = Counter(state["bad"])
        self._start = time.perf_counter() - state["seconds"]


def _weighted(values: Tensor, weights: Sequence[float]) -> Tensor:
    """The product, in one kernel whose weights need no copy to the device."""
    return torch.stack(torch._foreach_mul(values.unbind(), [float(weight) for weight in weights]))


def _mean(total: float, count: float) -> float:
    """NaN of nothing."""
    return total / count if count else math.nan
