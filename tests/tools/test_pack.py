"""Packing: folders to shards and back without a byte changed, by key, and never over what is there."""

import os
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.raw_sample import OpenFiles
from fourm.data.shards import Shards, tar_members
from fourm.tools.pack import PackOptions, main, pack
from fourm.utils.errors import UserError
from tests.data.dataset_files import sample, write_folders, write_shards, write_tar
from tests.warm_python import warm_python

REPOSITORY = Path(__file__).parents[2]
NAMES = ("caption", "crop_settings", "det", "rgb", "tok_rgb")


def files(root):
    """Path → content; hidden files apart."""
    paths = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def keys(path):
    return [name.split(".")[0] for name, _, _ in tar_members(str(path))]


@pytest.fixture
def folders(tmp_path):
    write_folders(tmp_path / "f", 7)
    return tmp_path / "f"


def make(action, source, output, **options):
    return pack(PackOptions(action, str(source), str(output), **options))


def test_folders_to_shards_and_back(folders, tmp_path):
    assert main(["shards", str(folders), f"{tmp_path}/s", "--shard_size", "3"]) == 0
    tars = sorted((tmp_path / "s" / "rgb").glob("*"))
    assert [len(keys(tar)) for tar in tars] == [3, 3, 1] and [tar.name for tar in tars][2] == "shard-00002.tar"
    for name in NAMES:
        assert [keys(tmp_path / "s" / name / tar.name) for tar in tars] == [keys(tar) for tar in tars]
    path = f"{tmp_path}/s/[{','.join(NAMES)}]/shard-{{00000..00002}}.tar"
    samples = Shards(path, {name: name for name in NAMES}).all(BadSampleLedger("toy", 0.0))
    assert sorted(sample.key for sample in samples) == sorted(f"part{i % 2}/{i:05d}" for i in range(7))
    with tarfile.open(tars[0]) as tar:
        assert all(member.mtime == 0 and member.isfile() for member in tar)
    assert make("folders", tmp_path / "s", tmp_path / "back") == 7 * len(NAMES)
    assert files(tmp_path / "back") == files(folders)


def test_finished_files_are_kept_and_what_is_missing_is_made(folders, tmp_path):
    make("shards", folders, tmp_path / "s", shard_size=3)
    whole = files(tmp_path / "s")
    (tmp_path / "s" / "det" / "shard-00001.tar").unlink()
    leftover = tmp_path / "s" / "det" / ".tmp-1-shard-00001.tar"
    leftover.write_bytes(b"half")
    assert make("shards", folders, tmp_path / "s", shard_size=3) == 1
    assert files(tmp_path / "s") == whole and not leftover.exists()
    make("folders", tmp_path / "s", tmp_path / "back")
    (tmp_path / "back" / "rgb" / "part0" / "00000.jpg").unlink()
    assert make("folders", tmp_path / "s", tmp_path / "back") == 1 and files(tmp_path / "back") == files(folders)


@pytest.mark.slow
def test_a_killed_run_is_completed_by_the_same_command(folders, tmp_path):
    make("shards", folders, tmp_path / "whole", shard_size=1)
    command = [warm_python(), "-m", "fourm.tools.pack", "shards", str(folders), f"{tmp_path}/s", "--shard_size", "1"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "s").glob("*/*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # until it has ended
    subprocess.run(command, cwd=REPOSITORY, check=True, stderr=subprocess.DEVNULL)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_nothing_is_overwritten(folders, tmp_path):
    make("shards", folders, tmp_path / "s", shard_size=3)
    before = files(tmp_path / "s")
    with pytest.raises(UserError, match="exists with other keys or another order"):
        make("shards", folders, tmp_path / "s", shard_size=2)
    with pytest.raises(UserError, match=r"shard-00001.tar exists but is not one of the shards"):
        make("shards", folders, tmp_path / "s", shard_size=7)
    (folders / "det" / "part0" / "00000.json").write_bytes(b'{"instances": [] }')
    with pytest.raises(UserError, match=r"det/shard-00000.tar exists and differs from .*00000.json"):
        make("shards", folders, tmp_path / "s", shard_size=3)
    assert files(tmp_path / "s") == before
    with pytest.raises(UserError, match=r"00000.json exists and differs from part0/00000.json of"):
        make("folders", tmp_path / "s", folders)


def test_a_modality_is_added_in_the_order_of_the_shards(folders, tmp_path):
    write_shards(tmp_path / "s", 2, 3)  # every modality in another order, keys without folders
    shutil.rmtree(tmp_path / "s" / "det")
    for path in list((folders / "det").rglob("*.json")):
        path.rename(folders / "det" / path.name)
    assert make("add", folders, tmp_path / "s", modalities=("det",)) == 2
    first = sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir())[0]
    for shard in ("shard-00000.tar", "shard-00001.tar"):
        assert keys(tmp_path / "s" / "det" / shard) == keys(tmp_path / "s" / first / shard)
    with tarfile.open(tmp_path / "s" / "det" / "shard-00001.tar") as tar:
        assert tar.extractfile("00004.json").read() == (folders / "det" / "00004.json").read_bytes()
    assert make("add", folders, tmp_path / "s", modalities=("det",)) == 0


def test_tars_of_all_modalities_become_one_each(folders, tmp_path):
    """Public data sets come so, with or without the modality in the members' names."""
    samples = {index: sample(index) for index in range(7)}
    for shard in range(2):
        members = []
        for index in range(shard, 7, 2):
            folder = {name: (f"{name}.{extension}", content) for name, (extension, content) in samples[index].items()}
            folder |= {"jpg": ("jpg", b"picture"), "url": ("url", b"x")}
            members += [(f"{index:05d}.{name}", content) for name, content in folder.values()]
        write_tar(tmp_path / "public" / f"{shard}.tar", members)
    options = {"modalities": (*NAMES, "jpg")}
    assert make("split", tmp_path / "public", tmp_path / "s", **options) == 2 * 6
    assert make("split", tmp_path / "public", tmp_path / "s", **options) == 0
    assert (
        keys(tmp_path / "s" / "jpg" / "1.tar") == ["00001", "00003", "00005"] and not (tmp_path / "s" / "url").exists()
    )
    whole = Shards(f"{tmp_path}/public/{{0..1}}.tar", {n: n for n in options["modalities"]})
    split = Shards(
        f"{tmp_path}/s/[{','.join(options['modalities'])}]/{{0..1}}.tar", {n: n for n in options["modalities"]}
    )
    read = OpenFiles()
    found = [
        {
            s.key: {n: (m.extension, read.read(m)) for n, m in s.members.items()}
            for s in shards.all(BadSampleLedger("", 0.0))
        }
        for shards in (whole, split)
    ]
    assert found[0] == found[1] and len(found[0]) == 7
    assert {n: found[1]["00003"][n] for n in NAMES} == samples[3]


def test_tars_of_all_modalities_may_lack_something(tmp_path):
    write_tar(tmp_path / "public" / "0.tar", [("a.jpg", b"1"), ("a.txt", b"2"), ("b.jpg", b"3")])
    with pytest.raises(UserError, match="modality txt has no file for key 'b'"):
        make("split", tmp_path / "public", tmp_path / "s")
    assert not list((tmp_path / "s").rglob("*.tar"))
    assert make("split", tmp_path / "public", tmp_path / "s", skip_incomplete=True) == 2
    assert keys(tmp_path / "s" / "jpg" / "0.tar") == ["a"]
    write_tar(tmp_path / "public" / "1.tar", [("a.jpg", b"4"), ("a.txt", b"5")])
    with pytest.raises(UserError, match=r"1.tar: key 'a' has a second jpg; the first is in .*0.tar"):
        make("split", tmp_path / "public", tmp_path / "s")
    with pytest.raises(UserError, match="contains no tars"):
        make("split", tmp_path / "s" / "jpg" / "..", tmp_path / "other")


def test_keys_that_do_not_match_stop_it_before_anything_is_written(folders, tmp_path):
    (folders / "det" / "part1" / "00003.json").unlink()
    with pytest.raises(UserError, match="modality det has no file for key 'part1/00003' of the other modalities"):
        make("shards", folders, tmp_path / "s")
    assert not files(tmp_path / "s")
    assert make("shards", folders, tmp_path / "s", skip_incomplete=True) == len(NAMES)
    assert "part1/00003" not in keys(tmp_path / "s" / "rgb" / "shard-00000.tar")
    write_shards(tmp_path / "t", 1, 3)
    with pytest.raises(UserError, match="modality det has no file for key '00000' of the shards in"):
        make("add", folders, tmp_path / "t", modalities=("det",))
    write_tar(tmp_path / "t" / "rgb" / "shard-00000.tar", [("00000.jpg", b""), ("00001.jpg", b"")])
    with pytest.raises(UserError, match="caption/shard-00000.tar and rgb/shard-00000.tar differ in key '00002'"):
        make("add", folders, tmp_path / "t", modalities=("tok_rgb", "det"))
    with pytest.raises(UserError, match="do not have the same keys"):
        make("folders", tmp_path / "t", tmp_path / "back")


def test_bad_input_is_one_line(folders, tmp_path):
    for options, message in (
        ({"modalities": ("dett",)}, r"no folder 'dett' \(did you mean 'det'\?\)"),
        ({"shard_size": 0}, "'shard_size' must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            make("shards", folders, tmp_path / "s", **options)
    with pytest.raises(UserError, match="'add' needs 'modalities'"):
        make("add", folders, tmp_path / "s")
    with pytest.raises(UserError, match="the same folder"):
        make("shards", folders, folders)
    write_tar(tmp_path / "evil" / "rgb" / "a.tar", [("../../x.jpg", b"")])
    with pytest.raises(UserError, match="would be written outside its folder"):
        make("folders", tmp_path / "evil", tmp_path / "back")
    assert not (tmp_path / "x.jpg").exists()
    (tmp_path / "evil" / "rgb" / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="a.tar: not a tar file"):
        make("folders", tmp_path / "evil", tmp_path / "back")


def test_losses_are_not_made_permanent(tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", [(f"{i}.{name}", b"x") for i in range(9) for name in ("jpg", "txt")])
    path = tmp_path / "tars" / "0.tar"
    content = bytearray(path.read_bytes())
    content[4096:4608] = bytes(512)
    path.write_bytes(content)
    with pytest.raises(UserError, match="0.tar: .*zero block"):
        make("split", tmp_path / "tars", tmp_path / "s", skip_incomplete=True)
    for name in ("a.jpg", "a.png", "b.jpg"):
        (tmp_path / "f" / "rgb").mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / "rgb" / name).write_bytes(b"x")
    with pytest.raises(UserError, match="key 'a' has two files"):
        make("shards", tmp_path / "f", tmp_path / "s", skip_incomplete=True)


@pytest.mark.parametrize(
    "names, message",
    [
        (["../a.jpg"], "outside its folder"),
        (["/a.jpg"], "outside its folder"),
        (["n" * 300 + ".jpg"], "too long"),
        (["a/b.jpg", "a//b.jpg"], "two members"),
    ],
)
def test_names_that_a_disk_cannot_hold_are_one_line(tmp_path, names, message):
    (tmp_path / "t" / "rgb").mkdir(parents=True)
    with tarfile.open(tmp_path / "t" / "rgb" / "0.tar", "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=message):
        make("folders", tmp_path / "t", tmp_path / "back")
    assert not list((tmp_path / "back").rglob("*.jpg"))
