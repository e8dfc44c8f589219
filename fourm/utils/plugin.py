"""A module of the user's own, which registers modalities, transforms, file formats or embeddings when it is imported."""

from __future__ import annotations

import importlib
import os
import sys

from fourm.utils.errors import UserError


def load_plugin(name: str) -> None:
    """Import the module called ``name``, also from the working directory; nothing for an empty name.

    Raises:
        UserError: there is no such module, or one that it needs.
    """
    if not name:
        return
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"'plugin': cannot import {name}: {error}; it must be installed or in the working directory"
        ) from error
