"""Folders: joined by key, shared out between streams."""

import itertools
import os

import pytest

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.folders import Folders
from fourm.data.raw_sample import BadSample, OpenFiles
from fourm.utils.errors import DataError, UserError
from tests.data.dataset_files import write_folders

WANTED = {"rgb@224": "rgb", "caption": "caption", "tok_rgb@224": "tok_rgb", "crop_settings": "crop_settings"}
NAMES = {"tok_rgb": "tok_rgb@224"}


def _ledger(max_bad_fraction=1.0):
    return BadSampleLedger("toy", max_bad_fraction)


def test_joined_by_key_below_the_modality_folder(tmp_path, caplog):
    root = write_folders(tmp_path, 6, leave_out={("caption", 2), ("rgb", 5)})
    samples = Folders(root, WANTED, NAMES, _ledger()).all(_ledger())
    assert [s.key for s in samples] == ["part0/00000", "part0/00004", "part1/00001", "part1/00003"]
    for s in samples:
        values = s.values(OpenFiles(), keep_pixels=False)
        assert int(values["caption"][0].split()[1][1:]) == values["tok_rgb@224"][0, 0] // 3 == int(s.key[-5:])
    assert f"{tmp_path}/caption: no file for key 'part0/00002'" in caplog.text
    assert f"{tmp_path}/rgb: no file for key 'part1/00005'" in caplog.text


def test_brackets_choose_folders(tmp_path):
    root = write_folders(tmp_path, 3)
    assert len(Folders(f"{root}/[caption]", {"caption": "caption"}, None, _ledger()).all(_ledger())) == 3
    with pytest.raises(UserError, match="no folder for modality rgb@224"):
        Folders(f"{root}/[caption]", {"rgb@224": "rgb"}, None, _ledger())


def test_streams_share_out_each_pass(tmp_path):
    folders = Folders(write_folders(tmp_path, 5), WANTED, NAMES, _ledger())

    def keys(stream, num_streams, count, epoch=0):
        draws = folders.draw((0, "order", epoch), stream, num_streams, _ledger())
        return [s.key for s in itertools.islice(draws, count)]

    everything = keys(0, 1, 10)
    assert len(set(everything[:5])) == len(set(everything[5:])) == 5 and everything[:5] != everything[5:]
    assert [key for pair in zip(keys(0, 2, 5), keys(1, 2, 5), strict=True) for key in pair] == everything
    assert len(keys(6, 8, 3)) == 3  # more streams than samples
    assert keys(0, 1, 10, epoch=1) != everything


def test_too_many_missing_files_and_empty_folders_are_errors(tmp_path):
    root = write_folders(tmp_path, 4, leave_out={("caption", 2)})
    with pytest.raises(DataError, match=r"1 of 4 samples .* max_bad_fraction=0.1"):
        Folders(root, WANTED, NAMES, _ledger(0.1))
    root = write_folders(tmp_path / "other", 2, leave_out={("caption", 0), ("rgb", 1)})
    with pytest.raises(UserError, match="no key occurs in all of"):
        Folders(root, WANTED, NAMES, _ledger())
    with pytest.raises(UserError, match="No such file"):
        Folders(str(tmp_path / "nothing"), WANTED, None, _ledger())


def test_files_of_any_picture_format_and_keys_with_dots(tmp_path, caplog):
    names = ["1305031102.175304.png", "1305031102.208638.JPG", "2024.01.30.webp", "a0.5x.jpeg"]
    for name in (*names, ".DS_Store", "Thumbs.db", "@eaDir/a.jpg", "twice.jpg", "twice.png"):
        (tmp_path / "rgb" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rgb" / name).write_bytes(b"1")
    ledger = _ledger()
    samples = Folders(str(tmp_path), {"rgb@224": "rgb"}, None, ledger).all(ledger)
    assert [s.key for s in samples] == sorted(name.rpartition(".")[0] for name in names)
    assert ledger.collect() == {"toy: two members of one key": 1}
    assert "key 'twice' has two files" in caplog.text
    with pytest.raises(DataError, match="1 of 5 samples"):
        Folders(str(tmp_path), {"rgb@224": "rgb"}, None, _ledger(0.1))


def test_what_cannot_be_read_skips_a_sample(tmp_path):
    (tmp_path / "rgb").mkdir()
    (tmp_path / "rgb" / "a.gif").write_bytes(b"GIF89a")
    os.mkfifo(tmp_path / "rgb" / "b.jpg")
    first, second = Folders(str(tmp_path), {"rgb@224": "rgb"}, None, _ledger()).all(_ledger())
    with pytest.raises(BadSample, match="unreadable format"):
        first.values(OpenFiles(), keep_pixels=False)
    with pytest.raises(BadSample, match="a FIFO, not a file"):
        second.values(OpenFiles(), keep_pixels=False)
