"""Object arrays are read as ``np.load`` would, and nothing in them is run."""

import io
import os
import pickle

import numpy as np
import pytest

from fourm.data.decoding import decode_value
from fourm.data.object_arrays import read_object_array

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
    assert same(read_object_array(pickle.dumps(array, protocol))[:], array)


def test_npy_files_with_objects_are_read():
    buffer = io.BytesIO()
    np.save(buffer, object_array(VALUES).reshape(2, 2), allow_pickle=True)
    assert same(decode_value("a.npy", buffer.getvalue())[:], object_array(VALUES).reshape(2, 2))
    grid = np.asfortranarray(object_array([1, 2, 3, 4]).reshape(2, 2))
    assert read_object_array(pickle.dumps(grid, 4))[:].tolist() == grid.tolist()


def test_entries_are_made_when_they_are_asked_for_and_once():
    part = np.arange(3)
    read = read_object_array(pickle.dumps(object_array([{"a": part, "b": part}, [part], (part,)]), 4))
    entry = read[0]
    assert read[0] is entry and entry["a"] is entry["b"] and read[1][0] is entry["a"], "what was one object stays one"
    assert len(read) == 3 and read.shape == (3,) and same([*read], [entry, [part], (part,)])
    bad = read_object_array(pickle.dumps(object_array([1, [np.dtype("f4")]]), 4))
    assert bad[0] == 1
    with pytest.raises(pickle.UnpicklingError, match="_Dtype is not a plain value"):
        bad[1]


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
        read_object_array(pickle.dumps(bad(path)[kind], 4))[:]
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
        read_object_array(pickle.dumps(Lies(), 4))[:]
