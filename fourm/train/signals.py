"""Being asked to stop: the run ends after the step at hand, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """What :meth:`StopSignals.interrupting` was entered for is not waited for any longer."""


class StopSignals:
    """While entered, SIGTERM and SIGINT (Ctrl-C) are noted instead of obeyed.

    A second Ctrl-C is obeyed at once. A second SIGTERM is not: schedulers and torchrun may both send one.

    Attributes:
        received: number of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}
        self._interrupting = False

    def __enter__(self) -> StopSignals:
        handlers = dict.fromkeys(STOP_SIGNALS, self._note) | {signal.SIGALRM: self._interrupt}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
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
        """Within it a signal, or that many ``seconds``, raise :class:`Interrupted`, whatever this process waits for."""
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
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
