"""``--profile``: what a few steps spend their time on, as a Chrome trace."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fourm.utils.files import atomic_path

log = logging.getLogger("fourm")

WAIT, STEPS = 3, 3
"""Steps that pass before (they allocate, compile and fill buffers), and steps that are traced."""


@contextlib.contextmanager
def profiler(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Trace some of the steps within into ``folder/profile/trace.json``, for chrome://tracing or ui.perfetto.dev.

    Args:
        folder: None = do nothing.

    Yields:
        To be called after each step.
    """
    if folder is None:
        yield lambda: None
        return

    def write(trace: profile) -> None:
        target = folder / "profile" / "trace.json"
        with atomic_path(target) as path:
            trace.export_chrome_trace(str(path))
        log.info("profile of %d steps: %s", STEPS, target)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(
        activities=activities, schedule=schedule(wait=WAIT - 1, warmup=1, active=STEPS, repeat=1), on_trace_ready=write
    ) as trace:
        yield trace.step
