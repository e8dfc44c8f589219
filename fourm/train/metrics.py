"""Sums over a logging interval. They stay on the device: a step never waits for it, only a line of the log does."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from fourm.train.device import peak_memory
from fourm.train.parallel import Processes


class Interval:
    """What happened since the last line of the log, in this process.

    Args:
        modalities: that the model predicts.
        peak_tflops: 10¹² operations per second that the device could do; None if that is not known.
    """

    def __init__(self, modalities: Sequence[str], device: torch.device, peak_tflops: float | None = None):
        self._device, self._peak_tflops = device, peak_tflops
        self._names = ["loss", "grad_norm", "skipped_steps", *(f"loss {name}" for name in modalities)]
        self._modalities = list(modalities)
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        # Per loss, the batches (targets) where it was not finite.
        self._left_out = torch.zeros(1 + len(self._modalities), dtype=torch.float64, device=device)
        self._counts: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    def add_batch(
        self, loss: Tensor, losses: Mapping[str, Tensor], targets: Mapping[str, int], position: Mapping[str, Any],
        **amounts: float,
    ) -> Tensor:  # fmt: skip
        """Count a micro-batch.

        Args:
            loss, losses: of the batch, and its mean cross-entropy per modality.
            targets: target tokens per modality.
            position: :attr:`Batch.position`, for the samples that were skipped and the modalities that were missing.
            amounts: ``samples``, ``tokens`` and ``flops``.

        Returns:
            (modalities,) 1 where the loss was not finite, else 0; the means leave such a one out.
        """
        values = torch.stack([loss, *(losses[name] for name in self._modalities)]).detach()
        finite, weights = values.isfinite(), [1, *(targets[name] for name in self._modalities)]
        not_finite = (~finite).float()
        sums = _weighted(torch.where(finite, values, 0), weights)
        self._sums[0] += sums[0]
        self._sums[3:] += sums[1:]
        self._left_out += _weighted(not_finite, weights)
        self._counts.update({f"targets {name}": count for name, count in targets.items()})
        self._counts.update(batches=1, **amounts)  # type: ignore[call-overload]
        self._bad.update(position["skipped"])
        count_missing(self._counts, position)
        return not_finite[1:]

    def add_step(self, norm: Tensor, skipped: Tensor) -> None:
        """Count an optimizer step; the norm of a skipped one does not enter the mean."""
        self._sums[1] += torch.where(skipped > 0, 0, norm)
        self._sums[2] += skipped
        self._counts["steps"] += 1

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
        self._counts[f"seconds {name}"] += seconds  # type: ignore[assignment]
        self._start += seconds * paused

    def _read_events(self) -> None:
        """Add the times between the events; waits for the last of them."""
        for name, begin, end in self._events:
            end.synchronize()
            self._counts[f"seconds {name}"] += begin.elapsed_time(end) / 1000  # type: ignore[assignment]
        self._events.clear()

    def means(self, parallel: Processes) -> dict[str, Any]:
        """The line for the log, over all processes; begins a new interval.

        Returns:
            ``loss``, ``losses`` per modality (over its target tokens), ``grad_norm``, ``skipped_steps``, (where a loss was
            not finite) ``not_finite``: its modality → its share of the targets,
            ``samples_per_second``, ``tokens_per_second``, ``tflops`` (10¹² operations of the model per second and
            process), ``mfu`` (their share of what the device could do, if that is known), ``data_wait`` (share of the
            time spent waiting for data), ``seconds`` per phase (mean over processes), ``peak_memory`` (bytes, of the
            process with most), ``bad_samples`` by data set and reason, and ``missing``, the share of samples without a
            modality, of the data sets where samples may lack something.
        """
        total, bad, memory = Counter[str](), Counter[str](), 0
        self._read_events()
        losses = ["loss", *(f"loss {name}" for name in self._modalities)]
        own = self._sums.tolist(), self._left_out.tolist(), self._counts, self._bad, peak_memory(self._device)
        for sums, left_out, counts, skipped, peak in parallel.gather(own):
            total.update(dict(zip(self._names, sums, strict=True)))
            total.update({f"not finite {name}": count for name, count in zip(losses, left_out, strict=True)})
            total.update(counts)
            bad.update(skipped)
            memory = max(memory, peak)
        seconds = time.perf_counter() - self._start
        self._sums.zero_()
        self._left_out.zero_()
        self._counts, self._bad, self._start = Counter(), Counter(), time.perf_counter()
        phases = {name.split()[1]: total[name] / parallel.world_size for name in total if name.startswith("seconds ")}
        tflops = total["flops"] / seconds / parallel.world_size / 1e12
        targets = {name: total[f"targets {name}"] for name in self._modalities if total[f"targets {name}"]}
        not_finite = {name: share for name in targets if (share := total[f"not finite loss {name}"] / targets[name])}
        return {
            "loss": _mean(total, "loss", total["batches"]),
            "losses": {name: _mean(total, f"loss {name}", count) for name, count in targets.items()},
            **({"not_finite": not_finite} if not_finite else {}),
            "grad_norm": total["grad_norm"] / max(total["steps"] - total["skipped_steps"], 1),
            "skipped_steps": round(total["skipped_steps"] / parallel.world_size),
            "samples_per_second": total["samples"] / seconds,
            "tokens_per_second": total["tokens"] / seconds,
            "tflops": tflops,
            **({"mfu": tflops / self._peak_tflops} if self._peak_tflops else {}),
            "data_wait": phases.get("data_wait", 0) / seconds,
            "seconds": phases,
            "peak_memory": memory,
            "bad_samples": dict(bad),
            "missing": missing_shares(total),
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint within the interval: a resumed run logs the same means."""
        self._read_events()
        seconds = time.perf_counter() - self._start
        return {
            "sums": self._sums.tolist(), "left_out": self._left_out.tolist(), "counts": self._counts, "bad": self._bad,
            "seconds": seconds,
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        if "left_out" in state:  # not in checkpoints of old
            self._left_out.copy_(torch.tensor(state["left_out"], dtype=torch.float64))
        self._counts, self._bad = Counter(state["counts"]), Counter(state["bad"])
        self._start = time.perf_counter() - state["seconds"]


def _weighted(values: Tensor, weights: Sequence[float]) -> Tensor:
    """The product, in one kernel whose weights need no copy to the device."""
    return torch.stack(torch._foreach_mul(values.unbind(), [float(weight) for weight in weights]))


def _mean(total: Mapping[str, float], name: str, count: float) -> float:
    """Over what was finite; NaN if nothing was."""
    finite = count - total[f"not finite {name}"]
    return total[name] / finite if finite else math.nan


def count_missing(counts: Counter[str], position: Mapping[str, Any]) -> None:
    """Add the samples of a batch (:attr:`Batch.position`) without each modality, of the data sets where they may lack some."""
    for name, (lacking, total) in position["missing"].items():
        counts.update({f"without {name}": lacking, f"samples {name}": total})


def missing_shares(counts: Mapping[str, float]) -> dict[str, float]:
    """Modality → share of samples without it, from what :func:`count_missing` has added up."""
    names = sorted(name.removeprefix("without ") for name in counts if name.startswith("without "))
    return {name: counts[f"without {name}"] / counts[f"samples {name}"] for name in names}
