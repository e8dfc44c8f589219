"""Handle Ctrl-C while a command is still importing its modules, which takes seconds."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any


def exit_on_interrupt() -> None:
    """Make Ctrl-C end this process with status 130 until :func:`fourm.utils.errors.run_cli` starts the command.

    Raising an exception would not work: an interrupted import may print it, swallow it or raise a different one.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def restore_keyboard_interrupt() -> None:
    """Make Ctrl-C raise ``KeyboardInterrupt`` again, which is Python's default."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_module_command(package: str) -> bool:
    """Return whether this process is ``python -m PACKAGE.…`` and is still importing the parents of that module."""
    arguments = sys.orig_argv
    module = arguments[arguments.index("-m") + 1 :][:1] if "-m" in arguments else []
    return sys.argv[:1] == ["-m"] and module != [] and module[0].partition(".")[0] == package


def _exit(*_: Any) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)
