"""A dataclass of options → a command line: its fields are the single list of names, types, defaults and help texts."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import MISSING, field
from typing import Any, NoReturn, TypeVar

from fourm.utils.config import build, parse_value
from fourm.utils.errors import UserError, did_you_mean

T = TypeVar("T")


def option(text: str, default: Any = MISSING) -> Any:
    """A field with its help text; required if it has no default."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}")


def parse_options(cls: type[T], argv: list[str] | None, description: str) -> T:
    """Read ``--key value``; switches come in pairs ``--key`` / ``--no_key``.

    Raises:
        UserError: an unknown key (names the nearest), a missing one, or a bad value.
        SystemExit: after ``--help``.
    """
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    flags = []
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        text = item.metadata["help"].replace("%", "%%")
        if item.default is not MISSING and item.default not in (None, ""):
            text += f" (default: {item.default})"
        flags.append(f"--{item.name}")
        if item.type == "bool":
            parser.add_argument(flags[-1], action="store_true", help=text)
            parser.add_argument(f"--no_{item.name}", dest=item.name, action="store_false", help=argparse.SUPPRESS)
        else:
            parser.add_argument(flags[-1], type=parse_value, help=text)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"command line: unknown key '{flag}'{did_you_mean(flag, flags)}")
    return build(cls, vars(arguments), "command line")
