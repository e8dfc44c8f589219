"""Signals that ask a run to stop: it finishes the current step, saves a checkpoint and ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """Raised inside :meth:`StopSignals.interrupting` to end the wait there."""


class StopSignals:
    """A context in which SIGTERM and SIGINT (Ctrl-C) are recorded instead of ending the process.

    A second Ctrl-C ends the process at once. A second SIGTERM does not, because schedulers and torchrun may each send
    one.

    Attributes:
        received: The number of the signal that was received, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous_handlers: dict[int, object] = {}
        self._interrupting = False

    def __enter__(self) -> StopSignals:
        handlers = dict.fromkeys(STOP_SIGNALS, self._record) | {signal.SIGALRM: self._interrupt}
        self._previous_handlers = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            self._restore()
            raise KeyboardInterrupt
        self.received = number
        self._interrupt(number, frame)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupting:
            self._interrupting = False
            raise Interrupted

    @contextlib.contextmanager
    def interrupting(self, seconds: float) -> Iterator[None]:
        """Raise :class:`Interrupted` within the block when a signal arrives or ``seconds`` have passed."""
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            self._interrupting = self.received is None
            if self.received is not None:
                raise Interrupted
            yield
        finally:
            self._interrupting = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
