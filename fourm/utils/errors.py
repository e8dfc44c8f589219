"""Errors that the user can mend, and how entry scripts report them."""

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

from fourm.utils.interrupts import raise_again
from fourm.utils.urls import without_secrets

# Control characters other than tab and newline, what reorders text, and halves of a character. Names and texts of strangers
# can hold them: a terminal would obey them, and halves cannot be written as UTF-8.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_REASONS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "its disk is read-only",
    errno.ENOSPC: "no space left on the disk; make room, and start again",
    errno.EDQUOT: "the disk quota is used up; make room, and start again",
    errno.EFBIG: "files may not get so large here: a limit of the file system, or of ulimit -f",
    errno.EISDIR: "this is a folder, not a file",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.ENOENT: "there is no such file or folder",
    errno.EEXIST: "it is there already",
    errno.ENAMETOOLONG: "this name is too long",
    errno.ELOOP: "its symbolic links go round in circles",
    errno.EMFILE: "too many files are open; raise the limit with ulimit -n",
    errno.ENOMEM: "no memory left",
}


class UserError(ValueError):
    """Bad input (a key, a file, a value): one sentence that names it and the fix. Its text is safe to print."""

    def __str__(self) -> str:
        return printable(super().__str__())


class _OfModality(ValueError):
    """An error that knows what it is about.

    Attributes:
        modality: whose value is at fault; None: not known (yet).
        detail: the message without the name of the modality.
    """

    def __init__(self, message: str, modality: str | None = None, detail: str | None = None):
        super().__init__(message)
        self.modality, self.detail = modality, message if detail is None else detail


class DataError(_OfModality, UserError):
    """A sample, file or shard breaks its modality's contract."""


class UnreadableValue(_OfModality):
    """A value of this sample cannot be decoded or parsed: skip the sample (a broken contract is a :class:`DataError`)."""


class MissingDependency(UserError):
    """An optional package is not installed."""

    def __init__(self, package: str, purpose: str, install: str = ""):
        super().__init__(f"{purpose} needs the package {package}: pip install {install or package}")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The end of an error message: ``" (did you mean 'batch_size'?)"``, or nothing if no option is near."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def printable(text: str) -> str:
    """``text`` with control characters, such as those of escape sequences, written out: ``\\x1b[2J``; URLs without secrets."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], without_secrets(text))


class PrintableFormatter(logging.Formatter):
    """Messages can hold names of strangers and URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def reason(error: OSError) -> str:
    """What has gone wrong, without the file's name: ``no space left on the disk; …``."""
    if error.errno in _REASONS:
        return _REASONS[error.errno]
    return " ".join(str(error.strerror or error or type(error).__name__).split())


def run_cli(main: Callable[[], int | None]) -> None:
    """Run an entry script: what the user or the machine causes is one line and exit status 2, without a traceback.

    Ctrl-C ends it with status 130; while modules are loaded before, :func:`fourm.utils.interrupts.end_at_once` does so.
    """
    raise_again()
    for stream in (sys.stdout, sys.stderr):  # a terminal or file of another encoding lacks some characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # of commands that set up no logging of their own
        logging.lastResort.setFormatter(PrintableFormatter("%(message)s"))
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        end_interrupted()
    except RecursionError:
        _fail("something in the files or the configuration is nested too deeply")
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if _stdout_is_closed():  # by head, for example
            sys.exit(1)
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        _fail(f"{names}: {reason(error)}" if names else reason(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(
            f"out of memory: use a smaller batch_size or num_workers, or less data ({' '.join(str(error).split())[:200]})"
        )


def end_interrupted() -> None:
    """End this process as one that Ctrl-C has ended: with status 130, and no traceback of its threads either."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("interrupted", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def _fail(message: str) -> None:
    print(f"error: {printable(message)}", file=sys.stderr)
    _stdout_is_closed()
    sys.exit(2)


def _stdout_is_closed() -> bool:
    """Whether nobody reads the output any more; what cannot be written is then forgotten, or Python would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return isinstance(error, BrokenPipeError)
    return False


def _is_out_of_memory(error: Exception) -> bool:
    """torch has an error of its own for GPUs, and none for CPUs."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )
