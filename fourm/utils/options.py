"""Turn a dataclass of options into a command line; its fields define all names, types, defaults and help texts."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, field
from typing import Any, NoReturn, TypeVar

from fourm.utils.config import Range, build, is_text, parse_value, resolve_options
from fourm.utils.errors import UserError, did_you_mean

T = TypeVar("T")


class Options:
    """Base class of option groups, which are dataclasses defined next to the code that they configure.

    The options of a command are a dataclass that inherits from its groups. Its keys are therefore flat, and it can be
    passed to every function that takes one of the groups. ``--help`` lists each group under the first line of its
    docstring. A group may define ``check``, which raises a :class:`UserError` for values that contradict each other.
    """

    def __post_init__(self) -> None:
        resolve_options(self)
        for group in type(self).__mro__:
            if "check" in vars(group):
                vars(group)["check"](self)


def option(
    text: str,
    default: Any = MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    unset: float | None = None,
    alias: str = "",
    short: str = "",
    fixed: bool = False,
) -> Any:
    """Define a field with its help text; a field without a default is required.

    Args:
        text: The help text.
        default: The default value; dictionaries and lists are copied.
        at_least, above, at_most, below: Bounds of the number, or of each number of a list; see :class:`Range`.
        unset: A number outside these bounds that means "not set".
        alias: An alternative name of the key.
        short: A short name on the command line, such as ``-dc``.
        fixed: Whether the value affects the final weights of a training run, so that a resumed run must not change it.
    """
    bounds = Range(at_least, above, at_most, below, unset)
    metadata: dict[str, Any] = {"help": text, "alias": alias, "short": short, "fixed": fixed}
    if bounds != Range():
        metadata["range"] = bounds
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def option_group(text: str, cls: type) -> Any:
    """Define a field that holds another options dataclass, or None; its name is the prefix of their keys on the command
    line: ``sr`` → ``--sr_model``."""
    return field(default=None, metadata={"help": text, "options": cls})


def flat_options(cls: type) -> list[str]:
    """Return the names of all options on the command line, including those of nested groups."""
    return [f"{prefix}{item.name}" for prefix, _, items in _groups(cls) for item in items]


def aliases(cls: type) -> dict[str, str]:
    """Return alias → key."""
    return {item.metadata["alias"]: item.name for item in dataclasses.fields(cls) if item.metadata.get("alias")}


def _groups(cls: type) -> list[tuple[str, str, list[dataclasses.Field]]]:
    """Return (prefix, title, fields) of ``cls``, of the groups that it inherits from, and of its nested groups."""
    owner = {name: group for group in reversed(cls.__mro__) for name in inspect.get_annotations(group)}
    groups = []
    for group in cls.__mro__:
        fields = [
            item for item in dataclasses.fields(cls) if owner[item.name] is group and "options" not in item.metadata
        ]
        if fields:
            title = "" if group is cls else (group.__doc__ or "").partition("\n")[0].rstrip(".")
            groups.append(("", title, fields))
    for item in dataclasses.fields(cls):
        if "options" in item.metadata:
            groups.append((f"{item.name}_", item.metadata["help"], list(dataclasses.fields(item.metadata["options"]))))
    return groups


def _texts(cls: type) -> dict[str, bool]:
    """Return option → whether its value is text and must not be parsed: ``007`` is a name, and ``~`` a folder."""
    texts = {name: is_text(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}
    for item in dataclasses.fields(cls):
        if "options" in item.metadata:
            texts |= {f"{item.name}_{name}": text for name, text in _texts(item.metadata["options"]).items()}
    return texts


def _as_text(text: str) -> str | None:
    return None if text == "null" else text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}")


def parse_options(cls: type[T], argv: list[str] | None, description: str, positional: Sequence[str] = ()) -> T:
    """Parse ``--key value`` arguments into a dataclass of options; see :func:`parse_overrides`.

    Args:
        cls: The dataclass.
        argv: The arguments, or None for those of this process.
        description: The text at the top of ``--help``.
        positional: Keys whose values may be given first and without ``--key``.

    Raises:
        UserError: If a key is unknown or missing, or a value is invalid.
    """
    argv = sys.argv[1:] if argv is None else argv
    values = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    if len(values) > len(positional):
        raise UserError(f"command line: there is no key before '{values[len(positional)]}'")
    named = [part for key, value in zip(positional, values, strict=False) for part in (f"--{key}", value)]
    return build(cls, parse_overrides(cls, [*named, *argv[len(values) :]], description), "command line")


def parse_overrides(cls: type, argv: list[str] | None, description: str, config_file: bool = False) -> dict[str, Any]:
    """Parse the fields of ``cls`` that the command line sets; switches come in pairs ``--key`` / ``--no_key``.

    Args:
        cls: The dataclass of options.
        argv: The arguments, or None for those of this process.
        description: The text at the top of ``--help``.
        config_file: Whether to accept ``--config FILE`` too; the result then contains its path.

    Returns:
        Key → value, with the flat names of nested groups.

    Raises:
        UserError: If a key is unknown; the message names the nearest one.
        SystemExit: After ``--help``.
    """
    parser = _Parser(
        usage="%(prog)s [--KEY VALUE ...]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    texts, flags = _texts(cls), []
    if config_file:
        flags += ["--config"]
        parser.add_argument("-c", "--config", help="YAML file; keys on the command line override it")
    for prefix, title, fields in _groups(cls):
        group = parser.add_argument_group(title) if title else parser
        for item in fields:
            text = item.metadata["help"].replace("%", "%%")
            if item.default is not MISSING and item.default not in (None, "", -1):
                text += f" (default: {item.default})"
            key = f"{prefix}{item.name}"
            alias = item.metadata["alias"]
            short = item.metadata["short"]
            names = [*([short] if short else []), f"--{key}", *([f"--{alias}"] if alias else [])]
            if item.type == "bool":
                group.add_argument(*names, action="store_true", help=text)
                names.append(f"--no_{key}")
                group.add_argument(names[-1], dest=key, action="store_false", help=argparse.SUPPRESS)
            else:
                count = "+" if "tuple" in str(item.type) else None
                group.add_argument(
                    *names, dest=key, type=_as_text if texts[key] else parse_value, help=text, nargs=count
                )
            flags += names
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"command line: unknown key '{flag}'{did_you_mean(flag, flags)}")
    return vars(arguments)
