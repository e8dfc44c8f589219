"""A dataclass of options → a command line: its fields are the single list of names, types, defaults and help texts."""

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

from fourm.utils.config import Range, build, is_text, parse_value, settle
from fourm.utils.errors import UserError, did_you_mean

T = TypeVar("T")


class Options:
    """Base of groups of options: dataclasses that stand beside the code that they configure.

    The options of a command are a dataclass that inherits from the groups it is made of, so that its keys are flat and a
    function that needs a group takes the whole. ``--help`` shows each group under the first line of its docstring. A group
    may define ``check``, which raises a :class:`UserError` for values that do not go together.
    """

    def __post_init__(self) -> None:
        settle(self)
        for group in type(self).__mro__:
            if "check" in vars(group):
                vars(group)["check"](self)


def option(
    text: str, default: Any = MISSING, *, at_least: float | None = None, above: float | None = None,
    at_most: float | None = None, below: float | None = None, unset: float | None = None, alias: str = "",
    fixed: bool = False,
) -> Any:  # fmt: skip
    """A field with its help text; required if it has no default.

    Args:
        at_least, above, at_most, below: bounds of its number, or of each of its numbers; see :class:`Range`.
        unset: a number out of these bounds that means "not set".
        alias: another name of the key.
        fixed: the value decides over the weights that a training run ends with, so that a run resumes with the same one.
    """
    bounds = Range(at_least, above, at_most, below, unset)
    metadata: dict[str, Any] = {"help": text, "alias": alias, "fixed": fixed}
    if bounds != Range():
        metadata["range"] = bounds
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def option_group(text: str, cls: type) -> Any:
    """A field that holds a dataclass of options, or None; on the command line their names begin with the field's:
    ``sr`` → ``--sr_model``."""
    return field(default=None, metadata={"help": text, "options": cls})


def flat_options(cls: type) -> list[str]:
    """The names of all options, those of groups too."""
    return [f"{prefix}{item.name}" for prefix, _, items in _groups(cls) for item in items]


def aliases(cls: type) -> dict[str, str]:
    """Other name → key."""
    return {item.metadata["alias"]: item.name for item in dataclasses.fields(cls) if item.metadata.get("alias")}


def _groups(cls: type) -> list[tuple[str, str, list[dataclasses.Field]]]:
    """Prefix, title and fields: the own options of ``cls``, the groups it inherits from, the groups in its fields."""
    owner = {name: group for group in reversed(cls.__mro__) for name in inspect.get_annotations(group)}
    found = []
    for group in (cls, *(base for base in reversed(cls.__mro__) if base is not cls)):
        fields = [
            item for item in dataclasses.fields(cls) if owner[item.name] is group and "options" not in item.metadata
        ]
        if fields:
            title = "" if group is cls else (group.__doc__ or "").partition("\n")[0].rstrip(".")
            found.append(("", title, fields))
    nested = [item for item in dataclasses.fields(cls) if "options" in item.metadata]
    found += [
        (f"{item.name}_", item.metadata["help"], list(dataclasses.fields(item.metadata["options"]))) for item in nested
    ]
    return found


def _texts(cls: type) -> dict[str, bool]:
    """Option → whether its value is text, to be taken as it is typed: ``007`` is a name, and ``~`` a folder."""
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
    """The options that ``--key value`` arguments give; see :func:`parse_overrides`.

    Args:
        positional: keys that the first arguments stand for, where these come without a ``--key``.

    Raises:
        UserError: also for a missing key, or a bad value.
    """
    argv = sys.argv[1:] if argv is None else argv
    bare = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    if len(bare) > len(positional):
        raise UserError(f"command line: '{bare[len(positional)]}' follows no key")
    named = [part for key, value in zip(positional, bare, strict=False) for part in (f"--{key}", value)]
    return build(cls, parse_overrides(cls, [*named, *argv[len(bare) :]], description), "command line")


def parse_overrides(cls: type, argv: list[str] | None, description: str, config_file: bool = False) -> dict[str, Any]:
    """The fields of ``cls`` that the command line sets; switches come in pairs ``--key`` / ``--no_key``.

    Those of groups are there by their flat names.

    Args:
        config_file: ``--config FILE`` is an argument too, and its path part of the result.

    Raises:
        UserError: an unknown key (names the nearest).
        SystemExit: after ``--help``.
    """
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
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
            names = [f"--{key}", *([f"--{alias}"] if alias else [])]
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
