"""Convert YAML files and mappings to typed dataclasses, with errors that name the file and the nearest key."""

from __future__ import annotations

import dataclasses
import inspect
import math
import stat
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.paths import PathKind, expand_path, locate
from fourm.utils.yaml_text import BadYaml, parse_yaml

T = TypeVar("T")
_MAX_BYTES = 16 * 2**20  # size limit of a configuration file


def parse_value(text: str) -> Any:
    """Parse a YAML value such as ``1e-4``, ``10_000_000`` or ``[0.9, 0.95]``; text that is not YAML is returned."""
    try:
        return parse_yaml(text)
    except BadYaml:
        return text


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: If the file is missing, is not YAML in UTF-8, or does not hold a mapping.
    """
    path = Path(expand_path(str(path), "config file"))
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"the config file {path} is {'a folder' if path.is_dir() else 'not a regular file'}")
        if status.st_size > _MAX_BYTES:
            raise UserError(f"the config file {path} is too large: more than {_MAX_BYTES >> 20} MiB")
        content = parse_yaml(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 (byte {error.start}); save it in that encoding") from error
    except BadYaml as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, not a {type(content).__name__}")
    return content


def check_keys(mapping: Mapping[str, Any], allowed: typing.Iterable[str], where: str) -> None:
    """Raise a :class:`UserError` for the first key of ``mapping`` that is not ``allowed``."""
    allowed = list(allowed)
    for key in mapping:
        if key not in allowed:
            raise UserError(f"{where}: unknown key {shorten(key)}{did_you_mean(str(key)[:100], allowed)}")


def shorten(value: Any) -> str:
    """Return the ``repr`` of a value, truncated to fit into a message."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}…"


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of the number that a key may have, or of each number of a list.

    Attributes:
        at_least: Smallest allowed number.
        above: Number that the value must exceed.
        at_most: Largest allowed number.
        below: Number that the value must stay below.
        unset: A number outside these bounds which means that the key is not set.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    unset: float | None = None

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        text = " and ".join(f"{name} {_format_number(bound)}" for name, bound in bounds.items() if bound is not None)
        return text if self.unset is None else f"{text}, or {_format_number(self.unset)} for none"

    def check(self, value: Any, where: str) -> None:
        """Raise a :class:`UserError` for a number that is out of bounds or not finite; other types are not checked."""
        if isinstance(value, (list, tuple)):
            for item in value:
                self.check(item, where)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value == self.unset:
            return
        if not (
            (isinstance(value, int) or math.isfinite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        ):
            raise UserError(f"{where} must be {self}, not {shorten(value)}")


def _format_number(number: float) -> str:
    return f"{number:.6g}" if isinstance(number, float) else str(number)


def convert_fields(
    cls: type, mapping: Mapping[str, Any], where: str, config: str | Path | None = None
) -> dict[str, Any]:
    """Convert each value of ``mapping`` to the type of the field of that name in the dataclass ``cls``.

    A text that is null or empty is replaced by the field's default, or left out if there is none.

    Args:
        cls: The dataclass.
        mapping: Field name → value, as read from YAML.
        where: The prefix of error messages, usually the file name.
        config: The file that contains the mapping; paths in it may be relative to its folder.

    Raises:
        UserError: If a key is unknown, a value has the wrong type, or a number is out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    check_keys(mapping, fields, where)
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        place = f"{where}: '{key}'"
        if is_unset(value, hints[key], place):
            values |= _default(fields[key])
            continue
        values[key] = convert(value, hints[key], place, config)
        if "range" in fields[key].metadata:
            fields[key].metadata["range"].check(values[key], place)
    return values


def convert_arguments(
    function: Callable[..., Any], mapping: Mapping[str, Any], where: str, ranges: Mapping[str, Range]
) -> dict[str, Any]:
    """Apply :func:`convert_fields` to the parameters of a function or class; parameters that are not set are left out.

    Args:
        function: The function or class.
        mapping: Parameter name → value, as read from YAML.
        where: The prefix of error messages.
        ranges: Parameter name → bounds of its value.
    """
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    check_keys(mapping, known, where)
    try:
        hints = typing.get_type_hints(
            vars(function).get("__init__", function) if isinstance(function, type) else function
        )
    except NameError:  # annotations of user-defined classes may not be importable
        hints = {}
    fields = []
    for name in known:
        field = dataclasses.field(default=None, metadata={"range": ranges.get(name, Range())})
        fields.append((name, _plain_hint(hints.get(name, Any)), field))
    given = convert_fields(dataclasses.make_dataclass("Arguments", fields), mapping, where)
    return {name: value for name, value in given.items() if value is not None}


def _plain_hint(hint: Any) -> Any:
    """Return the annotation if it consists of plain types, and ``Any`` otherwise."""
    return hint if {*map(_hashable, _parts(hint))} <= {int, float, bool, str, dict, list, type(None)} else Any


def resolve_options(options: Any) -> None:
    """Expand the paths and check the numbers of an options dataclass, in place; it may have been built in Python.

    Raises:
        UserError: If a number is out of range, or a required path is empty.
    """
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if "range" in field.metadata:
            field.metadata["range"].check(value, f"'{field.name}'")
        if isinstance(value, str) and (kind := _path_kind(hints[field.name])):
            if not value.strip() and not kind.may_be_empty:
                raise UserError(f"'{field.name}' must not be empty")
            object.__setattr__(options, field.name, expand_path(value, f"'{field.name}'"))


def is_text(hint: Any) -> bool:
    """Return whether an annotation stands for text only: a name or a path, possibly optional."""
    parts = [hint for hint in _parts(hint) if hint is not type(None)]
    return all(hint is str or _path_kind(hint) is not None for hint in parts)


def is_unset(value: Any, hint: Any, where: str) -> bool:
    """Return whether ``value`` is null or empty where text, a list or a mapping is expected: the key counts as not set.

    Raises:
        UserError: If the path of an output is empty.
    """
    if isinstance(value, str) and is_text(hint) and not value.strip():
        kind = _path_kind(hint)
        if kind and not kind.may_be_empty:
            raise UserError(f"{where} must not be empty; leave it out to use its default")
        return True
    parts = _parts(hint)
    return value is None and type(None) not in parts and not {int, float, bool, Any} & {*map(_hashable, parts)}


def _hashable(hint: Any) -> Any:
    return hint if isinstance(hint, typing.Hashable) else None


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _path_kind(hint: Any) -> PathKind | None:
    """Return how an annotation interprets paths, or None if it has no path among its alternatives."""
    for part in _parts(hint):
        for extra in getattr(part, "__metadata__", ()):
            if isinstance(extra, PathKind):
                return extra
    return None


def _default(field: dataclasses.Field) -> dict[str, Any]:
    """Return the field's name and default as a dictionary, which is empty if there is no default."""
    if field.default is not dataclasses.MISSING:
        return {field.name: field.default}
    if field.default_factory is not dataclasses.MISSING:
        return {field.name: field.default_factory()}
    return {}


def build(cls: type[T], mapping: Mapping[str, Any], where: str, config: str | Path | None = None) -> T:
    """Build the dataclass ``cls`` from a mapping: :func:`convert_fields`, then :func:`make`."""
    return make(cls, convert_fields(cls, mapping, where, config), where)


def make(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass ``cls`` from converted values.

    Raises:
        UserError: If a required key is missing.
    """
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.init and not _default(field) and field.name not in values:
            raise UserError(f"{where}: the key '{field.name}' is required")
    return cls(**values)


def convert(value: Any, hint: Any, where: str, config: str | Path | None = None) -> Any:
    """Convert ``value`` to the annotated type ``hint`` where this is lossless (``"1e-4"`` → float, 3.0 → int).

    Args:
        value: A value as read from YAML or a command line.
        hint: The type annotation.
        where: The prefix of error messages.
        config: See :func:`convert_fields`.

    Raises:
        UserError: If the value has a different type, or is a number that is not finite.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        _check_finite(value, where)
        return value
    if origin is typing.Annotated:
        text = convert(value, args[0], where)
        kind = _path_kind(hint)
        if kind is None:
            return text
        text = expand_path(text, where)
        return locate(text, config) if kind.relative_to_config else text
    if origin in (typing.Union, types.UnionType):
        if type(value) in args:  # keep the type: 1.0 may be a fraction where 1 is a count
            return convert(value, type(value), where, config)
        for alternative in (arg for arg in args if arg is not type(None)):
            try:
                return convert(value, alternative, where, config)
            except UserError as error:
                failure = error
        raise failure
    if origin is typing.Literal:
        if value in args:
            return value
        raise UserError(
            f"{where} must be one of {', '.join(map(repr, args))}, not {shorten(value)}"
            + did_you_mean(str(value)[:100], [str(arg) for arg in args])
        )
    if origin in (list, tuple):
        if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
            raise UserError(f"{where} must be a list, not {shorten(value)}")
        item = args[0] if args else Any
        return origin(convert(v, item, where, config) for v in value)
    if origin is dict or hint is dict or origin is Mapping or hint is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a mapping, not {shorten(value)}")
        item = args[1] if len(args) == 2 else Any
        return {_key(key, where): convert(v, item, f"{where}: {_key(key, where)}", config) for key, v in value.items()}
    if hint in (int, float) and isinstance(value, str):
        value = parse_value(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    if hint in (int, float):
        _check_finite(value, where)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} must be {_type_name(hint)}, not {shorten(value)}")
    return value


def _type_name(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}.get(hint, str(hint))


def _key(key: Any, where: str) -> str:
    """Return a key of a mapping as text; numbers are allowed."""
    if isinstance(key, str) or (isinstance(key, (int, float)) and not isinstance(key, bool)):
        return str(key)
    raise UserError(f"{where}: keys must be text, not {shorten(key)}; put the key in quotes")


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, not {value}")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, f"{where}: {_key(key, where)}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_finite(item, where)
