"""Optional packages, which are imported where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fourm.utils.errors import MissingDependency


@contextmanager
def optional_import(package: str, purpose: str, install: str = "") -> Iterator[None]:
    """Turn the error of an import in the body of a ``with`` statement into one that says what to install.

    Args:
        package: The name of the package.
        purpose: What needs the package.
        install: The argument of ``pip install``, if it is not the name of the package.

    Raises:
        MissingDependency: If the import fails.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependency(package, purpose, install) from error
