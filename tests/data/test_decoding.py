"""npy files are read without pickle and as ``np.load`` would."""

import io

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
