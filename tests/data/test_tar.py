"""Tars are read as ``tarfile`` reads them, and what is damaged is said, after everything that can be read."""

import io
import os
import posixpath
import tarfile

import numpy as np
import pytest

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.raw_sample import OpenFiles
from fourm.data.shards import Shards, tar_members
from fourm.data.tar import DamagedTar
from fourm.utils.errors import DataError, UserError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def _tar(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _contents(path):
    data = path.read_bytes()
    return {name: data[offset : offset + size] for name, offset, size in tar_members(str(path))}


def _damaged(path):
    """What can be read, and the problems."""
    found = []
    with pytest.raises(DamagedTar) as error:
        found.extend(name for name, *_ in tar_members(str(path)))
    return found, error.value.problems


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(8))
def test_contents_are_those_of_tarfile(tmp_path, format, seed):
    rng = np.random.default_rng(seed)
    path, names = tmp_path / "a.tar", []
    with tarfile.open(path, "w", format=FORMATS[format]) as tar:
        for number in range(30):
            deep = "/".join(
                "d" * int(rng.integers(1, 60)) for _ in range(rng.integers(0, 2 if format == "ustar" else 6))
            )
            name = (
                f"{['', './'][rng.integers(2)]}{deep}{'/' if deep else ''}{number}.ü{'n' * int(rng.integers(40))}.txt"
            )
            info = tarfile.TarInfo(name)
            kind = rng.integers(5)
            if kind == 0:
                info.type, info.name = tarfile.DIRTYPE, f"{name}/{'x' * (1 if format == 'ustar' else 200)}"
            elif kind == 1 and names and format != "ustar":
                info.type, info.linkname = tarfile.LNKTYPE, names[rng.integers(len(names))]
            elif kind == 2 and names and format != "ustar":
                info.type = tarfile.SYMTYPE
                info.linkname = posixpath.relpath(names[rng.integers(len(names))], posixpath.dirname(name) or ".")
            else:
                info.size, info.mtime = int(rng.integers(2000)), float(rng.integers(2)) / 2
                names.append(name)
            tar.addfile(info, io.BytesIO(rng.bytes(info.size)) if info.size else None)
    with tarfile.open(path) as tar:
        links = [m for m in tar if m.issym()]
        expected = {m.name: tar.extractfile(m).read() for m in tar if m.isfile() or m.islnk()}
    found = _contents(path)
    assert {name: content for name, content in found.items() if name in expected} == expected
    assert found.keys() - expected.keys() == {m.name for m in links}
    for link in links:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(link.name), link.linkname))
        assert found[link.name] in [content for name, content in found.items() if posixpath.normpath(name) == target]


def test_v7_and_archives_that_follow_each_other_are_read(tmp_path):
    first, second = (_tar(tmp_path / f"{n}.tar", [(f"{n}{i}.txt", b"x" * i) for i in range(4)]) for n in "ab")
    both = tmp_path / "both.tar"
    both.write_bytes(first.read_bytes() + second.read_bytes() + b"trailing garbage" * 100)
    assert list(_contents(both)) == [f"{n}{i}.txt" for n in "ab" for i in range(4)]
    v7 = bytearray(first.read_bytes())
    for _, offset, _ in list(tar_members(str(first))):
        header = v7[offset - 512 : offset]
        header[257:] = bytes(255)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        v7[offset - 512 : offset] = header
    (tmp_path / "v7.tar").write_bytes(v7)
    assert _contents(tmp_path / "v7.tar") == _contents(first)


@pytest.mark.parametrize("damage", [bytes(512), b"\xff" * 512, bytes(1024)])
def test_damage_costs_only_what_it_hits(tmp_path, damage):
    path = _tar(tmp_path / "rgb" / "0.tar", [(f"{i}.txt", b"word " * 300) for i in range(50)])
    places = {name: offset - 512 for name, offset, _ in tar_members(str(path))}
    content = bytearray(path.read_bytes())
    content[places["7.txt"] : places["7.txt"] + len(damage)] = damage
    path.write_bytes(content)
    found, problems = _damaged(path)
    assert found == [f"{i}.txt" for i in range(50) if i != 7] and len(problems) == 1
    assert f"byte {places['7.txt']}" in problems[0]
    ledger = BadSampleLedger("x", 0.5)
    assert len(Shards(f"{tmp_path}/[rgb]/0.tar", {"rgb": "rgb"}).all(ledger)) == 49
    assert ledger.collect() == {"x: damaged shard": 1}
    with pytest.raises(DataError, match="1 of 50 samples cannot be joined"):
        Shards(f"{tmp_path}/[rgb]/0.tar", {"rgb": "rgb"}).all(BadSampleLedger("x", 0.01))


@pytest.mark.parametrize("magic, name", [("w:gz", "gzip"), ("w:xz", "xz"), ("w:bz2", "bzip2")])
def test_compressed_tars_are_called_so(tmp_path, magic, name):
    with tarfile.open(tmp_path / "a.tar", magic) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    assert _damaged(tmp_path / "a.tar") == (
        [],
        [f"compressed with {name}, but shards need random access; decompress it"],
    )


def test_links_that_lead_nowhere_and_sparse_files_are_problems(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, target in (("a.txt", b"2", "b.txt"), ("b.txt", b"2", "a.txt"), ("c.txt", b"2", "/etc/passwd")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo("d.txt")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("e.txt"))
    found, problems = _damaged(tmp_path / "a.tar")
    assert found == ["e.txt"] and len(problems) == 4
    assert "sparse" in problems[0] and "not in the tar" in problems[3]


def test_a_name_that_claims_gigabytes_is_not_read(tmp_path):
    path = _tar(tmp_path / "a.tar", [("n" * 200, b"x"), ("b.txt", b"y")], tarfile.GNU_FORMAT)
    header = bytearray(path.read_bytes()[:512])
    header[124:136] = b"%011o\0" % (2**30)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with open(path, "r+b") as file:
        rest = path.read_bytes()[512:]
        file.write(header)
        file.seek(512 + 2**30)
        file.write(rest[512:])
    found, problems = _damaged(path)
    assert found == ["b.txt"] and "too large extended header" in problems[0]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(OSError, match="a FIFO, not a file"):
        list(tar_members(str(tmp_path / "a.tar")))
    with pytest.raises(UserError, match="a FIFO"):
        Shards(f"{tmp_path}/a.tar", {"rgb": "rgb"})


def test_keys_with_dots_collisions_and_clutter(tmp_path, caplog):
    names = ["2024.01.30", "a0.5x", "1305031102.175304", "1305031102.208638"]
    clutter = [("._a.jpg", b""), ("__MACOSX/._b.jpg", b""), ("Thumbs.db", b""), (".DS_Store", b"")]
    both = [(f"x/{n}{e}", b"1") for n, e in zip(names, (".jpg", ".JPG", ".jpeg", ".png"), strict=True)]
    texts = [(f"x/{n}.caption.json.gz", b"2") for n in names]
    more = [
        ("twice.jpg", b"3"),
        ("twice.jpg", b"4"),
        ("twice.caption.txt", b"5"),
        (f"{'x/2024.01.30'}.depth.jpg", b"6"),
    ]
    path = _tar(tmp_path / "all.tar", clutter + both + texts + more)
    ledger = BadSampleLedger("x", 0.5)
    wanted, name_map = {"rgb@224": "rgb", "caption": "caption"}, {"jpg": "rgb@224"}
    samples = Shards(str(path), wanted, name_map).all(ledger)
    assert sorted(s.key for s in samples) == sorted(f"x/{n}" for n in names)
    assert all(OpenFiles().read(s.members["rgb@224"]) == b"1" for s in samples)
    assert ledger.collect() == {"x: two members of one key": 1} and "key 'twice' has two members" in caplog.text


def test_stars_match_shards_by_name(tmp_path):
    for name, shards in {"rgb": "ab", "caption": "bc"}.items():
        for shard in shards:
            _tar(tmp_path / name / f"s-{shard}.tar", [(f"{shard}.json", b"1")])
    ledger = BadSampleLedger("x", 1.0)
    shards = Shards(f"{tmp_path}/[rgb,caption]/s-*.tar", {"rgb": "rgb", "caption": "caption"})
    assert [s.key for s in shards.all(ledger)] == ["b"] and ledger.collect() == {"x: missing member": 2}
    for pattern, message in (
        ("t-*.tar", "no file matches"),
        ("{0..999999999}.tar", "more than"),
        ("{0..1.tar", "brace"),
    ):
        with pytest.raises(UserError, match=message):
            Shards(f"{tmp_path}/[rgb]/{pattern}", {"rgb": "rgb"})
