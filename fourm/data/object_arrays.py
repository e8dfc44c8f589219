"""Object arrays of npy files, read without running anything: their pickles may hold plain values and arrays only.

A pickle is a program that names functions and calls them. Here every name stands for an inert record of this module, or is
an error; the arrays are made afterwards, from what the records say.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from typing import Any, Literal

import numpy as np

_ORDERS: tuple[Literal["C"], Literal["F"]] = ("C", "F")
_DTYPE = re.compile(r"[biuf][1248]|[US]\d{1,6}|O8?")


class _Record:
    """What a call would have got; unlike a class without it, nothing can be set through ``__setstate__``."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state where none belongs")


class _Stated(_Record):
    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Type(_Record):
    """``numpy.ndarray``, only ever an argument."""


class _Dtype(_Stated):
    """``dtype("f8", …)``; the state begins (version, byte order, …)."""

    def value(self) -> np.dtype:
        name = self.arguments[0]
        order: Any = self.state[1] if self.state else "="
        if not isinstance(name, str) or not _DTYPE.fullmatch(name) or order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"a type of values that is not read: {name!r:.40}")
        return np.dtype(name).newbyteorder(order)


class _Array(_Stated):
    """``_reconstruct(ndarray, …)``; the state is (version, shape, dtype, Fortran order, bytes or a list of objects)."""

    def value(self, resolve: Any) -> np.ndarray:
        _, shape, dtype, fortran, content = self.state
        content = resolve(content)
        kind, order = dtype.value(), _ORDERS[bool(fortran)]
        if kind.hasobject != isinstance(content, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array whose content is not of its type")
        if not isinstance(content, list):
            return np.frombuffer(content, kind, math.prod(shape)).reshape(shape, order=order)
        array = np.empty(len(content), object)
        for index, item in enumerate(content):
            array[index] = item
        return array.reshape(shape)  # objects are listed row by row in any case


class _Scalar(_Record):
    """``scalar(dtype, bytes)``"""

    def value(self, resolve: Any) -> Any:
        return np.frombuffer(resolve(self.arguments[1]), self.arguments[0].value(), 1)[0]


class _Bytes(_Record):
    """``encode(text, "latin1")``, how bytes were written before version 3 of pickles."""

    def value(self, resolve: Any) -> bytes:
        return self.arguments[0].encode("latin1")


_NAMES: dict[tuple[str, str], type[_Record]] = {
    ("numpy", "ndarray"): _Type,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    ("_codecs", "encode"): _Bytes,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Record]:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} is not a plain value or an array")
        return _NAMES[module, name]


def read_object_array(content: bytes) -> np.ndarray:
    """The array that a pickle holds: of numbers, strings, None, lists, tuples, dicts and arrays of these.

    Raises:
        pickle.UnpicklingError: it holds anything else.
    """
    known: dict[int, Any] = {}

    def resolve(value: Any) -> Any:
        if id(value) not in known:
            known[id(value)] = _resolved(value)
        return known[id(value)]

    def _resolved(value: Any) -> Any:
        if isinstance(value, (_Array, _Scalar, _Bytes)):
            return value.value(resolve)
        if isinstance(value, (_Record, type)):
            raise pickle.UnpicklingError("a name that is not a value")
        if isinstance(value, dict):
            return {resolve(key): resolve(item) for key, item in value.items()}
        return type(value)(map(resolve, value)) if isinstance(value, (list, tuple)) else value

    array = resolve(_Reader(io.BytesIO(content)).load())
    if not isinstance(array, np.ndarray):
        raise pickle.UnpicklingError(f"not an array, but {type(array).__name__}")
    return array
