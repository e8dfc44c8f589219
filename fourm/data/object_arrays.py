"""Object arrays of npy files, read without running anything: their pickles may hold plain values and arrays only.

A pickle is a program that names functions and calls them. Here every name stands for an inert record of this module, or is
an error; the arrays are made afterwards, from what the records say.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

_ORDERS: tuple[Literal["C"], Literal["F"]] = ("C", "F")
_PLAIN = frozenset({str, bytes, int, float, bool, type(None)})
_DTYPE = re.compile(r"[biuf][1248]|[US]\d{1,6}|O8?")


class _Record:
    """What a call would have got; unlike a class without it, nothing can be set through ``__setstate__``."""

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state where none belongs")


class _Stated(_Record):
    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Type(_Record):
    """``numpy.ndarray``, only ever an argument."""

    __slots__ = ()


class _Dtype(_Stated):
    """``dtype("f8", …)``; the state begins (version, byte order, …). All arrays of a file share a few of them."""

    __slots__ = ("_value",)

    def value(self) -> np.dtype:
        if not hasattr(self, "_value"):
            name = self.arguments[0]
            order: Any = self.state[1] if self.state else "="
            if not isinstance(name, str) or not _DTYPE.fullmatch(name) or order not in ("<", ">", "=", "|"):
                raise pickle.UnpicklingError(f"a type of values that is not read: {name!r:.40}")
            self._value = np.dtype(name).newbyteorder(order)
        return self._value


class _Array(_Stated):
    """``_reconstruct(ndarray, …)``; the state is (version, shape, dtype, Fortran order, bytes or a list of objects)."""

    __slots__ = ()

    def value(self) -> np.ndarray:
        """Of objects: with the records that stand for them."""
        _, shape, dtype, fortran, content = self.state
        kind = dtype.value()
        if isinstance(content, _Bytes):
            content = content.value()
        if kind.hasobject != isinstance(content, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array whose content is not of its type")
        if not kind.hasobject:
            return np.frombuffer(content, kind, math.prod(shape)).reshape(shape, order=_ORDERS[bool(fortran)])
        array = np.empty(len(content), object)
        for index, item in enumerate(content):
            array[index] = item
        return array.reshape(shape)  # objects are listed row by row in any case


class _Scalar(_Record):
    """``scalar(dtype, bytes)``"""

    __slots__ = ()

    def value(self) -> Any:
        dtype, content = self.arguments
        content = content.value() if isinstance(content, _Bytes) else content
        return np.frombuffer(content, dtype.value(), 1)[0]


class _Bytes(_Record):
    """``encode(text, "latin1")``, how bytes were written before version 3 of pickles."""

    __slots__ = ()

    def value(self) -> bytes:
        return self.arguments[0].encode("latin1")


_VALUES = (_Array, _Scalar, _Bytes)
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


class ObjectArray(Sequence[Any]):
    """An array of objects that stays a pickle, from which an entry is made each time that it is asked for.

    Of a sample's crops one is looked at. Thousands of objects that wait for a sample's next repeat would be walked through
    by every garbage collection.

    Attributes:
        shape: of the array; its entries are those along the first axis.

    Raises:
        pickle.UnpicklingError: the pickle is none of such an array, or names anything that is called.
    """

    def __init__(self, content: bytes | memoryview):
        self._content = content
        self._loaded: np.ndarray | None = self._load()  # for the first one who asks
        self.shape = self._loaded.shape

    def _load(self) -> np.ndarray:
        record = _Reader(io.BytesIO(self._content)).load()
        array = record.value() if isinstance(record, _Array) else None
        if array is None or not array.dtype.hasobject or not array.ndim:
            raise pickle.UnpicklingError("not an array of objects")
        return array

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """The entry, or the array of some entries: numbers, strings, None, lists, tuples, dicts and arrays of these.

        Raises:
            pickle.UnpicklingError: it holds anything else.
        """
        records = self._load() if self._loaded is None else self._loaded
        self._loaded = None
        known: dict[int, Any] = {}

        def value(record: Any) -> Any:
            if type(record) in _PLAIN:
                return record
            if id(record) not in known:
                known[id(record)] = new_value(record)
            return known[id(record)]

        def new_value(record: Any) -> Any:
            kind = type(record)
            if kind in _VALUES:
                made = record.value()
                return filled(made) if kind is _Array and made.dtype.hasobject else made
            if kind is dict:
                return {value(key): value(item) for key, item in record.items()}
            if kind is list or kind is tuple:
                return kind(map(value, record))
            raise pickle.UnpicklingError(f"{kind.__name__} is not a plain value or an array")

        def filled(array: np.ndarray) -> np.ndarray:
            for position, record in enumerate(array.flat):
                array.flat[position] = value(record)
            return array

        found = records[index]
        return filled(found) if isinstance(found, np.ndarray) else value(found)
