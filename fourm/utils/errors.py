"""Errors that the user can fix, and how entry scripts report them."""

from __future__ import annotations

import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable

from fourm.utils.interrupts import restore_keyboard_interrupt
from fourm.utils.urls import redact

# Control characters other than tab and newline, bidirectional marks and lone surrogates. Untrusted names and texts may
# contain them: a terminal would interpret them, and lone surrogates cannot be encoded as UTF-8.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_REASONS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "its disk is read-only",
    errno.ENOSPC: "no space left on the disk; free some space and start again",
    errno.EDQUOT: "the disk quota is exceeded; free some space and start again",
    errno.EFBIG: "the file is larger than the file system or ulimit -f allows",
    errno.EISDIR: "this is a folder, not a file",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.ENOENT: "there is no such file or folder",
    errno.EEXIST: "it already exists",
    errno.ENAMETOOLONG: "this name is too long",
    errno.ELOOP: "its symbolic links form a loop",
    errno.EMFILE: "too many files are open; raise the limit with ulimit -n",
    errno.ENOMEM: "out of memory",
}


class UserError(ValueError):
    """A bad key, file or value from the user. The message names it and the fix, and is safe to print."""

    def __str__(self) -> str:
        return sanitize(super().__str__())


class _ModalityError(ValueError):
    """An error about the value of a modality.

    Attributes:
        modality: Name of the modality, or None if it is not known (yet).
        detail: The message without the name of the modality.
    """

    def __init__(self, message: str, modality: str | None = None, detail: str | None = None):
        super().__init__(message)
        self.modality = modality
        self.detail = message if detail is None else detail


class DataError(_ModalityError, UserError):
    """A sample, file or shard violates its modality's contract."""


class UnreadableValue(_ModalityError):
    """A value of this sample cannot be decoded or parsed, so the sample is skipped; compare :class:`DataError`."""


class MissingDependency(UserError):
    """An optional package is not installed."""

    def __init__(self, package: str, purpose: str, install: str = ""):
        super().__init__(f"{purpose} needs the package {package}: pip install {install or package}")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'batch_size'?)"`` for an error message, or an empty string if no option is close."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def sanitize(text: str) -> str:
    """Escape the control characters in ``text``, e.g. ``\\x1b[2J``, and remove secrets from its URLs."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], redact(text))


class SanitizingFormatter(logging.Formatter):
    """Apply :func:`sanitize` to log messages, which may contain untrusted names and URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return sanitize(super().format(record))


def reason(error: OSError) -> str:
    """Describe what went wrong without naming the file: ``no space left on the disk; …``."""
    if error.errno in _REASONS:
        return _REASONS[error.errno]
    return " ".join(str(error.strerror or error or type(error).__name__).split())


def run_cli(main: Callable[[], int | None]) -> None:
    """Run an entry script. Errors of the user or the machine print one line, without a traceback; the status is 2.

    Ctrl-C exits with status 130; :func:`fourm.utils.interrupts.exit_on_interrupt` does the same while modules are
    imported.
    """
    restore_keyboard_interrupt()
    for stream in (sys.stdout, sys.stderr):  # not every terminal or file has an encoding with all characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # used by commands that do not set up logging
        logging.lastResort.setFormatter(SanitizingFormatter("%(message)s"))
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        exit_interrupted()
    except RecursionError:
        _fail("something in the files or the configuration is nested too deeply")
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if _stdout_is_closed():  # for example by head
            sys.exit(1)
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        _fail(f"{names}: {reason(error)}" if names else reason(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(
            "out of memory: use a smaller batch_size or num_workers, or less data "
            f"({' '.join(str(error).split())[:200]})"
        )


def exit_interrupted() -> None:
    """Exit with status 130, as after Ctrl-C, without tracebacks of this process or its threads."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("interrupted", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def _fail(message: str) -> None:
    print(f"error: {sanitize(message)}", file=sys.stderr)
    _stdout_is_closed()
    sys.exit(2)


def _stdout_is_closed() -> bool:
    """Return whether the reader of stdout is gone; discard what cannot be written, or Python would complain on exit."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return isinstance(error, BrokenPipeError)
    return False


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out; torch has an exception class for this on GPUs, but not on CPUs."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )
