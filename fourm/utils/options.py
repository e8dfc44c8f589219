"""A dataclass of options → a command line: its fields are the single list of names, types, defaults and help texts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
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
    """The options that ``--key value`` arguments give; see :func:`parse_overrides`.

    Raises:
        UserError: also for a missing key, or a bad value.
    """
    return build(cls, parse_overrides(cls, argv, description), "command line")


def parse_overrides(
    cls: type, argv: list[str] | None, description: str, aliases: Mapping[str, str] | None = None, config_file: bool = False
) -> dict[str, Any]:  # fmt: skip
    """The fields of ``cls`` that the command line sets; switches come in pairs ``--key`` / ``--no_key``.

    Args:
        aliases: other name → field.
        config_file: ``--config FILE`` is an argument too, and its path part of the result.

    Raises:
        UserError: an unknown key (names the nearest).
        SystemExit: after ``--help``.
    """
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    flags = []
    if config_file:
        flags += ["--config"]
        parser.add_argument("-c", "--config", help="YAML file; keys on the command line override it")
    for item in dataclasses.fields(cls):
        text = item.metadata["help"].replace("%", "%%")
        if item.default is not MISSING and item.default not in (None, "", -1):
            text += f" (default: {item.default})"
        names = [f"--{item.name}", *(f"--{alias}" for alias, key in (aliases or {}).items() if key == item.name)]
        if item.type == "bool":
            parser.add_argument(*names, action="store_true", help=text)
            names.append(f"--no_{item.name}")
            parser.add_argument(names[-1], dest=item.name, action="store_false", help=argparse.SUPPRESS)
        else:
            count = "+" if "tuple" in str(item.type) else None
            parser.add_argument(*names, dest=item.name, type=parse_value, help=text, nargs=count)
        flags += names
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"command line: unknown key '{flag}'{did_you_mean(flag, flags)}")
    return vars(arguments)
