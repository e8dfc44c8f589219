"""Import a user's own module, which registers modalities, transforms, file formats or embeddings."""

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
    """Import the module called ``name``, which may be in the working directory. An empty name does nothing.

    Raises:
        UserError: If the module, or one that it imports, does not exist, or its code fails.
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
    except BaseException as error:  # even sys.exit(), because the module may do anything
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"'plugin': {name} fails {_location(error)}with {type(error).__name__}: {reason}") from error


def _location(error: BaseException) -> str:
    """Return where an error was raised, ``in FILE, line 3, ``; nothing for syntax errors, whose messages include it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "" if isinstance(error, SyntaxError) else f"in {last.filename}, line {last.lineno}, "
