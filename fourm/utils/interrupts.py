"""Ctrl-C while a command still loads its modules, which takes seconds: there is nothing yet to put in order."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any


def end_at_once() -> None:
    """Until the command begins, in :func:`fourm.utils.errors.run_cli`, Ctrl-C ends this process with status 130.

    An exception would not do: what is interrupted within the import of a module prints it, drops it or raises another one.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """From now on Ctrl-C raises ``KeyboardInterrupt``, as usual."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_command_of(package: str) -> bool:
    """Whether this process is ``python -m PACKAGE.…``, and still loads the packages around that module."""
    arguments = sys.orig_argv
    module = arguments[arguments.index("-m") + 1 :][:1] if "-m" in arguments else []
    return sys.argv[:1] == ["-m"] and module != [] and module[0].partition(".")[0] == package


def _end(*_: Any) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)
