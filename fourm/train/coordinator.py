"""Decisions that all processes of a run take together between steps: wait for data, stop on a signal, save early."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from fourm.data.batch_loader import BatchIterator, BatchLoader
from fourm.train.parallel import Processes
from fourm.train.signals import STOP_SIGNALS, Interrupted, StopSignals
from fourm.utils.errors import UserError


class StopRequested(Exception):
    """Raised in all processes if one is told to stop during work that is not worth finishing, such as an evaluation."""


class Coordinator:
    """Keeps the processes of a run in step while they wait for data. All processes make the same calls.

    Args:
        data_timeout: The longest time to wait for a batch, in minutes.
        signals: The signals that stop the run; None leaves signals to their usual handlers.

    Attributes:
        stop_signal: The number of the signal that some process has received; 0 if none has.
    """

    def __init__(self, parallel: Processes, data_timeout: float, signals: StopSignals | None = None):
        self._parallel, self._timeout, self._signals = parallel, 60 * data_timeout, signals
        self.stop_signal = 0

    def fetch(
        self,
        batches: BatchIterator,
        number: int,
        phase: Callable[[], contextlib.AbstractContextManager],
        save_is_due: bool,
    ) -> tuple[list[Any], bool]:
        """Fetch the next ``number`` batches.

        The processes exchange votes at least once, even if ``number`` is 0. This happens before anything that waits for
        the device, because a wait for the device would never end if another process had died.

        Args:
            phase: Returns a context that is entered while this process itself waits.
            save_is_due: Whether this process asks for a checkpoint.

        Returns:
            The batches, which may be fewer if :attr:`stop_signal` is set, and whether any process asks for a
            checkpoint.

        Raises:
            UserError: A process has waited too long, or its data are bad.
        """
        fetched: list[Any] = []

        def ready() -> bool:
            while len(fetched) < number:
                with phase():
                    if not batches.ready():
                        return False
                    fetched.append(next(batches))
            return True

        (save_is_due,) = self._wait_until_ready(batches, ready, lambda: [save_is_due])
        return fetched, save_is_due

    def iterate(self, loader: BatchLoader) -> Iterator[Any]:
        """Yield the batches of this process, as many times as the process with the most batches.

        Yields:
            A batch, or None if this process has no more and only others do.

        Raises:
            StopRequested: A process was told to stop.
            UserError: As in :meth:`fetch`.
        """
        batches = iter(loader)
        with contextlib.closing(batches):
            while True:
                (any_has_more,) = self._wait_until_ready(batches, batches.ready, lambda: [not batches.ended])
                if self.stop_signal:
                    raise StopRequested
                if not any_has_more:
                    return
                yield next(batches, None)

    def _wait_until_ready(
        self, batches: BatchIterator, ready: Callable[[], bool], flags: Callable[[], list[bool]]
    ) -> list[bool]:
        """Wait until all processes are ready, or one is told to stop; return which flags are set in any process."""
        start = time.monotonic()
        while True:
            is_ready = self._is_ready(batches, ready)
            timed_out = not is_ready and time.monotonic() - start >= self._timeout
            received = self._signals.received if self._signals else None
            stop_votes = [received == number for number in STOP_SIGNALS]
            any_waits, any_timed_out, *votes = self._parallel.any(not is_ready, timed_out, *stop_votes, *flags())
            stop_votes, flag_votes = votes[: len(STOP_SIGNALS)], votes[len(STOP_SIGNALS) :]
            self.stop_signal = max((n for n, vote in zip(STOP_SIGNALS, stop_votes, strict=True) if vote), default=0)
            if self.stop_signal or not any_waits:
                return flag_votes
            if any_timed_out:
                self._raise_timeout(timed_out, batches)

    def _is_ready(self, batches: BatchIterator, ready: Callable[[], bool]) -> bool:
        if not (batches.in_process and self._signals):
            return ready()
        try:
            with self._signals.interrupting(self._timeout):
                return ready()
        except Interrupted:
            return False

    def _raise_timeout(self, timed_out: bool, batches: BatchIterator) -> None:
        reading = ""
        if timed_out:
            reading = batches.reading() or "unknown files"
        by_rank: list[str] = self._parallel.gather(reading)
        places = "; ".join(f"rank {rank} reads {files}" for rank, files in enumerate(by_rank) if files)
        raise UserError(
            f"no batch arrived within data_timeout = {self._timeout / 60:g} minutes ({places}); repair or remove "
            "these files, or raise data_timeout, then start the run again to continue from its newest checkpoint"
        )
