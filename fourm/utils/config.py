"""YAML files and mappings → typed dataclasses, with errors that name the file and the nearest key."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fourm.utils.errors import UserError, did_you_mean

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-4`` as a string; researchers mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|^[-+]?(\d[\d_]*)?\.\d[\d_]*([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """One YAML scalar or flow value, as typed on a command line: ``1e-4``, ``10_000_000``, ``[0.9, 0.95]``."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: the file is missing, is not YAML, or does not hold a mapping.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
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
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(str(key), allowed)}")


def convert_fields(cls: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of ``mapping``, each converted to the type of the field of that name in the dataclass ``cls``.

    Args:
        where: what error messages name, usually the file.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    check_keys(mapping, (f.name for f in dataclasses.fields(cls) if f.init), where)
    hints = typing.get_type_hints(cls)
    return {key: convert(value, hints[key], f"{where}: '{key}'") for key, value in mapping.items()}


def build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Make the dataclass ``cls`` from a mapping; errors as of :func:`convert_fields`, and for a required key left out."""
    values = convert_fields(cls, mapping, where)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.init and required and f.name not in values:
            raise UserError(f"{where}: the key '{f.name}' is required")
    return cls(**values)


def convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotated type ``hint``; only lossless conversions (``"1e-4"`` → float, 3.0 → int)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in (a for a in args if a is not type(None)):
            try:
                return convert(value, option, where)
            except UserError as error:
                failure = error
        raise failure
    if origin is typing.Literal:
        if value in args:
            return value
        raise UserError(
            f"{where} must be one of {', '.join(map(repr, args))}, not {value!r}"
            + did_you_mean(str(value), [str(a) for a in args])
        )
    if origin in (list, tuple):
        if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
            raise UserError(f"{where} must be a list, not {value!r}")
        item = args[0] if args else Any
        return origin(convert(v, item, where) for v in value)
    if origin is dict or hint is dict or origin is Mapping or hint is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a mapping, not {value!r}")
        item = args[1] if len(args) == 2 else Any
        return {key: convert(v, item, where) for key, v in value.items()}
    if hint in (int, float) and isinstance(value, str):
        value = parse_value(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} must be {_type_name(hint)}, not {value!r}")
    return value


def _type_name(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}.get(hint, str(hint))
