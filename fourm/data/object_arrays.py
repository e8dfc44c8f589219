"""Read object arrays of npy files without executing their pickles, which may hold only plain values and arrays.

A pickle is a program that names functions and calls them. This module maps each allowed name to an inert record and
rejects all others. The arrays are then built from the contents of these records.
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
_PLAIN_TYPES = frozenset({str, bytes, int, float, bool, type(None)})
_DTYPE = re.compile(r"[biuf][1248]|[US]\d{1,6}|O8?")


class _Record:
    """The arguments of a call that is not made. Its ``__setstate__`` keeps a pickle from setting attributes."""

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("unexpected state of an object")


class _StatefulRecord(_Record):
    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArrayType(_Record):
    """``numpy.ndarray``, which occurs only as an argument."""

    __slots__ = ()


class _Dtype(_StatefulRecord):
    """``dtype("f8", …)`` with the state (version, byte order, …). The arrays of a file share a few of these."""

    __slots__ = ("_value",)

    def value(self) -> np.dtype:
        if not hasattr(self, "_value"):
            name = self.arguments[0]
            order: Any = self.state[1] if self.state else "="
            if not isinstance(name, str) or not _DTYPE.fullmatch(name) or order not in ("<", ">", "=", "|"):
                raise pickle.UnpicklingError(f"unsupported dtype {name!r:.40}")
            self._value = np.dtype(name).newbyteorder(order)
        return self._value


class _Array(list):
    """``_reconstruct(ndarray, …)`` with the state (version, shape, dtype, Fortran order, bytes or list of objects).

    A file has hundreds of these, of which one crop's are used, so creating one calls only functions written in C: the
    arguments are dropped, and a state is appended to the list.
    """

    __slots__ = ()

    __init__ = object.__init__  # type: ignore[assignment]  # list.__init__ would reject the arguments
    __setstate__ = list.append

    def value(self) -> np.ndarray:
        """Return the array; an object array still holds records in place of its values."""
        _, shape, dtype, fortran, content = self[-1]
        kind = dtype.value()
        if type(content) is _Bytes:
            content = content.value()
        if kind.hasobject != isinstance(content, list):
            raise pickle.UnpicklingError("an array whose content does not match its dtype")
        for side in shape:
            if not isinstance(side, int) or side < 0:
                raise pickle.UnpicklingError(f"an array with a side of {side!r:.40}")
        if not kind.hasobject:
            array = np.frombuffer(content, kind, math.prod(shape))
            return array if len(shape) == 1 else array.reshape(shape, order=_ORDERS[bool(fortran)])
        array = np.empty(len(content), object)
        for index, item in enumerate(content):
            array[index] = item
        return array.reshape(shape)  # objects are always listed in C order


class _Scalar(_Record):
    """``scalar(dtype, bytes)``"""

    __slots__ = ()

    def value(self) -> Any:
        dtype, content = self.arguments
        content = content.value() if isinstance(content, _Bytes) else content
        return np.frombuffer(content, dtype.value(), 1)[0]


class _Bytes(_Record):
    """``encode(text, "latin1")``, which represents bytes in pickle protocols before 3."""

    __slots__ = ()

    def value(self) -> bytes:
        return self.arguments[0].encode("latin1")


_VALUE_RECORDS = frozenset({_Array, _Scalar, _Bytes})
_RECORD_TYPES: dict[tuple[str, str], type[_Record] | type[_Array]] = {
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    ("_codecs", "encode"): _Bytes,
}


# A run of fixed-length instructions from pickles of plain values and arrays (protocols 2 to 5), optionally followed by
# the end of the pickle or by an instruction with a 1-byte or 4-byte length. The repetition is bounded because the
# regular expression engine needs 120 bytes per repetition.
_RUN = re.compile(
    rb"(?:[\x80Khq].|r..\0\0|[()\]}N\x88\x89\x85-\x87\x93\x94tlaesuRb012]+|M..|[Jj]....|G........){0,500}"
    rb"(?:(\.)|([\x8cCU\x8a].)|([XBT\x8b]....))?",
    re.DOTALL,
)
_END, _LENGTH, _LONG_LENGTH = 1, 2, 3  # groups
_MAX_KNOWN_RUNS, _MAX_KNOWN_LENGTH = 1000, 100  # runs that are remembered per pickle, and bytes of each
_GLOBAL, _FRAME, _PUT, _EIGHT = b"c\x95r\x8d"
_BYTES8 = 0x8E


def check_instructions(content: bytes | memoryview) -> None:
    """Reject a pickle that would allocate more memory than its size justifies, or that holds more than plain values.

    ``pickle`` trusts every number in its input, such as the length of a string or an index into the memo table.

    The arrays in a pickle look alike: the same few instructions, as the same bytes, connect one array with the next.
    The same bytes at the start of an instruction are the same instructions, so each run is parsed only once and its
    length remembered.

    Raises:
        pickle.UnpicklingError: The pickle holds such a number, or an instruction that arrays of plain values do not
            need.
    """
    if len(content) > MAX_PICKLE_BYTES:
        raise pickle.UnpicklingError(f"an object array of {len(content)} bytes exceeds the limit of {MAX_PICKLE_BYTES}")
    content = bytes(content)
    at, end, match = 0, len(content), _RUN.match
    known: dict[bytes, int] = {}  # run that ends with a length → distance from its start to the next run
    following: dict[int, int] = {}  # size of a run → size of the run that followed it last time
    size = 0
    while at < end:
        expected = following.get(size, 0)
        if step := known.get(content[at : at + expected]):
            at, size = at + step, expected
            continue
        run = match(content, at)
        start, at = at, run.end()  # type: ignore[union-attr]  # the pattern always matches, possibly the empty string
        before, size = size, at - start
        kind = run.lastindex  # type: ignore[union-attr]
        if kind == _END:
            return
        if kind in (_LENGTH, _LONG_LENGTH):
            at += content[at - 1] if kind == _LENGTH else int.from_bytes(content[at - 4 : at], "little")
            if size <= _MAX_KNOWN_LENGTH:
                following[before] = size
                if len(known) < _MAX_KNOWN_RUNS:
                    known[content[start : start + size]] = at - start
        elif not size:
            at = _skip_instruction(content, at)
    raise pickle.UnpicklingError("the pickle of an object array is cut off")


def _skip_instruction(content: bytes, at: int) -> int:
    """Return where the next instruction begins after one of the less common allowed instructions."""
    code, end = content[at], len(content)
    number = int.from_bytes(content[at + 1 : at + 9], "little")
    if code in (_EIGHT, _BYTES8):
        return at + 9 + number
    if code == _FRAME:
        return at + 9 if number <= end - at - 9 else end
    if code == _PUT:
        if number & 0xFFFFFFFF > end:
            raise pickle.UnpicklingError("an object array that claims a memo table larger than itself")
        return at + 5
    if code == _GLOBAL:
        return content.find(b"\n", content.find(b"\n", at) + 1) + 1 or end
    raise pickle.UnpicklingError(f"pickle instruction {code} is not allowed in an array of plain values")


class _PickleFile(io.BytesIO):
    """A file with ``peek``, because the unpickler reads files without it a few bytes at a time."""

    def peek(self, size: int) -> bytes:
        return self.getvalue()[self.tell() :]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Record] | type[_Array]:
        if (module, name) not in _RECORD_TYPES:
            raise pickle.UnpicklingError(f"{module}.{name} is not a plain value or an array")
        return _RECORD_TYPES[module, name]


class ObjectArray(Sequence[Any]):
    """An object array that is kept as a pickle; its entries are built whenever they are accessed.

    Only one of a sample's crops is used per repeat. If all entries were kept as objects until the sample's next repeat,
    every garbage collection would have to traverse them.

    Attributes:
        shape: Shape of the array; the entries lie along the first axis.

    Raises:
        pickle.UnpicklingError: The pickle is not an object array, or names something that would be called.
    """

    def __init__(self, content: bytes | memoryview):
        check_instructions(content)
        self._content = content
        self._loaded: np.ndarray | None = self._load()  # for the first access
        self.shape = self._loaded.shape

    def _load(self) -> np.ndarray:
        record = _Unpickler(_PickleFile(self._content)).load()
        array = record.value() if isinstance(record, _Array) else None
        if array is None or not array.dtype.hasobject or not array.ndim:
            raise pickle.UnpicklingError("not an array of objects")
        return array

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """Return one entry, or an array of several: numbers, strings, None, lists, tuples, dicts and arrays of these.

        Raises:
            pickle.UnpicklingError: The entry holds anything else, or too many values.
        """
        records = self._load() if self._loaded is None else self._loaded
        self._loaded = None
        known: dict[int, Any] = {}
        sizes: dict[int, int] = {}
        items = 0  # counts an object at every reference, because a few levels of ten references each make millions

        def value(record: Any) -> Any:
            nonlocal items
            kind = type(record)
            if kind in _PLAIN_TYPES:
                return record
            key = id(record)
            if key in known:
                items += sizes[key]
                return known[key]
            before = items
            made: Any
            if kind in _VALUE_RECORDS:
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
                raise pickle.UnpicklingError(f"more than {MAX_ITEMS} values, counted at each reference to them")
            known[key], sizes[key] = made, items - before
            return made

        def filled(array: np.ndarray) -> np.ndarray:
            for position, record in enumerate(array.flat):
                array.flat[position] = value(record)
            return array

        record = records[index]
        return filled(record) if isinstance(record, np.ndarray) else value(record)
