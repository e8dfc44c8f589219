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

from fourm.data.limits import MAX_ITEMS, MAX_PICKLE_BYTES

_ORDERS: tuple[Literal["C"], Literal["F"]] = ("C", "F")
_CONTAINERS = frozenset({list, tuple, dict})
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


# Instructions of a fixed length, as they follow each other in pickles of plain values and arrays (protocols 2 to 5).
# The group is the end of the pickle.
_FIXED_RUN = re.compile(
    rb"(?:[\x80Khq].|M..|[Jj]....|G........|[()\]}N\x88\x89\x85-\x87\x93\x94tlaesuRb012])*(\.?)", re.DOTALL
)
_GLOBAL, _FRAME, _PUT = b"c\x95r"
_SIZED = {b: size for size, names in ((1, b"\x8cCU\x8a"), (4, b"XBT\x8b"), (8, b"\x8d\x8e")) for b in names}


def check_instructions(content: bytes | memoryview) -> None:
    """Refuse a pickle that would make Python take memory for more than there is, or that is not of plain values.

    ``pickle`` believes every number in it: the length of a string, a place in its table of values.

    Raises:
        pickle.UnpicklingError: such a number, or an instruction that arrays of plain values do not need.
    """
    if len(content) > MAX_PICKLE_BYTES:
        raise pickle.UnpicklingError(f"an array of objects of {len(content)} bytes, more than {MAX_PICKLE_BYTES}")
    content = bytes(content)
    at, end = 0, len(content)
    while at < end:
        run = _FIXED_RUN.match(content, at)
        if run and run.end() > at:
            at = run.end()
            if run[1]:
                return
            continue
        code = content[at]
        if code in _SIZED:
            start = at + 1 + _SIZED[code]
            at = start + int.from_bytes(content[at + 1 : start], "little")
        elif code == _FRAME:
            at += 9
            if int.from_bytes(content[at - 8 : at], "little") > end - at:
                break
        elif code == _PUT:
            if int.from_bytes(content[at + 1 : at + 5], "little") > end:
                raise pickle.UnpicklingError("an array of objects that claims a table larger than itself")
            at += 5
        elif code == _GLOBAL:
            at = content.find(b"\n", content.find(b"\n", at) + 1) + 1 or end + 1
        else:
            raise pickle.UnpicklingError(f"instruction {code} does not belong to an array of plain values")
    raise pickle.UnpicklingError("an array of objects that ends too early")


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
        check_instructions(content)
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
        known: dict[int, tuple[Any, int]] = {}
        items = 0  # of what is made, counted anew at every reference: a few levels of ten references each are millions

        def value(record: Any) -> Any:
            nonlocal items
            if type(record) in _PLAIN:
                return record
            found = known.get(id(record))
            if found is None:
                before = items
                made = new_value(record)
                items += (
                    made.size if isinstance(made, np.ndarray) else len(record) if type(record) in _CONTAINERS else 1
                )
                found = known[id(record)] = made, items - before
            else:
                items += found[1]
            if items > MAX_ITEMS:
                raise pickle.UnpicklingError(f"more than {MAX_ITEMS} values, counted wherever they are referred to")
            return found[0]

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
