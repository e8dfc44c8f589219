import os

import pytest

from fourm.utils.files import atomic_path
from fourm.utils.seeds import generator


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_process_of_the_same_number_has_left_is_not_in_the_way(tmp_path):
    for name in ("folder", "file"):
        left = tmp_path / f".tmp-{os.getpid()}-{name}"
        left.mkdir()
        (left / "half").touch()
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
    with atomic_path(tmp_path / "file") as temporary, open(temporary, "x"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and not os.listdir(tmp_path / "folder")


def test_folders_appear_whole(tmp_path):
    target = tmp_path / "sub" / "checkpoint"
    for content in ("1", "2"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / "x").write_text(content)
            assert not target.exists() or (target / "x").read_text() == "1"
    assert (target / "x").read_text() == "2" and os.listdir(tmp_path / "sub") == ["checkpoint"]


def test_generators_depend_on_their_key_alone():
    a, b, c = generator(1, "order", 2), generator(1, "order", 2), generator(1, "sample", 2)
    first = a.integers(0, 2**60, 4).tolist()
    assert first == b.integers(0, 2**60, 4).tolist() != c.integers(0, 2**60, 4).tolist()
