"""save_vq_tokens.py with tokenizers of features, with the published option names, in batches, and in bfloat16."""

import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fourm.data.transforms.image import IMAGENET_MEAN, IMAGENET_STD
from fourm.utils.errors import DataError, UserError
from fourm.vq import TOKENIZERS, PatchCodebook, PatchCodebookConfig, load_tokenizer
from fourm.vq.features import FeatureNetwork, timm_network
from fourm.vq.save_tokens import main
from tests.vq.image_files import read_files, write_files, write_shards
from tests.vq.test_loading import published_pth
from tests.vq.test_vqvae import FEATURES, VECTORS, toy

COUNT, WIDTH = 4, 1000  # of test_vit's features


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of the weights of a small network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture
def data(tmp_path):
    write_files(tmp_path / "data", "rgb", COUNT)
    return tmp_path / "data"


def save(*arguments):
    main([*map(str, arguments), "--num_workers", "0", "--device", "cpu"])


def of_features(tmp_path, **options):
    model = toy(**options)
    with torch.no_grad():  # otherwise it hardly looks at its input
        next(parameter for name, parameter in model.encoder.named_parameters() if name.endswith("weight")).mul_(30)
    model.save(tmp_path / "tokenizer")
    return model, ("--tokenizer", tmp_path / "tokenizer", "--data_root", tmp_path / "data")


def pixels_of(path, crops, side):
    """The crops of a picture as networks see them; resized by Pillow, so almost as the pipeline does."""
    picture = Image.open(path).convert("RGB")
    for top, left, height, width, flip in crops.tolist():
        crop = picture.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
        pixels = (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
        yield pixels.flip(-1) if flip else pixels


@pytest.mark.parametrize(
    ("options", "output", "shape"),
    [
        (FEATURES | {"modality": "CLIP-B16", "image_size": 32}, "tok_clip@32", (2, 4)),
        (VECTORS | {"modality": "DINOv2-B14-global"}, "tok_dinov2_global", (2, 4)),
    ],
    ids=["map", "global"],
)
def test_features_are_made_of_the_pictures_as_in_training(tmp_path, data, weights, options, output, shape):
    _, arguments = of_features(tmp_path, **options | {"n_channels": WIDTH, "feature_network": "test_vit"})
    given = (*arguments, "--feature_weights", weights, "--num_crops", 2, "--input_size", 32)
    save(*given)
    tokens, crops = read_files(data / output), read_files(data / "crop_settings")
    assert len(tokens) == COUNT and all(ids.shape == shape and ids.dtype == np.int16 for ids in tokens.values())
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    network = FeatureNetwork(timm_network("test_vit", str(weights), dynamic_img_size=True), "global" in output)
    expected = {
        key: torch.cat(
            [tokenizer.tokenize(network(x[None])).flatten(1) for x in pixels_of(data / f"rgb/{key}.png", own, 32)]
        )
        for key, own in crops.items()
    }
    same = np.mean([np.mean(tokens[key] == expected[key].numpy()) for key in tokens])
    assert same > 0.9 and len({tuple(ids.flatten()) for ids in tokens.values()}) > 1
    save(*given, "--dry_run")  # a record that fits
    with pytest.raises(UserError, match="was made with another feature_weights"):
        save_file(timm.create_model("test_vit").state_dict(), tmp_path / "other.safetensors")
        save(*given, "--feature_weights", tmp_path / "other.safetensors")


def test_a_network_that_does_not_fit_is_named(tmp_path, data, weights):
    _, arguments = of_features(tmp_path, **FEATURES, modality="CLIP-B16")
    given = (*arguments, "--feature_network", "test_vit", "--feature_weights", weights)
    with pytest.raises(UserError, match="'feature_network': test_vit gives 1000 features, but the tokenizer takes 12"):
        save(*given)
    with pytest.raises(UserError, match="'input_size' 40 is not a multiple of 16, the patch size of test_vit"):
        save(*given, "--input_size", 40)
    _, arguments = of_features(tmp_path, modality="rgb")
    with pytest.raises(UserError, match="tokenizes rgb, not features of a network"):
        save(*arguments, "--feature_network", "test_vit")


def test_features_in_files_are_tokenized(tmp_path, data):
    model, arguments = of_features(tmp_path, **FEATURES | {"modality": "ImageBind-H14", "image_size": 32})
    rng = np.random.default_rng(0)
    maps = {key: rng.normal(size=(2, 12, 2, 2)).astype(np.float32) for key in read_keys(data)}
    for key, own in maps.items():
        write_npy(data / f"ImageBind-H14/{key}.npy", own[0])
    with pytest.raises(UserError, match="'main_modality' is not set: name the folder of the pictures"):
        save(*arguments, "--num_crops", 1)
    save(*arguments, "--num_crops", 1, "--main_modality", "rgb")
    tokens = read_files(data / "tok_imagebind@32")
    for key, own in maps.items():
        expected = model.tokenize(torch.from_numpy(own[:1])).flatten(1)
        np.testing.assert_array_equal(tokens[key], expected.numpy())
    crops = read_files(data / "crop_settings")
    assert all(np.array_equal(own, [[0, 12, 72, 72, 0]]) for own in crops.values())

    # Those of several crops are only meaningful with the crops that they were made of.
    for key, own in maps.items():
        write_npy(data / f"several/{key}.npy", own)
    several = (
        *arguments,
        "--num_crops",
        2,
        "--main_modality",
        "rgb",
        "--modality",
        "several",
        "--output_modality",
        "tok",
    )
    with pytest.raises(UserError, match="crop_settings has shape"):
        save(*several)
    for key in maps:
        (data / f"crop_settings/{key}.npy").unlink()
    with pytest.raises(DataError, match="the crops of its features are not known"):
        save(*several)
    for key in maps:
        write_npy(data / f"crop_settings/{key}.npy", np.array([[0, 12, 72, 72, 0], [0, 0, 72, 72, 1]]))
    save(*several)
    for key, own in maps.items():
        expected = model.tokenize(torch.from_numpy(own)).flatten(1)
        np.testing.assert_array_equal(np.load(data / f"tok/{key}.npy"), expected.numpy())
    with pytest.raises(DataError, match=r"expected a grid of shape \(12, 4, 4\), not \(12, 2, 2\)"):
        save(*several, "--input_size", 64, "--output_modality", "other")


def write_npy(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def read_keys(data):
    return [path.relative_to(data / "rgb").with_suffix("").as_posix() for path in sorted((data / "rgb").rglob("*.png"))]


def test_the_published_option_names_are_understood(tmp_path):
    write_files(tmp_path / "train", "rgb", COUNT)
    (tmp_path / "train/rgb/part0/00000.png").write_bytes(b"no picture")
    model = toy()
    (tmp_path / "ckpts/cc12m").mkdir(parents=True)
    published_pth(tmp_path / "ckpts/cc12m/rgb.pth", model, domain="rgb")
    save(
        "--tokenizer_id",
        "cc12m/rgb",
        "--tokenizers_root",
        tmp_path / "ckpts",
        "--data_root",
        tmp_path,
        "--split",
        "train",
        "--n_crops",
        3,
        "--min_crop_scale",
        0.8,
        "--input_size",
        32,
        "--task",
        "rgb",
        "--resample_mode",
        "nearest",
        "--corrupt_samples_log",
        tmp_path / "bad.txt",
        "--verbose",
        "--seed",
        0,
        "--folder_suffix",
        "dvae_BUa_224",
        "--pin_mem",
        "--batch_size_dataloader",
        2,
        "--batch_size",
        4,
        "--max_bad_fraction",
        1,
    )
    tokens, crops = read_files(tmp_path / "train/rgb_dvae_BUa_224"), read_files(tmp_path / "train/crop_settings")
    assert len(tokens) == COUNT - 1 and all(ids.shape == (3, 16) for ids in tokens.values())
    assert all((own[:, 2] * own[:, 3] > 0.7 * 72 * 72).all() for own in crops.values())
    assert "key 'part0/00000'" in (tmp_path / "bad.txt").read_text()
    given = ("--tokenizer_id", "cc12m/rgb", "--tokenizers_root", tmp_path / "ckpts", "--data_root", tmp_path / "train")
    with pytest.raises(UserError, match="key 'part0/00002': it has no crop_settings, and with force_load_crop"):
        (tmp_path / "train/crop_settings/part0/00002.npy").unlink()
        save(*given, "--n_crops", 3, "--force_load_crop", "--max_bad_fraction", 1)
    with pytest.raises(UserError, match="was made with another resample_mode"):
        save(*given, "--n_crops", 3, "--output_modality", "rgb_dvae_BUa_224")
    with pytest.raises(UserError, match=r"unknown key '--tokenizers_rot' \(did you mean '--tokenizers_root'\?\)"):
        save("--tokenizers_rot", "x")


class Counting(PatchCodebook):
    """Remembers how many crops it was given at a time."""

    kind = "counting"
    batches: list = []

    def tokenize(self, x):
        self.batches.append(len(x))
        return super().tokenize(x)


def test_crops_of_several_images_are_tokenized_together(tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENIZERS, "counting", Counting)
    Counting(PatchCodebookConfig("rgb", 8, 8, 3, 32)).save(tmp_path / "tokenizer")
    write_shards(tmp_path, "rgb", COUNT, COUNT)
    given = ("--tokenizer", tmp_path / "tokenizer", "--data_root", tmp_path, "--num_crops", 3)
    for batch, expected in (((), [12]), (("--batch_size", 6), [6, 6]), (("--batch_size", 2), [2, 1] * 4)):
        Counting.batches.clear()
        save(*given, *batch, "--overwrite")
        assert Counting.batches == expected


def test_processes_share_the_images(tmp_path, monkeypatch):
    codebook = PatchCodebook(PatchCodebookConfig("rgb", 16, 8, 3, 32))
    codebook.codebook.normal_(generator=torch.Generator().manual_seed(0))
    codebook.save(tmp_path / "tokenizer")
    write_files(tmp_path / "files", "rgb", 5)
    write_shards(tmp_path / "shards", "rgb", 5, 2)
    for kind in ("files", "shards"):
        given = ("--tokenizer", tmp_path / "tokenizer", "--data_root", tmp_path / kind, "--num_crops", 2)
        save(*given, "--output_modality", "alone")
        alone = {path.name: path.read_bytes() for path in (tmp_path / kind / "alone").rglob("[!.]*.*")}
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            before = [*(tmp_path / kind / "shared").rglob("[!.]*.*")]
            save(*given, "--output_modality", "shared")
            assert len([*(tmp_path / kind / "shared").rglob("[!.]*.*")]) - len(before) == (len(alone) + 1 - rank) // 2
        shared = {path.name: path.read_bytes() for path in (tmp_path / kind / "shared").rglob("[!.]*.*")}
        assert shared == alone
        with pytest.raises(UserError, match="'overwrite': several processes"):
            save(*given, "--output_modality", "shared", "--overwrite")
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


def test_bfloat16_is_only_used_with_a_warning_and_never_mixed(tmp_path, data, caplog):
    _, arguments = of_features(tmp_path, modality="rgb", codebook_size=4096)
    given = (*arguments, "--num_crops", 4)
    with caplog.at_level(logging.WARNING):
        with torch.autocast("cpu", torch.bfloat16):  # whatever surrounds it, float32 it is
            save(*given, "--output_modality", "in_float32")
        save(*given)
        assert not caplog.records
        save(*given, "--output_modality", "in_bfloat16", "--bf16")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["bf16"]
    for name, equal in (("in_float32", True), ("in_bfloat16", False)):
        first, second = read_files(data / "tok_rgb@32"), read_files(data / name)
        assert all(np.array_equal(first[key], second[key]) for key in first) == equal
    with pytest.raises(UserError, match=r"was made with another bf16 \(True, now None\)"):
        save(*given, "--output_modality", "in_bfloat16")
