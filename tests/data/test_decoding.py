"""npy and npz files are read without pickle and as ``np.load`` would."""

import gzip
import io
import json
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from fourm.data.decoding import decode_value, parse_json


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


@pytest.mark.parametrize("shape", [(2**31,), (2**40, 0), (-1,), (True,), (10**6, 10**6)])
def test_an_npy_cannot_claim_more_than_it_has(shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    with pytest.raises(ValueError):
        decode_value("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def test_compressed_files_are_not_decompressed_beyond_a_limit():
    bomb = gzip.compress(bytes(2**28 + 1), 1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.npy", bytes(2**28 + 1))
    lying = buffer.getvalue().replace((2**28 + 1).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    tracemalloc.start()
    for name, content in (("a.npy.gz", bomb), ("a.json.gz", bomb), ("a.npz", lying), ("a.npz", buffer.getvalue())):
        tracemalloc.reset_peak()
        with pytest.raises((ValueError, zipfile.BadZipFile)):
            decode_value(name, content)
        assert tracemalloc.get_traced_memory()[1] < 2**29 + 2**27
    tracemalloc.stop()


def test_gzip_of_several_streams_and_cut_off_ones():
    parts = gzip.compress(b"[1, ") + gzip.compress(b"2]") + bytes(5)
    assert decode_value("a.json.gz", parts) == [1, 2]
    for damaged in (parts[:-12], gzip.compress(b"[1]")[:-4], b"[1]"):
        with pytest.raises((EOFError, zlib.error)):
            decode_value("a.json.gz", damaged)


@pytest.mark.parametrize(
    "content",
    [
        b'"a dog \\ud83d"',
        b'{"\\uD83D": 1}',
        b'["\xed\xa0\xbd"]',
        b"[" * 100_000 + b"]" * 100_000,
        b'"' + b"a" * 2**24 + b'"',
    ],
    ids=["half an emoji", "in a key", "as bytes", "deep", "long"],
)
def test_json_that_cannot_be_used_is_refused(content):
    with pytest.raises(ValueError):
        decode_value("a.json", content)
    assert decode_value("a.json", b'"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize(
    "content",
    [
        b'{"b": [1, -0, -0.0, 1E5, 5e-324, true, null], "a": {}, "b": "\\u00e9\xc3\xa9"}',
        b"[18446744073709551616, 1]",
        b"-9223372036854775809",
        b"[0.00012345678901234567890123, 123456789012345678]",
        b"[1e400, 1.7976931348623159e308, NaN, -Infinity]",
        b"\xef\xbb\xbf[1]",
        "[1.5]".encode("utf-16"),
    ],
    ids=["plain", "large", "low", "digits", "not finite", "mark", "utf-16"],
)
def test_json_is_the_same_with_orjson(content):
    pytest.importorskip("orjson")
    assert repr(parse_json(content)) == repr(json.loads(content))


def test_json_is_parsed_by_orjson_if_possible(monkeypatch):
    pytest.importorskip("orjson")
    monkeypatch.setattr(json, "loads", None)
    numbers = [0.00012345678901234567, -1e-30, 2**59]
    assert parse_json(json.dumps(numbers).encode()) == numbers
