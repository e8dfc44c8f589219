"""save_vq_tokens.py: what it writes, for which crops, and what an interruption or bad input leaves behind."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fourm.data import UnifiedDataTransform, bad_samples
from fourm.data.bad_samples import BadSampleLedger
from fourm.data.data_config import load_data_config
from fourm.data.folders import Folders
from fourm.data.image_augmenter import PreTokenizedImageAugmenter
from fourm.data.modality_transforms import RGBTransform, TokTransform
from fourm.data.raw_sample import OpenFiles
from fourm.data.shards import Shards
from fourm.data.unified_datasets import build_eval_loader
from fourm.utils.errors import DataError, UserError
from fourm.utils.seeds import generator
from fourm.vq import TOKENIZERS, PatchCodebook, PatchCodebookConfig, load_tokenizer
from fourm.vq.crops import tokenizer_transform
from fourm.vq.save_tokens import SaveTokensOptions, save_tokens, token_dtype
from tests.vq.image_files import SIZE, image, read_files, write_files, write_shards
from tests.warm_python import warm_python

REPOSITORY = Path(__file__).parents[2]
COUNT, PER_SHARD, CROPS, SIDE, P, VOCAB = 10, 4, 3, 32, 8, 64
GRID = (SIDE // P) ** 2
CHANNELS = {"rgb": 3, "depth": 1, "normal": 3}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """modality → folder of a tokenizer, whose codes are random: different patches get different ids."""
    root = tmp_path_factory.mktemp("tokenizers")
    for number, (modality, channels) in enumerate(CHANNELS.items()):
        codebook = PatchCodebook(PatchCodebookConfig(modality, VOCAB, P, channels, SIDE))
        codebook.codebook.normal_(generator=torch.Generator().manual_seed(number))
        codebook.save(root / modality)
    return {modality: str(root / modality) for modality in CHANNELS}


@pytest.fixture(params=["shards", "folders"])
def data(request, tmp_path):
    """A data set of one kind."""
    root = tmp_path / "data"
    for modality in ("rgb", "depth"):
        if request.param == "shards":
            write_shards(root, modality, COUNT, PER_SHARD)
        else:
            write_files(root, modality, COUNT)
    return root


def options(tokenizer, data, **changes):
    defaults = {"num_crops": CROPS, "num_workers": 0, "batch_size": 3, "device": "cpu"}
    return SaveTokensOptions(tokenizer=tokenizer, data_root=str(data), **(defaults | changes))


def arrays(folder):
    """key → array, from shards or from files."""
    if not any(folder.glob("*.tar")):
        return read_files(folder)
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                found[member.name.removesuffix(".npy")] = np.load(io.BytesIO(tar.extractfile(member).read()))
    return found


def contents(folder):
    """Every file that counts, byte for byte."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def ids(root, name):
    return arrays(root / name)


def test_layout_follows_the_images(tokenizers, data):
    assert save_tokens(options(tokenizers["rgb"], data)) == COUNT
    for made in (f"tok_rgb@{SIDE}", "crop_settings"):
        images, results = contents(data / "rgb"), contents(data / made)
        assert [name.replace(".png", ".npy") for name in images] == list(results)
        if "shard-00000.tar" in images:
            for name in images:
                with tarfile.open(data / "rgb" / name) as first, tarfile.open(data / made / name) as second:
                    assert [n.replace(".png", ".npy") for n in first.getnames()] == second.getnames()
    for tokens in ids(data, f"tok_rgb@{SIDE}").values():
        assert tokens.shape == (CROPS, GRID)
        assert tokens.dtype == np.int16
    for crops in ids(data, "crop_settings").values():
        assert crops.shape == (CROPS, 5)
        assert crops[0].tolist() == [0, (SIZE[1] - SIZE[0]) // 2, SIZE[0], SIZE[0], 0]


def test_shards_and_folders_give_the_same(tokenizers, tmp_path):
    write_shards(tmp_path / "shards", "rgb", COUNT, PER_SHARD)
    write_files(tmp_path / "folders", "rgb", COUNT)
    for kind in ("shards", "folders"):
        save_tokens(options(tokenizers["rgb"], tmp_path / kind))
    for made in (f"tok_rgb@{SIDE}", "crop_settings"):
        first, second = (arrays(tmp_path / kind / made) for kind in ("shards", "folders"))
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[key], second[key]) for key in first)


def test_all_modalities_share_the_crops(tokenizers, data):
    save_tokens(options(tokenizers["rgb"], data))
    before = contents(data / "crop_settings")
    save_tokens(options(tokenizers["depth"], data, seed=7, hflip=0.0))  # the stored crops count, not these
    assert contents(data / "crop_settings") == before
    # and what was made for them is what the crops of that modality look like
    tokenizer = load_tokenizer(tokenizers["depth"])
    crops, tokens = ids(data, "crop_settings"), ids(data, f"tok_depth@{SIDE}")
    for index in range(3):
        key = f"part{index % 2}/{index:05d}"
        for crop, row in zip(crops[key], tokens[key], strict=True):
            assert np.array_equal(_tokens(tokenizer, "depth", image("depth", index), crop), row)


def _tokens(tokenizer, modality, content, crop):
    top, left, height, width, flip = crop.tolist()
    transform = tokenizer_transform(modality, {})
    pixels = transform.image_augment(content, (top, left, height, width), bool(flip), None, (SIDE, SIDE), 0)
    return tokenizer.tokenize(torch.from_numpy(transform.postprocess(pixels))[None]).flatten().numpy()


def test_flips_and_stored_crops_are_applied(tokenizers, tmp_path):
    # Crops as large as the input need no resizing: the expected patches can be cut out by hand.
    write_files(tmp_path, "rgb", 4)
    crops = np.array([[0, 12, 72, 72, 0], [0, 20, 72, 72, 1], [0, 0, 72, 72, 0]])
    for path in (tmp_path / "rgb").rglob("*.png"):
        stored = (tmp_path / "crop_settings" / path.relative_to(tmp_path / "rgb")).with_suffix(".npy")
        stored.parent.mkdir(parents=True, exist_ok=True)
        np.save(stored, crops)
    save_tokens(options(tokenizers["rgb"], tmp_path, input_size=72))
    tokenizer = load_tokenizer(tokenizers["rgb"])
    for path in sorted((tmp_path / "rgb").rglob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1
        expected = torch.stack([pixels[..., 12:84], pixels[..., 20:92].flip(-1), pixels[..., :72]])
        found = np.load((tmp_path / "tok_rgb@72" / path.relative_to(tmp_path / "rgb")).with_suffix(".npy"))
        assert np.array_equal(found, tokenizer.tokenize(expected).flatten(1).numpy())
        assert not np.array_equal(found[1], tokenizer.tokenize(expected[1:2].flip(-1)).flatten().numpy())


def test_mirrored_normals_turn_around(tokenizers, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (72, 72, 3), dtype=np.uint8)
    for folder in ("normal", "crop_settings"):
        (tmp_path / folder).mkdir()
    Image.fromarray(pixels).save(tmp_path / "normal" / "a.png")
    np.save(tmp_path / "crop_settings" / "a.npy", np.array([[0, 0, 72, 72, 0], [0, 0, 72, 72, 1]]))
    save_tokens(options(tokenizers["normal"], tmp_path, input_size=72, num_crops=2))
    normals = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    mirrored = normals.flip(-1) * torch.tensor([-1.0, 1, 1])[:, None, None]
    expected = load_tokenizer(tokenizers["normal"]).tokenize(torch.stack([normals, mirrored]))
    assert np.array_equal(np.load(tmp_path / "tok_normal@72" / "a.npy"), expected.flatten(1).numpy())


def test_what_is_written_is_what_training_reads(tokenizers, data):
    """Read by key, cut to a stored crop: the picture tokenized again gives the row of tokens that came with it."""
    save_tokens(options(tokenizers["rgb"], data))
    wanted = {name: name for name in ("rgb", f"tok_rgb@{SIDE}", "crop_settings")}
    ledger = BadSampleLedger("test", 0.0)
    if any((data / "rgb").glob("*.tar")):
        samples = Shards(f"{data}/[{','.join(wanted)}]/shard-{{00000..00002}}.tar", wanted).all(ledger)
    else:
        samples = Folders(str(data), wanted, None, ledger).all(ledger)
    assert len(samples) == COUNT
    transforms = {
        "rgb": RGBTransform(imagenet_default_mean_and_std=False),
        f"tok_rgb@{SIDE}": TokTransform(vocab_size=VOCAB, num_tokens=GRID),
    }
    tokenizer, seen = load_tokenizer(tokenizers["rgb"]), set()
    for no_aug in (True, False):
        transform, rng = UnifiedDataTransform(transforms, PreTokenizedImageAugmenter(SIDE, no_aug)), generator("test")
        for sample in samples:
            values = sample.values(OpenFiles(), keep_pixels=False)
            result = transform(values, rng)
            again = tokenizer.tokenize(torch.from_numpy(result["rgb"])[None]).flatten().numpy()
            assert np.array_equal(result[f"tok_rgb@{SIDE}"], again)
            rows = values[f"tok_rgb@{SIDE}"]
            seen.add((no_aug, next(i for i, row in enumerate(rows) if np.array_equal(row, again))))
    assert seen == {(True, 0), (False, 0), (False, 1), (False, 2)}


def test_tokens_travel_through_the_pipeline(tokenizers, data):
    save_tokens(options(tokenizers["rgb"], data))
    names = ("rgb", f"tok_rgb@{SIDE}")
    shape = {"type": "img", "input_size": SIDE, "patch_size": P}
    declared = {names[0]: shape | {"num_channels": 3}, names[1]: shape | {"vocab_size": VOCAB}}
    shards = any((data / "rgb").glob("*.tar"))
    dataset = {
        "in_domains": "-".join(names),
        "out_domains": names[1],
        "input_alphas": 1.0,
        "target_alphas": 1.0,
        "main_augment_domain": "rgb",
        "use_wds": shards,
        "max_bad_fraction": 0.0,
        "data_path": f"{data}/[{','.join(names)},crop_settings]/shard-{{00000..00002}}.tar" if shards else str(data),
    }
    path = data / "data.yaml"
    path.write_text(yaml.safe_dump({"modalities": declared, "train": {"datasets": {"toy": dataset}}}))
    config = load_data_config(path, num_input_tokens=8, num_target_tokens=8)
    batches = build_eval_loader(config.train["toy"], None, batch_size=4, num_workers=0, rank=0, world_size=1, seed=0)
    rows = torch.cat([batch.mod_dict[names[1]]["tensor"].flatten(1) for batch in batches])
    centre = {tuple(tokens[0].tolist()) for tokens in ids(data, names[1]).values()}
    assert {tuple(row.tolist()) for row in rows} == centre
    assert len(rows) == COUNT


def test_integer_type_is_the_smallest_that_holds_every_id(tmp_path):
    assert [token_dtype(size) for size in (2, 2**15, 2**15 + 1)] == [np.int16, np.int16, np.int32]
    codebook = PatchCodebook(PatchCodebookConfig("depth", 40_000, P, 1, SIDE))
    codebook.codebook[-1] = 1.0  # the nearest to everything bright
    codebook.save(tmp_path / "codebook")
    write_files(tmp_path, "depth", 2)
    save_tokens(options(str(tmp_path / "codebook"), tmp_path))
    for tokens in ids(tmp_path, f"tok_depth@{SIDE}").values():
        assert tokens.dtype == np.int32
        assert tokens.max() == 39_999


def test_run_again_does_nothing(tokenizers, data):
    save_tokens(options(tokenizers["rgb"], data))
    before = {path: path.stat().st_mtime_ns for path in data.rglob("[!.]*.*")}
    assert save_tokens(options(tokenizers["rgb"], data, dry_run=True)) == 0
    assert save_tokens(options(tokenizers["rgb"], data)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_new_images_are_added(tokenizers, data):
    save_tokens(options(tokenizers["rgb"], data))
    before = contents(data / f"tok_rgb@{SIDE}")
    if any((data / "rgb").glob("*.tar")):
        write_shards(data, "rgb", COUNT + 6, PER_SHARD)  # one shard more; what the third one got is too late
    else:
        write_files(data, "rgb", COUNT + 4)
    assert save_tokens(options(tokenizers["rgb"], data)) == 4
    assert contents(data / f"tok_rgb@{SIDE}").items() >= before.items()


def test_dry_run_writes_nothing(tokenizers, data):
    before = contents(data)
    assert save_tokens(options(tokenizers["rgb"], data, dry_run=True)) == COUNT
    assert contents(data) == before
    save_tokens(options(tokenizers["rgb"], data))
    assert save_tokens(options(tokenizers["rgb"], data, dry_run=True, overwrite=True)) == COUNT


def test_chosen_shards_only(tokenizers, tmp_path):
    write_shards(tmp_path, "rgb", COUNT, PER_SHARD)
    assert save_tokens(options(tokenizers["rgb"], tmp_path, shards="shard-{00001..00002}.tar")) == COUNT - PER_SHARD
    assert list(contents(tmp_path / f"tok_rgb@{SIDE}")) == ["shard-00001.tar", "shard-00002.tar"]
    with pytest.raises(UserError, match=r"shard-00003.tar: there is no such shard"):
        save_tokens(options(tokenizers["rgb"], tmp_path, shards="shard-{00002..00003}.tar"))


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


def test_images_of_another_resolution_follow_the_main_modality(tokenizers, tmp_path):
    write_files(tmp_path, "rgb", 3)
    write_files(tmp_path, "depth", 3, size=(36, 48))
    save_tokens(options(tokenizers["rgb"], tmp_path))
    with pytest.raises(UserError, match="set main_modality to the modality that it was made for"):
        save_tokens(options(tokenizers["depth"], tmp_path))
    assert save_tokens(options(tokenizers["depth"], tmp_path, main_modality="rgb")) == 3


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
    return [sys.executable, str(REPOSITORY / name), *map(str, arguments)]


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
            stderr=subprocess.DEVNULL,
        )
        finished, deadline = [], time.monotonic() + 60
        while len(finished) < 2 and time.monotonic() < deadline:
            finished = [path for path in output.rglob(f"*.{suffix}") if not path.name.startswith(".")]
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
        assert process.wait() == -signal.SIGKILL
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
            [warm_python(), *script("save_vq_tokens.py", *arguments, "--num_crops", 5)[1:]],
            "was made with another num_crops (3, now 5)",
        ),
        ([*fit, "--data_root", str(tmp_path), "--modalty", "rgb"], "did you mean '--modality'?"),
    ]:
        result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
