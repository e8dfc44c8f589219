"""save_vq_tokens.py: what an interruption, bad input or other tokens in its place leave behind."""

import io
import os
import signal
import subprocess
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fourm.data import bad_samples
from fourm.utils.errors import DataError, UserError
from fourm.vq import TOKENIZERS, PatchCodebook, load_tokenizer
from fourm.vq.save_tokens import save_tokens
from tests.vq.image_files import image, write_files, write_shards
from tests.vq.saved_tokens import (
    COUNT,
    CROPS,
    PER_SHARD,
    SIDE,
    VOCAB,
    contents,
    ids,
    options,
    write_data,
    write_tokenizers,
)
from tests.warm_python import warm_python

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(params=["shards", "folders"])
def data(request, tmp_path):
    return write_data(tmp_path / "data", request.param)


@pytest.fixture()
def other_tokenizer(tokenizers, tmp_path):
    other = load_tokenizer(tokenizers["rgb"])
    other.codebook += 1.0
    other.save(tmp_path / "other")
    return str(tmp_path / "other")


def test_other_tokens_need_overwrite(tokenizers, other_tokenizer, data):
    save_tokens(options(tokenizers["rgb"], data))
    before, crops = contents(data / f"tok_rgb@{SIDE}"), contents(data / "crop_settings")
    for change in ({"tokenizer": other_tokenizer}, {"num_crops": 4}):
        for dry_run in (True, False):
            with pytest.raises(UserError, match=f"was made with another {next(iter(change))} .* --overwrite"):
                save_tokens(replace(options(tokenizers["rgb"], data, dry_run=dry_run), **change))
    assert contents(data / f"tok_rgb@{SIDE}") == before
    assert save_tokens(options(other_tokenizer, data, overwrite=True)) == COUNT
    after = contents(data / f"tok_rgb@{SIDE}")
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)
    assert contents(data / "crop_settings") == crops
    assert save_tokens(options(other_tokenizer, data)) == 0


def test_overwriting_some_shards_never_mixes_tokenizers(tokenizers, other_tokenizer, tmp_path):
    write_shards(tmp_path, "rgb", COUNT, PER_SHARD)
    save_tokens(options(tokenizers["rgb"], tmp_path))
    before = contents(tmp_path / f"tok_rgb@{SIDE}")
    with pytest.raises(UserError, match="shard-00000.tar was made with another tokenizer"):
        save_tokens(options(other_tokenizer, tmp_path, overwrite=True, shards="shard-00001.tar"))
    assert contents(tmp_path / f"tok_rgb@{SIDE}") == before
    assert save_tokens(options(tokenizers["rgb"], tmp_path, overwrite=True, shards="shard-00001.tar")) == PER_SHARD
    assert contents(tmp_path / f"tok_rgb@{SIDE}") == before


def test_files_of_others_are_left_alone(tokenizers, data):
    (data / f"tok_rgb@{SIDE}").mkdir()
    (data / f"tok_rgb@{SIDE}" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds files that save_vq_tokens did not write"):
        save_tokens(options(tokenizers["rgb"], data, overwrite=True))


def test_stored_crops_that_do_not_fit_are_an_error(tokenizers, data):
    save_tokens(options(tokenizers["rgb"], data))
    with pytest.raises(UserError, match=rf"key 'part0/00000': crop_settings has shape \({CROPS}, 5\), not \(2, 5\)"):
        save_tokens(options(tokenizers["depth"], data, num_crops=2))


def test_damaged_crops_are_an_error_and_not_drawn_anew(tokenizers, data):
    save_tokens(options(tokenizers["rgb"], data))
    before = contents(data / "crop_settings")
    path = data / "crop_settings" / next(iter(before))
    path.write_bytes(path.read_bytes()[:1000][: path.stat().st_size // 2])
    if path.suffix == ".npy":  # one file of one image
        save_tokens(options(tokenizers["depth"], data, max_bad_fraction=0.5))
        key = path.relative_to(data / "crop_settings").with_suffix("").as_posix()
        assert ids(data, f"tok_rgb@{SIDE}").keys() - ids(data, f"tok_depth@{SIDE}").keys() == {key}
        return
    with pytest.raises(DataError, match=rf"{path}: .* remove crop_settings and all tokens made with it"):
        save_tokens(options(tokenizers["depth"], data))


def damage(data, index, content, modality="rgb"):
    """Replace image ``index``."""
    if not any((data / modality).glob("*.tar")):
        (data / modality / f"part{index % 2}" / f"{index:05d}.png").write_bytes(content)
        return
    path = data / modality / f"shard-{index // PER_SHARD:05d}.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    with tarfile.open(path, "w") as tar:
        for member, own in members:
            own = content if f"{index:05d}" in member.name else own
            member.size = len(own)
            tar.addfile(member, io.BytesIO(own))


@pytest.mark.parametrize("content", [b"", b"no picture", image("rgb", 5)[:900]], ids=["empty", "text", "cut off"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_image_is_skipped_and_named(tokenizers, data, caplog, content, num_workers):
    damage(data, 5, content)
    assert save_tokens(options(tokenizers["rgb"], data, num_workers=num_workers)) == COUNT - 1
    warning = "\n".join(record.getMessage() for record in caplog.records)
    assert str(data / "rgb") in warning
    assert "key 'part1/00005'" in warning
    for made in (f"tok_rgb@{SIDE}", "crop_settings"):
        assert len(ids(data, made)) == COUNT - 1
        assert "part1/00005" not in ids(data, made)
    # Another modality lacks another one: crops are added where there were none, and the others stay.
    damage(data, 6, content, "depth")
    assert save_tokens(options(tokenizers["depth"], data)) == COUNT - 1
    assert len(ids(data, "crop_settings")) == COUNT


def test_images_that_are_all_corrupt_are_an_error(tokenizers, data):
    for index in range(COUNT):
        damage(data, index, b"no picture")
    with pytest.raises(DataError, match="none of its images can be read"):
        save_tokens(options(tokenizers["rgb"], data))


def test_too_many_corrupt_images_stop_the_run(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(bad_samples, "MIN_READS", 3)  # instead of writing hundreds of images
    write_files(tmp_path, "rgb", 12)
    for index in (7, 9, 11):  # the last ones in the order of keys
        damage(tmp_path, index, b"no picture")
    few = options(tokenizers["rgb"], tmp_path, batch_size=1, max_bad_fraction=0.1)
    with pytest.raises(DataError, match="2 of 11 samples cannot be read"):
        save_tokens(few)
    # What is finished counts as read: the share of bad images is that of the data set, not of what is left of it.
    assert save_tokens(replace(few, max_bad_fraction=0.25)) == 0
    assert len(ids(tmp_path, f"tok_rgb@{SIDE}")) == 9


def test_a_run_that_failed_leaves_no_conditions(tokenizers, data):
    with pytest.raises(DataError, match="8 bits|16 bits"):
        save_tokens(options(tokenizers["depth"], data, modality="rgb", output_modality="tokens"))
    assert save_tokens(options(tokenizers["rgb"], data, output_modality="tokens")) == COUNT


def test_broken_contract_stops_the_run_with_file_and_key(tokenizers, data):
    with pytest.raises(DataError, match=r"rgb/.*key 'part0/00000': expected one channel of 16 bits"):
        save_tokens(options(tokenizers["depth"], data, modality="rgb"))


def test_ids_beyond_the_vocabulary_are_not_written(tokenizers, data, monkeypatch, tmp_path):
    class Liar(PatchCodebook):
        kind = "liar"

        def tokenize(self, x):
            return super().tokenize(x) + 1

    monkeypatch.setitem(TOKENIZERS, "liar", Liar)
    liar = Liar(load_tokenizer(tokenizers["rgb"]).config)
    liar.codebook[-1] = 1.0
    liar.save(tmp_path / "liar")
    with pytest.raises(DataError, match=f"the tokenizer gave ids 1 to {VOCAB} for a vocabulary of {VOCAB}"):
        save_tokens(options(str(tmp_path / "liar"), data))
    assert not contents(data / f"tok_rgb@{SIDE}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_root": "/nowhere"}, "/nowhere/rgb: there is no such folder of images"),
        ({"input_size": 30}, "'input_size' 30 is not a multiple of the tokenizer's patch_size 8"),
        ({"tokenizer": "/nowhere"}, "/nowhere is not a tokenizer folder"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"main_modality": "rbg"}, "rbg"),
    ],
)
def test_options_that_do_not_fit_are_an_error(tokenizers, data, changes, message):
    with pytest.raises(UserError, match=message):
        save_tokens(replace(options(tokenizers["rgb"], data), **changes))
    assert not contents(data / f"tok_rgb@{SIDE}")


def script(name, *arguments):
    return [warm_python(), str(REPOSITORY / name), *map(str, arguments)]


def test_killed_and_started_again_is_as_if_never_killed(tokenizers, tmp_path):
    count, per_shard = 120, 10
    for kind in ("killed", "whole"):
        write_shards(tmp_path / kind / "shards", "rgb", count, per_shard)
        write_files(tmp_path / kind / "folders", "rgb", count)
    for kind in ("shards", "folders"):
        data = tmp_path / "killed" / kind
        output, suffix = data / f"tok_rgb@{SIDE}", "tar" if kind == "shards" else "npy"
        process = subprocess.Popen(
            script(
                "save_vq_tokens.py",
                "--tokenizer",
                tokenizers["rgb"],
                "--data_root",
                data,
                "--num_crops",
                CROPS,
                "--num_workers",
                1,
                "--batch_size",
                1,
                "--device",
                "cpu",
            ),
            start_new_session=True,
            stderr=subprocess.PIPE,
        )
        finished, deadline = [], time.monotonic() + 60
        while len(finished) < 2 and time.monotonic() < deadline:
            finished = [path for path in output.rglob(f"*.{suffix}") if not path.name.startswith(".")]
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.communicate()  # until the last of them has ended
        assert process.returncode == -signal.SIGKILL
        done = len([path for path in output.rglob(f"*.{suffix}") if not path.name.startswith(".")])
        assert 2 <= done < (count // per_shard if kind == "shards" else count)
        remaining = count - done * (per_shard if kind == "shards" else 1)
        assert save_tokens(options(tokenizers["rgb"], data)) == remaining
        whole = tmp_path / "whole" / kind
        assert save_tokens(options(tokenizers["rgb"], whole)) == count
        for made in (f"tok_rgb@{SIDE}", "crop_settings"):
            assert contents(data / made) == contents(whole / made)


def test_half_a_file_is_not_taken_for_finished(tokenizers, data):
    save_tokens(options(tokenizers["rgb"], data))
    output = data / f"tok_rgb@{SIDE}"
    before = contents(output)
    victim = output / next(iter(before))
    for folder in (output, data / "rgb", data / "crop_settings"):
        (folder / f".tmp-123-{victim.name}").write_bytes(victim.read_bytes()[:100])  # what a killed run leaves
    victim.unlink()
    assert save_tokens(options(tokenizers["rgb"], data)) in (1, PER_SHARD)
    assert contents(output) == before


def test_scripts_report_mistakes_in_one_line(tokenizers, tmp_path):
    write_files(tmp_path, "rgb", 3)
    save_tokens(options(tokenizers["rgb"], tmp_path))
    arguments = ("--tokenizer", tokenizers["rgb"], "--data_root", tmp_path)
    fit = [warm_python(), "-m", "fourm", "fit-codebook"]
    for command, message in [
        (
            script("save_vq_tokens.py", *arguments, "--num_crops", 5),
            "was made with another num_crops (3, now 5)",
        ),
        ([*fit, "--data_root", str(tmp_path), "--modalty", "rgb"], "did you mean '--modality'?"),
    ]:
        result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
