"""npy and npz files are read without pickle and as ``np.load`` would."""

import io
import zipfile

import numpy as np
import pytest

from fourm.data.decoding import decode_value


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(20, dtype=np.int16).reshape(2, 10),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(3),
        np.zeros((0, 5)),
        np.arange(5, dtype=">i4"),
    ],
)
def test_npy_of_any_layout(array):
    decoded = decode_value("a.npy", npy(array))
    assert decoded.dtype == array.dtype and decoded.shape == array.shape and np.array_equal(decoded, array)


def test_npy_of_another_format_version():
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.arange(4), version=(2, 0))
    assert np.array_equal(decode_value("a.npy", buffer.getvalue()), np.arange(4))


@pytest.mark.parametrize("content", [b"", b"PK", npy(np.zeros(9))[:-3]])
def test_damaged_npy_is_refused(content):
    with pytest.raises(ValueError):
        decode_value("a.npy", content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_either_kind(save):
    buffer, arrays = io.BytesIO(), {"emb": np.arange(24, dtype=np.float16).reshape(2, 3, 4), "mask": np.eye(3) > 0}
    save(buffer, **arrays)
    decoded = decode_value("a.npz", buffer.getvalue())
    assert list(decoded) == list(arrays)
    for name, array in arrays.items():
        assert decoded[name].dtype == array.dtype and np.array_equal(decoded[name], array)


def test_npz_is_not_copied_and_damage_is_found():
    buffer = io.BytesIO()
    np.savez(buffer, emb=np.full(1000, 7, np.int16))
    content = buffer.getvalue()
    decoded = decode_value("a.npz", content)["emb"]
    assert np.shares_memory(decoded, np.frombuffer(content, np.uint8))
    at = content.index(b"\7\0" * 100)
    for damaged in (content[: at + 9] + b"x" + content[at + 10 :], content[:-9], b"PK"):
        with pytest.raises((zipfile.BadZipFile, ValueError)):
            decode_value("a.npz", damaged)
