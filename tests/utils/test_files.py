import os
import resource
import shutil

import pytest
import torch

from fourm.utils.errors import UserError
from fourm.utils.files import atomic_folder, atomic_path, save_tensors
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


def test_leftovers_of_a_killed_process_with_the_same_id_are_replaced(tmp_path):
    for name in ("folder", "file"):
        left = tmp_path / f".tmp-{os.getpid()}-{name}"
        left.mkdir()
        (left / "half").touch()
    with atomic_folder(tmp_path / "folder"):
        pass
    with atomic_path(tmp_path / "file") as temporary, open(temporary, "x"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and not os.listdir(tmp_path / "folder")


def test_folders_appear_only_when_complete(tmp_path):
    target = tmp_path / "sub" / "checkpoint"
    for content in ("1", "2"):
        with atomic_folder(target, ["x"]) as temporary:
            (temporary / "x").write_text(content)
            assert not target.exists() or (target / "x").read_text() == "1"
    assert (target / "x").read_text() == "2" and os.listdir(tmp_path / "sub") == ["checkpoint"]


def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_text() for path in sorted(folder.rglob("*"))}


def test_a_file_never_replaces_a_folder_or_a_device(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "work")
    os.mkfifo(tmp_path / "pipe")
    before = tree(tmp_path / "work")
    for name, problem in (("work", "is a folder"), ("link", "is a folder"), ("pipe", "device or a pipe")):
        with (
            pytest.raises(UserError, match=f"{tmp_path / name} is .*{problem.split()[-1]}"),
            atomic_path(tmp_path / name),
        ):
            raise AssertionError("nothing may begin")
    assert tree(tmp_path / "work") == before and sorted(os.listdir(tmp_path)) == ["link", "pipe", "work"]


def test_a_folder_that_holds_anything_else_is_not_replaced(tmp_path):
    target = tmp_path / "codebook"
    for foreign in ("thesis.txt", "model.safetensors/x", ".hidden"):
        (target / foreign).parent.mkdir(parents=True)
        (target / foreign).write_text("precious")
        (target / "zz.json").write_text("own")
        before = tree(target)
        refused = pytest.raises(UserError, match=f"{target} contains '{foreign.split('/')[0]}'")
        with refused, atomic_folder(target, ["*.json", "model.safetensors"]):
            raise AssertionError("nothing may begin")
        assert tree(target) == before and os.listdir(tmp_path) == ["codebook"]
        shutil.rmtree(target)
    target.mkdir()
    with atomic_folder(target, ["a.json"]) as temporary:
        (temporary / "a.json").write_text("new")
    assert tree(target) == {"a.json": "new"}


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "codebook"
    with pytest.raises(UserError, match="contains 'thesis.txt'"), atomic_folder(target, ["a"]):
        target.mkdir()
        (target / "thesis.txt").write_text("precious")
    assert tree(tmp_path) == {"codebook": False, "codebook/thesis.txt": "precious"}


def test_targets_of_links_are_kept(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "own").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="is a symbolic link"), atomic_folder(tmp_path / "link", ["own"]):
        pass
    file = tmp_path / "file"
    file.symlink_to(tmp_path / "real" / "own")
    with atomic_path(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new" and not file.is_symlink()
    assert (tmp_path / "link").is_symlink() and tree(tmp_path / "real") == {"own": "old"}


def test_paths_that_cannot_be_written_are_named_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "kept").write_text("old")
    (tmp_path / "kept").chmod(0o444)
    cases = {
        "file/x": "file is not a folder",
        "kept": "kept is read-only",
        "x" * 300: "name is too long",
        "a\0b": "not a valid file name",
        "a\ud83d": "not a valid file name",
    }
    for name, problem in cases.items():
        for writer in (atomic_path, atomic_folder):
            match = problem if writer is atomic_path or name != "kept" else "kept is a file"
            with pytest.raises(UserError, match=match), writer(tmp_path / name):
                raise AssertionError("nothing may begin")
    assert tree(tmp_path) == {"file": "old", "kept": "old"}


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        refused = pytest.raises(UserError, match=f"{target} cannot be written: the file is larger than")
        with refused, atomic_path(target) as temporary:
            temporary.write_bytes(bytes(2000))
        refused = pytest.raises(UserError, match=f"{tmp_path / 'w.safetensors'} cannot be written: the file is larger")
        with refused, atomic_path(tmp_path / "w.safetensors") as temporary:
            save_tensors({"a": torch.zeros(2000)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(FileNotFoundError), atomic_path(target):
        (tmp_path / "an input").read_text()  # errors about inputs are not reported as errors about the output
    assert tree(tmp_path) == {"a.txt": "old"}


def test_names_may_be_as_long_as_the_disk_allows(tmp_path):
    name = "x" * 250 + ".npy"
    with atomic_path(tmp_path / name) as temporary:
        assert temporary.suffix == ".npy"
        temporary.write_text("1")
    assert os.listdir(tmp_path) == [name]


def test_generators_depend_on_their_key_alone():
    a, b, c = generator(1, "order", 2), generator(1, "order", 2), generator(1, "sample", 2)
    first = a.integers(0, 2**60, 4).tolist()
    assert first == b.integers(0, 2**60, 4).tolist() != c.integers(0, 2**60, 4).tolist()


def test_others_may_read_saved_tensors_if_they_may_read_other_files(tmp_path):
    (tmp_path / "text").write_text("")
    save_tensors({"a": torch.zeros(2)}, tmp_path / "tensors")
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "text").stat().st_mode
