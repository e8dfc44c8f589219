"""Waiting for data: all processes of a run together, so that every one hears of a signal to any, and not for ever."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from fourm.data.batch_loader import BatchIterator, BatchLoader
from fourm.train.parallel import Processes
from fourm.train.signals import STOP_SIGNALS, Interrupted, StopSignals
from fourm.utils.errors import UserError


class Stopped(Exception):
    """A process was told to stop while all were at something that is not worth to be finished."""


class Waiting:
    """How the processes of a run come together between steps. All of them make the same calls.

    Args:
        minutes: the longest wait for a batch.
        signals: what may stop the run; None = nothing, signals do what they usually do.

    Attributes:
        stop: number of the signal that some process has received; 0 = none.
    """

    def __init__(self, parallel: Processes, minutes: float, signals: StopSignals | None = None):
        self._parallel, self._seconds, self._signals = parallel, 60 * minutes, signals
        self.stop = 0

    def fetch(
        self, batches: BatchIterator, number: int, phase: Callable[[], contextlib.AbstractContextManager], late: bool
    ) -> tuple[list[Any], bool]:
        """The next ``number`` batches, and whether ``late`` is set in any process.

        It votes at least once, before anything that waits for the device, which would wait for ever if another process had
        died. If :attr:`stop` is set, the batches may be too few.

        Args:
            phase: entered while this process waits itself.

        Raises:
            UserError: the wait of a process was too long, or its data are bad.
        """
        fetched: list[Any] = []

        def ready() -> bool:
            while len(fetched) < number:
                with phase():
                    if not batches.ready():
                        return False
                    fetched.append(next(batches))
            return True

        (late,) = self._together(batches, ready, lambda: [late])
        return fetched, late

    def all_of(self, loader: BatchLoader) -> Iterator[Any]:
        """The batches of every process's loader, the same number in all: None where only others have some left.

        Raises:
            Stopped: :attr:`stop` is set.
            UserError: as of :meth:`fetch`.
        """
        batches = iter(loader)
        with contextlib.closing(batches):
            while True:
                (more,) = self._together(batches, batches.ready, lambda: [not batches.ended])
                if self.stop:
                    raise Stopped
                if not more:
                    return
                yield next(batches, None)

    def _together(
        self, batches: BatchIterator, ready: Callable[[], bool], flags: Callable[[], list[bool]]
    ) -> list[bool]:
        """Return when all processes are ``ready``, or one is told to stop; whether each flag is then set in any process."""
        begin = time.monotonic()
        while True:
            here = self._is_ready(batches, ready)
            too_long = not here and time.monotonic() - begin >= self._seconds
            received = self._signals.received if self._signals else None
            stops = [received == number for number in STOP_SIGNALS]
            waiting, too_long_anywhere, *votes = self._parallel.any(not here, too_long, *stops, *flags())
            self.stop = max(itertools.compress(STOP_SIGNALS, votes), default=0)
            if self.stop or not waiting:
                return votes[len(STOP_SIGNALS) :]
            if too_long_anywhere:
                self._give_up(too_long, batches)

    def _is_ready(self, batches: BatchIterator, ready: Callable[[], bool]) -> bool:
        if not (batches.in_process and self._signals):
            return ready()
        try:
            with self._signals.interrupting(self._seconds):
                return ready()
        except Interrupted:
            return False

    def _give_up(self, here: bool, batches: BatchIterator) -> None:
        reading = batches.reading() or "what they read is not known" if here else ""
        found: list[Any] = self._parallel.gather(reading)
        where = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(found) if text)
        raise UserError(
            f"no batch came within data_timeout = {self._seconds / 60:g} minutes. Being read: {where}. Mend or remove it, or "
            "raise data_timeout; the same command goes on from the newest checkpoint"
        )
