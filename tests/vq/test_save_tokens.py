"""save_vq_tokens.py: what it writes, and for which crops."""

import tarfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fourm.data import UnifiedDataTransform
from fourm.data.bad_samples import BadSampleLedger
from fourm.data.data_config import load_data_config
from fourm.data.folders import Folders
from fourm.data.image_augmenter import PreTokenizedImageAugmenter
from fourm.data.modality_transforms import RGBTransform, TokTransform
from fourm.data.raw_sample import OpenFiles
from fourm.data.shards import Shards
from fourm.data.unified_datasets import build_eval_loader
from fourm.utils.errors import UserError
from fourm.utils.seeds import generator
from fourm.vq import PatchCodebook, PatchCodebookConfig, load_tokenizer
from fourm.vq.crops import tokenizer_transform
from fourm.vq.save_tokens import save_tokens, token_dtype
from tests.page_faults import glibc, memory_is_kept
from tests.vq.image_files import SIZE, image, write_files, write_shards
from tests.vq.saved_tokens import (
    COUNT,
    CROPS,
    GRID,
    PER_SHARD,
    SIDE,
    VOCAB,
    P,
    arrays,
    contents,
    ids,
    options,
    write_data,
    write_tokenizers,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(params=["shards", "folders"])
def data(request, tmp_path):
    return write_data(tmp_path / "data", request.param)


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


def test_images_of_another_resolution_follow_the_main_modality(tokenizers, tmp_path):
    write_files(tmp_path, "rgb", 3)
    write_files(tmp_path, "depth", 3, size=(36, 48))
    save_tokens(options(tokenizers["rgb"], tmp_path))
    with pytest.raises(UserError, match="set main_modality to the modality that it was made for"):
        save_tokens(options(tokenizers["depth"], tmp_path))
    assert save_tokens(options(tokenizers["depth"], tmp_path, main_modality="rgb")) == 3


@glibc
def test_the_command_keeps_freed_memory_on_a_cpu(tokenizers, tmp_path):
    arguments = ["--tokenizer", tokenizers["rgb"], "--data_root", str(write_data(tmp_path, "folders"))]
    arguments += ["--device", "cpu", "--num_workers", "0"]
    assert memory_is_kept(f"from fourm.vq.save_tokens import main; main({arguments})")
