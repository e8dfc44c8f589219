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


_VALUES = frozenset({_Array, _Scalar, _Bytes})
_NAMES: dict[tuple[str, str], type[_Record]] = {
    ("numpy", "ndarray"): _Type,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    ("_codecs", "encode"): _Bytes,
}


# Instructions of a fixed length, as they follow each other in pickles of plain values and arrays (protocols 2 to 5), and
# after some of them the end of the pickle, or one that says its length in 1 or 4 bytes. Unless bounded, the repetition would
# take 120 bytes a round.
_RUN = re.compile(
    rb"(?:[\x80Khq].|r..\0\0|[()\]}N\x88\x89\x85-\x87\x93\x94tlaesuRb012]+|M..|[Jj]....|G........){0,500}"
    rb"(?:(\.)|([\x8cCU\x8a].)|([XBT\x8b]....))?",
    re.DOTALL,
)
_END, _LENGTH, _LONG_LENGTH = 1, 2, 3  # groups
_MOST_KNOWN, _LONGEST_KNOWN = 1000, 100  # runs of instructions, bytes of one: so many are remembered within a pickle
_GLOBAL, _FRAME, _PUT, _EIGHT = b"c\x95r\x8d"
_BYTES8 = 0x8E


def check_instructions(content: bytes | memoryview) -> None:
    """Refuse a pickle that would make Python take memory for more than there is, or that is not of plain values.

    ``pickle`` believes every number in it: the length of a string, a place in its table of values.

    Arrays look alike: from the bytes of one to those of the next there are the same few instructions over and over, as
    the same bytes. Wherever an instruction begins, the same bytes are the same instructions, so it is enough to look at
    each such run once and to know how far it leads.

    Raises:
        pickle.UnpicklingError: such a number, or an instruction that arrays of plain values do not need.
    """
    if len(content) > MAX_PICKLE_BYTES:
        raise pickle.UnpicklingError(f"an array of objects of {len(content)} bytes, more than {MAX_PICKLE_BYTES}")
    content = bytes(content)
    at, end, match = 0, len(content), _RUN.match
    known: dict[bytes, int] = {}  # a run that ends with a length → from its begin to that of the next one
    following: dict[int, int] = {}  # size of a run → size of the one that came next the last time
    size = 0
    while at < end:
        expected = following.get(size, 0)
        if step := known.get(content[at : at + expected]):
            at, size = at + step, expected
            continue
        run = match(content, at)
        start, at = at, run.end()  # type: ignore[union-attr]  # it matches nothing, too
        before, size = size, at - start
        kind = run.lastindex  # type: ignore[union-attr]
        if kind == _END:
            return
        if kind in (_LENGTH, _LONG_LENGTH):
            at += content[at - 1] if kind == _LENGTH else int.from_bytes(content[at - 4 : at], "little")
            if size <= _LONGEST_KNOWN:
                following[before] = size
                if len(known) < _MOST_KNOWN:
                    known[content[start : start + size]] = at - start
        elif not size:
            at = _after_rare(content, at)
    raise pickle.UnpicklingError("an array of objects that ends too early")


def _after_rare(content: bytes, at: int) -> int:
    """Where the next instruction stands after one of the others that there may be."""
    code, end = content[at], len(content)
    number = int.from_bytes(content[at + 1 : at + 9], "little")
    if code in (_EIGHT, _BYTES8):
        return at + 9 + number
    if code == _FRAME:
        return at + 9 if number <= end - at - 9 else end
    if code == _PUT:
        if number & 0xFFFFFFFF > end:
            raise pickle.UnpicklingError("an array of objects that claims a table larger than itself")
        return at + 5
    if code == _GLOBAL:
        return content.find(b"\n", content.find(b"\n", at) + 1) + 1 or end
    raise pickle.UnpicklingError(f"instruction {code} does not belong to an array of plain values")


class _Source(io.BytesIO):
    """All at once, as the unpickler asks a file that cannot be looked into for every few bytes."""

    def peek(self, size: int) -> bytes:
        return self.getvalue()[self.tell() :]


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
        record = _Reader(_Source(self._content)).load()
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
        sizes: dict[int, int] = {}
        items = 0  # of what is made, counted anew at every reference: a few levels of ten references each are millions

        def value(record: Any) -> Any:
            nonlocal items
            kind = type(record)
            if kind in _PLAIN:
                return record
            key = id(record)
            if key in known:
                items += sizes[key]
                return known[key]
            before = items
            made: Any
            if kind in _VALUES:
                made = record.value()
                if kind is _Array:
                    items += made.size
                    if made.dtype.hasobject:
                        filled(made)
                else:
                    items += 1
            elif kind is dict:
                items += len(record)
                made = {value(name): value(item) for name, item in record.items()}
            elif kind is list or kind is tuple:
                items += len(record)
                made = kind(map(value, record))
            else:
                raise pickle.UnpicklingError(f"{kind.__name__} is not a plain value or an array")
            if items > MAX_ITEMS:
                raise pickle.UnpicklingError(f"more than {MAX_ITEMS} values, counted wherever they are referred to")
            known[key], sizes[key] = made, items - before
            return made

        def filled(array: np.ndarray) -> np.ndarray:
            for position, record in enumerate(array.flat):
                array.flat[position] = value(record)
            return array

        found = records[index]
        return filled(found) if isinstance(found, np.ndarray) else value(found)
