"""Shards: headers are indexed correctly, modalities are joined by key, damage is reported with file and key."""

import io
import itertools
import tarfile

import numpy as np
import pytest

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.raw_sample import OpenFiles
from fourm.data.shards import Shards, tar_members
from fourm.utils.errors import DataError, UserError
from tests.data.dataset_files import sample, write_shards, write_tar

WANTED = {"rgb@224": "rgb", "caption": "caption", "tok_rgb@224": "tok_rgb", "crop_settings": "crop_settings"}
NAMES = {"tok_rgb": "tok_rgb@224"}


def _ledger(max_bad_fraction=1.0):
    return BadSampleLedger("toy", max_bad_fraction)


def _index(sample):
    """Which sample it is, as its caption, tokens and key tell independently."""
    values = sample.values(OpenFiles(), keep_pixels=False)
    caption, tokens = int(values["caption"][0].split()[1][1:]), int(values["tok_rgb@224"][0, 0])
    assert caption == tokens // 3 == int(sample.key)
    return caption


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_agree_with_tarfile(tmp_path, format):
    path = tmp_path / "a.tar"
    names = ["a.txt", "deep/" * 15 + "b.json", "empty.txt", "späße/ü.txt", "c/big.npy"]
    if format != tarfile.USTAR_FORMAT:
        names.append("l" * 250 + ".txt")
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("c")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = number * 700 * (name != "empty.txt"), 1.5  # a broken second makes a pax header
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert list(tar_members(str(path))) == expected
    assert [name for name, *_ in expected] == names


def test_modalities_in_different_order_are_joined_by_key(tmp_path):
    samples = Shards(write_shards(tmp_path, 2, 6), WANTED, NAMES).all(_ledger())
    assert sorted(map(_index, samples)) == list(range(12))
    assert samples[0].values(OpenFiles(), keep_pixels=False)["rgb@224"].content[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    "wrappers",
    [
        ("rgb/", ""),
        ("x/y/", ""),
        ("rgb/", "caption/"),
        ("x/rgb/", "x/caption/"),
        ("rgb/x/", "caption/x/"),
        ("a/p/", "p/"),
    ],
)
def test_a_folder_around_the_members_of_one_tar_is_no_part_of_their_keys(tmp_path, wrappers):
    for folder, wrapper in zip(("rgb", "caption"), wrappers, strict=True):
        members = [(f"{wrapper}{key}.txt", f"{folder} {key}".encode()) for key in ("1", "p/2", "3")]
        write_tar(tmp_path / folder / "0.tar", members)
    ledger = _ledger(0)
    samples = Shards(f"{tmp_path}/[rgb,caption]/0.tar", {"rgb": "rgb", "caption": "caption"}).all(ledger)
    assert [sample.key for sample in samples] == ["1", "p/2", "3"] and not ledger.collect()
    assert [sample.values(OpenFiles(), False) for sample in samples] == [
        {"rgb": f"rgb {key}", "caption": f"caption {key}"} for key in ("1", "p/2", "3")
    ]


@pytest.mark.parametrize(("train", "val"), [("train/", "val/"), ("train/rgb/", "val/caption/"), ("rgb/train/", "val/")])
def test_folders_of_different_names_keep_samples_apart(tmp_path, train, val):
    for folder, wrapper in (("rgb", train), ("caption", val)):
        write_tar(tmp_path / folder / "0.tar", [(f"{wrapper}{key}.txt", b"x") for key in ("1", "2")])
        write_tar(tmp_path / folder / "1.tar", [(f"{wrapper}1.txt", b"x"), ("both/2.txt", b"x")])
    shards = f"{tmp_path}/[rgb,caption]/{{0..1}}.tar", {"rgb": "rgb", "caption": "caption"}
    with pytest.raises(DataError, match="samples cannot be joined"):
        Shards(*shards).all(_ledger(0.5))
    ledger = _ledger(1.0)
    assert [sample.key for sample in Shards(*shards).all(ledger)] == ["both/2"]
    assert ledger.collect() == {"toy: missing member": 6}


def test_all_modalities_in_one_tar(tmp_path):
    members = [
        (f"{i:05d}.{folder}.{extension}", content)
        for i in range(3)
        for folder, (extension, content) in sample(i).items()
    ]
    np.random.default_rng(0).shuffle(members)
    write_tar(tmp_path / "all-0.tar", members)
    assert sorted(map(_index, Shards(f"{tmp_path}/all-{{0..0}}.tar", WANTED, NAMES).all(_ledger()))) == [0, 1, 2]


def test_tars_of_different_length_lose_only_the_missing_keys(tmp_path, caplog):
    path = write_shards(
        tmp_path, 1, 8, lambda folder, i, _, content: None if folder == "caption" and i in (3, 5) else content
    )
    ledger = _ledger()
    shards = Shards(path, WANTED, NAMES)
    assert sorted(map(_index, shards.all(ledger))) == [0, 1, 2, 4, 6, 7]
    shards.all(ledger)
    assert ledger.collect() == {"toy: missing member": 4}
    (message,) = [record.getMessage() for record in caplog.records]  # once per shard
    assert f"{tmp_path}/caption/shard-00000.tar" in message and ("'00003'" in message or "'00005'" in message)


def test_truncated_tar_gives_what_is_whole(tmp_path, caplog):
    path = write_shards(tmp_path, 1, 8, shuffle=False)
    broken = tmp_path / "rgb" / "shard-00000.tar"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    samples = Shards(path, WANTED, NAMES).all(_ledger())
    assert 0 < len(samples) < 8 and sorted(map(_index, samples)) == list(range(len(samples)))
    assert f"{broken}: cut off" in caplog.text


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda tar: tar[:512], "cut off at byte 512"),  # between two members
        (lambda tar: tar[:1024], "cut off within a member at byte 1024"),
        (lambda tar: b"", "cut off at byte 0"),
        (lambda tar: tar[:124] + b"-0000000512\0" + tar[136:], "damaged"),  # a size that leads back
        (lambda tar: tar[:124] + b"not a size!\0" + tar[136:], "damaged"),
        (lambda tar: tar.replace(b"214 path=", b"000 path="), "damaged"),  # a name in a header of its own
        (lambda tar: tar.replace(b"214 path=", b"2140path="), "damaged"),
    ],
)
def test_damaged_headers_are_reported_and_end_the_shard(tmp_path, damage, message):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.txt", "b" * 200 + ".txt"):
            tar.addfile(tarfile.TarInfo(name))
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    with pytest.raises(tarfile.ReadError, match=message):
        list(tar_members(str(path)))


def test_unreadable_shard_is_skipped_but_not_all_of_them(tmp_path, caplog):
    path = write_shards(tmp_path, 2, 4)
    (tmp_path / "rgb" / "shard-00000.tar").write_bytes(b"no tar at all" * 100)
    stream = Shards(path, WANTED, NAMES).draw((0, "order", 0), 0, 1, _ledger())
    assert {_index(s) for s in itertools.islice(stream, 40)} == {4, 5, 6, 7}
    assert "rgb/shard-00000.tar: not a tar file" in caplog.text
    (tmp_path / "rgb" / "shard-00001.tar").unlink()
    stream = Shards(path, WANTED, NAMES).draw((0, "order", 0), 0, 1, _ledger(0.9))
    with pytest.raises(DataError, match="max_bad_fraction"):
        next(stream)


def test_streams_are_endless_reproducible_and_differ(tmp_path):
    shards = Shards(write_shards(tmp_path, 6, 2), WANTED, NAMES)

    def keys(key, stream):
        return [s.key for s in itertools.islice(shards.draw(key, stream, 2, _ledger()), 50)]

    assert keys((0, "order", 0), 0) == keys((0, "order", 0), 0)
    assert len({tuple(keys((seed, "order", epoch), s)) for seed in (0, 1) for epoch in (0, 1) for s in (0, 1)}) == 8


def _replaced(path, content):
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    "change", [lambda path, tar: path.write_bytes(tar[:1600]), lambda path, tar: _replaced(path, tar)]
)
def test_a_shard_that_is_replaced_while_samples_wait_is_an_error(tmp_path, change):
    samples = Shards(write_shards(tmp_path, 1, 2, shuffle=False), WANTED, NAMES).all(_ledger())
    files = OpenFiles()
    path = tmp_path / "caption" / "shard-00000.tar"
    change(path, path.read_bytes())
    with pytest.raises(UserError, match=f"{path} was replaced"):
        samples[1].values(files, keep_pixels=False)
    if path.stat().st_size > 1600:
        again = Shards(f"{tmp_path}/[caption]/shard-00000.tar", {"caption": "caption"}).all(_ledger())
        assert again[1].values(files, keep_pixels=False)["caption"][0].startswith("sample s1")


@pytest.mark.parametrize(
    "path, message",
    [
        ("pipe:cat a.tar", "only local files, s3"),
        ("{root}/[rgb,caption,crop_settings]/a.tar", "no folder for modality tok_rgb@224"),
        ("{root}/[rgb,caption,tok_rgb,crop_settings]/a.tar", "there is no .*/rgb/a.tar"),
        ("{root}/[rgb]/[caption]/a.tar", "one pair of brackets"),
        ("{root}/nothing.tar", "nothing.tar: No such file"),
    ],
)
def test_wrong_paths_are_named(tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        Shards(path.replace("{root}", str(tmp_path)), WANTED, NAMES)


def test_values_are_kept_for_repeats_only(tmp_path):
    (sample,) = Shards(write_shards(tmp_path, 1, 1), WANTED, NAMES).all(_ledger())
    files = OpenFiles()
    once, again = (sample.values(files, keep_pixels=False)["rgb@224"] for _ in range(2))
    assert once is not again and once.pixels("RGB") is not once.pixels("RGB")
    first, second = (sample.values(files, keep_pixels=True)["rgb@224"] for _ in range(2))
    assert first is second and first.pixels("RGB") is first.pixels("RGB")


def test_few_files_stay_open(tmp_path):
    path = write_shards(tmp_path, 8, 1)
    files = OpenFiles(limit=3)
    for s in Shards(path, WANTED, NAMES).all(_ledger()):
        s.values(files, keep_pixels=False)
    assert len(files._open) == 3
