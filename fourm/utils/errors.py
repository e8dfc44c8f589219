"""Errors that the user can mend, and how entry scripts report them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input (a key, a file, a value): one sentence that names it and the fix."""


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

    def __init__(self, package: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package}: pip install {package}")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The end of an error message: ``" (did you mean 'batch_size'?)"``, or nothing if no option is near."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run an entry script: exit status 2 and one line for a :class:`UserError`, without a traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
