"""``--profile``: a Chrome trace of what a few training steps spend their time on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fourm.train.metrics import Interval
from fourm.utils.files import atomic_path

log = logging.getLogger("fourm")

WARMUP_STEPS, TRACED_STEPS = 3, 3
"""Steps before the trace, which allocate, compile and fill buffers, and steps in the trace."""


@contextlib.contextmanager
def profiler(folder: Path | None, interval: Interval) -> Iterator[Callable[[], None]]:
    """Trace some of the steps in the block into ``folder/profile/trace.json``, for chrome://tracing or ui.perfetto.dev.

    Args:
        folder: The run folder; None to trace nothing.
        interval: The time that the profiler itself takes is no part of it.

    Yields:
        A function to call after each step.
    """
    if folder is None:
        yield lambda: None
        return

    def write(trace: profile) -> None:
        target = folder / "profile" / "trace.json"
        with atomic_path(target) as path:
            trace.export_chrome_trace(str(path))
        log.info("profile of %d steps: %s", TRACED_STEPS, target)

    def end_step() -> None:
        with interval.host_phase("profile", paused=True):
            trace.step()

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    steps = schedule(wait=WARMUP_STEPS - 1, warmup=1, active=TRACED_STEPS, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as trace:
        yield end_step
