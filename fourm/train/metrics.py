"""Sums over a logging interval. They stay on the device: a step never waits for it, only a line of the log does."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fourm.train.parallel import Processes


class Interval:
    """What happened since the last line of the log, in this process.

    Args:
        modalities: that the model predicts.
    """

    def __init__(self, modalities: Sequence[str], device: torch.device):
        self._names = ["loss", "grad_norm", "skipped_steps", *(f"loss {name}" for name in modalities)]
        self._modalities = list(modalities)
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self._counts: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self._start = time.perf_counter()

    def add_batch(
        self, loss: Tensor, losses: Mapping[str, Tensor], targets: Mapping[str, int], bad: Mapping[str, int], **amounts: float
    ) -> None:  # fmt: skip
        """Count a micro-batch.

        Args:
            loss, losses: of the batch, and its mean cross-entropy per modality.
            targets: target tokens per modality.
            bad: samples that were skipped, by data set and reason.
            amounts: ``samples`` and ``tokens``.
        """
        sums = torch.stack([loss, *(losses[name] * targets[name] for name in self._modalities)]).detach()
        self._sums[0] += sums[0]
        self._sums[3:] += sums[1:]
        self._counts.update({f"targets {name}": count for name, count in targets.items()})
        self._counts.update(batches=1, **amounts)  # type: ignore[call-overload]
        self._bad.update(bad)

    def add_step(self, norm: Tensor, skipped: Tensor) -> None:
        """Count an optimizer step; the norm of a skipped one does not enter the mean."""
        self._sums[1] += torch.where(skipped > 0, 0, norm)
        self._sums[2] += skipped
        self._counts["steps"] += 1

    def add_wait(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self._counts["wait"] += seconds  # type: ignore[assignment]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within takes no time of the interval."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def means(self, parallel: Processes) -> dict[str, Any]:
        """The line for the log, over all processes; begins a new interval.

        Returns:
            ``loss``, ``losses`` per modality (over its target tokens), ``grad_norm``, ``skipped_steps``,
            ``samples_per_second``, ``tokens_per_second``, ``data_wait`` (share of the time spent waiting for data) and
            ``bad_samples`` by data set and reason.
        """
        total, bad = Counter[str](), Counter[str]()
        for sums, counts, skipped in parallel.gather((self._sums.tolist(), self._counts, self._bad)):
            total.update(dict(zip(self._names, sums, strict=True)))
            total.update(counts)
            bad.update(skipped)
        seconds = time.perf_counter() - self._start
        self._sums.zero_()
        self._counts, self._bad, self._start = Counter(), Counter(), time.perf_counter()
        per_modality = {name: (total[f"loss {name}"], total[f"targets {name}"]) for name in self._modalities}
        return {
            "loss": total["loss"] / total["batches"],
            "losses": {name: loss / count for name, (loss, count) in per_modality.items() if count},
            "grad_norm": total["grad_norm"] / max(total["steps"] - total["skipped_steps"], 1),
            "skipped_steps": round(total["skipped_steps"] / parallel.world_size),
            "samples_per_second": total["samples"] / seconds,
            "tokens_per_second": total["tokens"] / seconds,
            "data_wait": total["wait"] / parallel.world_size / seconds,
            "bad_samples": dict(bad),
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint within the interval: a resumed run logs the same means."""
        seconds = time.perf_counter() - self._start
        return {"sums": self._sums.tolist(), "counts": self._counts, "bad": self._bad, "seconds": seconds}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self._counts, self._bad = Counter(state["counts"]), Counter(state["bad"])
        self._start = time.perf_counter() - state["seconds"]
