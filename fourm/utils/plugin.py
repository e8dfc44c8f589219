"""A module of the user's own, which registers modalities, transforms, file formats or embeddings when it is imported."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from dataclasses import dataclass

from fourm.utils.errors import UserError
from fourm.utils.options import Options, option


@dataclass(frozen=True, kw_only=True)
class PluginOptions(Options):
    """Your own code"""

    plugin: str = option("Python module that registers your own modalities: my_package.my_modalities", "")


def load_plugin(name: str) -> None:
    """Import the module called ``name``, also from the working directory; nothing for an empty name.

    Raises:
        UserError: there is no such module, or one that it needs; or it fails.
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
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # of whatever kind, sys.exit() too: the module is anybody's
        raise UserError(
            f"'plugin': {name} fails {_place_of(error)}with {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def _place_of(error: BaseException) -> str:
    """Where it was raised: ``in FILE, line 3, ``; errors of syntax tell it themselves."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "" if isinstance(error, SyntaxError) else f"in {last.filename}, line {last.lineno}, "
