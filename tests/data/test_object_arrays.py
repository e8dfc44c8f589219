"""Object arrays are read as ``np.load`` would, and nothing in them is run."""

import io
import os
import pickle
import tracemalloc

import numpy as np
import pytest

from fourm.data.decoding import decode_value
from fourm.data.object_arrays import ObjectArray, check_instructions

VALUES = [
    {"points": [[1.5, 2.0]], "token_ids": np.arange(16, dtype=np.int16), "name": "a"},
    [{"points": np.zeros((3, 2), ">f4"), "score": np.float64(0.5)}, (1, None, True)],
    np.array(["ä", "b"]),
    {"nested": np.array([{}, []], dtype=object), "flag": False, b"key": "ä" * 3},
]


def object_array(values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


def same(a, b):
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and all(map(same, a.ravel().tolist(), b.ravel().tolist()))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_values_come_back(protocol):
    array = object_array(VALUES)
    assert same(ObjectArray(pickle.dumps(array, protocol))[:], array)


def test_npy_files_with_objects_are_read():
    buffer = io.BytesIO()
    np.save(buffer, object_array(VALUES).reshape(2, 2), allow_pickle=True)
    assert same(decode_value("a.npy", buffer.getvalue())[:], object_array(VALUES).reshape(2, 2))
    grid = np.asfortranarray(object_array([1, 2, 3, 4]).reshape(2, 2))
    assert ObjectArray(pickle.dumps(grid, 4))[:].tolist() == grid.tolist()
    buffer = io.BytesIO()
    np.save(buffer, np.array({"a": 1}, object), allow_pickle=True)  # one object is no array of them
    with pytest.raises(pickle.UnpicklingError, match="not an array of objects"):
        decode_value("a.npy", buffer.getvalue())


def test_an_entry_is_made_when_it_is_asked_for():
    part = np.arange(3)
    read = ObjectArray(pickle.dumps(object_array([{"a": part, "b": part}, [part], 1, [np.dtype("f4")]]), 4))
    assert len(read) == 4 and read.shape == (4,) and read[2] == 1
    for _ in range(2):
        assert same(read[0], {"a": part, "b": part}) and same(read[1], [part])
        assert read[0]["a"] is not read[1][0] and (entry := read[0])["a"] is entry["b"]
    for index in (3, slice(None)):
        with pytest.raises(pickle.UnpicklingError, match="_Dtype is not a plain value"):
            read[index]


class Runs:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def bad(path):
    ndarray = np.ndarray
    return {
        "a command": Runs(os.system, (f"touch {path}",)),
        "within an array": object_array([1, Runs(os.system, (f"touch {path}",))]),
        "eval": Runs(eval, (f"open({str(path)!r}, 'w')",)),
        "a function of numpy": Runs(np.save, (str(path), 1)),
        "import": Runs(__import__, ("antigravity",)),
        "an array from memory": Runs(ndarray, ((1,), np.dtype("O"), b"AAAAAAAA")),
        "a class": ndarray,
        "no array": [1, 2],
    }


@pytest.mark.parametrize("kind", bad(""))
def test_nothing_is_run(tmp_path, kind):
    path = tmp_path / "ran"
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        ObjectArray(pickle.dumps(bad(path)[kind], 4))[:]
    assert not path.exists()


@pytest.mark.parametrize(
    "state",
    [
        (1, (2,), np.dtype("O"), False, b"A" * 16),  # objects that are addresses
        (1, (2,), np.dtype("i8"), False, [1, 2]),
        (1, (-1,), np.dtype("i8"), False, b"A" * 16),
        (1, (9,), np.dtype("i8"), False, b"A" * 16),
        (1, (1,), np.dtype([("a", "O")]), False, b"A" * 16),
    ],
)
def test_states_that_lie_are_refused(state):
    class Lies:
        def __reduce__(self):
            return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state

    with pytest.raises((pickle.UnpicklingError, ValueError, TypeError)):
        ObjectArray(pickle.dumps(Lies(), 4))[:]


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x04Nr\xff\xff\xff\x7f.",
        b"\x80\x04K.Nr\xff\xff\xff\x7f.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\0\0\0N.",
        b"\x80\x04\x8e\0\0\0\0\xff\0\0\0a.",
        b"\x80\x04X\xff\xff\xff\x7fa.",
        b"\x80\x04\x8f.",
        b"\x80\x04Vp\np2147483647\n.",
        b"\x80\x04N",
        b"",
    ],
    ids=["memo", "memo behind an argument", "frame", "bytes", "text", "set", "text memo", "no end", "empty"],
)
def test_numbers_in_a_pickle_are_not_believed(pickled):
    with pytest.raises(pickle.UnpicklingError):
        ObjectArray(pickled)


MEMO = b"r\xff\xff\xff\x7f"  # a place in the table of values, for which Python would take 32 GB


def rows(*lengths):
    """Alike arrays with so many numbers, as they follow each other in a pickle."""
    array = np.empty(len(lengths), object)
    for index, length in enumerate(lengths):
        array[index] = np.full(
            length, 0x727F7F7F7F727F7F, np.int64
        )  # looks like the claim of a place, wherever it is read
    return pickle.dumps(array, 4)


def parts(pickled, payload):
    """What stands before the first of some equal payloads, from one to the next, and behind the last."""
    first, *middle, last = pickled.split(payload)
    return first, middle, last


@pytest.mark.parametrize("length", [4, 31, 32, 300])
def test_claims_behind_runs_that_are_known_are_found(length):
    pickled = rows(*[length] * 50)
    payload = np.full(length, 0x727F7F7F7F727F7F, np.int64).tobytes()
    before, between, after = parts(pickled, payload)
    check_instructions(pickled)
    assert len(between) == 49 and between[-1] == between[-2]  # so it is known
    for count in (1, 3, 25, 49):
        for at in (0, 1):  # where an instruction begins
            gap = between[-1][:at] + MEMO + between[-1][at:]
            lies = before + payload.join([b"", *between[:count], gap, *between[count:]]) + after
            with pytest.raises(pickle.UnpicklingError, match="table larger than itself"):
                check_instructions(lies)


def test_a_known_run_leads_only_as_far_as_its_own_length():
    pickled = rows(*[32] * 20)
    payload = np.full(32, 0x727F7F7F7F727F7F, np.int64).tobytes()
    before, between, after = parts(pickled, payload)
    header = b"B" + len(payload).to_bytes(4, "little")
    assert between[-1].endswith(header)
    for size in (0, 1, 100, 250):  # of the values; then the rest of them would be instructions
        gap = between[-1][: -len(header)] + b"B" + size.to_bytes(4, "little")
        lies = before + payload + payload.join(between[:9]) + payload + gap + b"\0" * size + MEMO
        lies = lies.ljust(len(pickled), b".")  # what the frame promises
        with pytest.raises(pickle.UnpicklingError, match="table larger than itself"):
            check_instructions(lies)
    cut = before + payload + between[0] + payload + between[1][:-3]
    with pytest.raises(pickle.UnpicklingError):
        check_instructions(cut)


def test_known_runs_are_forgotten_before_they_take_memory():
    many = b"".join(b"K%bK%bC\1a" % (bytes([i % 256]), bytes([i // 256])) for i in range(2**16))
    tracemalloc.start()
    try:
        check_instructions(b"\x80\x04" + many + b".")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    with pytest.raises(pickle.UnpicklingError, match="table larger than itself"):
        check_instructions(b"\x80\x04" + many + MEMO + b".")


def test_references_to_references_are_counted():
    laughs = [0.0] * 10
    for _ in range(9):
        laughs = [laughs] * 10
    with pytest.raises(pickle.UnpicklingError, match="counted at each reference to them"):
        ObjectArray(pickle.dumps(object_array([laughs]), 4))[0]
    itself: list = []
    itself.append(itself)
    with pytest.raises(RecursionError):
        ObjectArray(pickle.dumps(object_array([itself]), 4))[0]


def test_looking_at_a_pickle_takes_no_memory_of_its_own():
    pickled = b"\x80\x04" + b")" * 2**20 + b"h\0" * 2**19 + b"."
    tracemalloc.start()
    try:
        check_instructions(pickled)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
