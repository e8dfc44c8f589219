"""fourm fit-codebook: from images on disk to a codebook that tells what is on them."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fourm.data import MODALITY_TRANSFORMS
from fourm.utils.errors import UserError
from fourm.vq import fit_codebook, load_tokenizer, save_tokens
from tests.vq.image_files import read_files, write_files

P, SIDE = 8, 32


def fit(root, modality, **changes):
    defaults = {"vocab_size": 32, "patch_size": P, "input_size": SIDE, "num_workers": 0, "device": "cpu"}
    arguments = {"data_root": root, "modality": modality, "output": root / "codebook"} | defaults | changes
    fit_codebook.main([text for name, value in arguments.items() for text in (f"--{name}", str(value))])


def test_decoded_tokens_resemble_the_crops_they_were_made_of(tmp_path, capsys):
    write_files(tmp_path, "depth", 12)
    fit(tmp_path, "depth", transform_options="{standardize_depth: false}")
    assert "32 of 32 codes in use" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "codebook")
    assert tokenizer.config.transform_options == {"standardize_depth": False}
    save_tokens.main(
        ["--tokenizer", str(tmp_path / "codebook"), "--data_root", str(tmp_path), "--num_crops", "2", "--device", "cpu"]
    )
    assert "12 images were tokenized" in capsys.readouterr().out
    crops = read_files(tmp_path / "crop_settings")
    for key, tokens in read_files(tmp_path / f"tok_depth@{SIDE}").items():
        depth = torch.from_numpy(np.array(Image.open(tmp_path / "depth" / f"{key}.png")) / 65535)
        decoded = tokenizer.decode_tokens(torch.from_numpy(tokens).long().unflatten(1, (SIDE // P, SIDE // P)))
        for (top, left, height, width, flip), picture in zip(crops[key].tolist(), decoded, strict=True):
            crop = depth[top : top + height, left : left + width]
            crop = crop.flip(1) if flip else crop
            coarse = torch.nn.functional.interpolate(crop[None, None], SIDE, mode="area")[0]
            assert (picture - coarse).abs().mean() < 0.1


def test_same_seed_same_codebook(tmp_path):
    write_files(tmp_path, "rgb", 6)
    weights = []
    for seed in (0, 0, 1):
        fit(tmp_path, "rgb", seed=seed)
        weights.append((tmp_path / "codebook" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_folder_of_another_name(tmp_path):
    write_files(tmp_path, "depth", 6)
    (tmp_path / "depth").rename(tmp_path / "lidar")
    with pytest.raises(UserError, match="'lidar' is not a modality of pixels"):
        fit(tmp_path, "lidar")
    fit(tmp_path, "lidar", transform="depth")
    assert load_tokenizer(tmp_path / "codebook").config.modality == "depth"


def test_a_transform_of_a_plugin(tmp_path, monkeypatch):
    write_files(tmp_path, "depth", 6)
    (tmp_path / "half_depth.py").write_text(
        "from fourm.data import MODALITY_TRANSFORMS\n"
        "from fourm.data.modality_transforms import DepthTransform\n"
        "class HalfDepth(DepthTransform):\n"
        "    def postprocess(self, value):\n"
        "        return super().postprocess(value) / 2\n"
        "MODALITY_TRANSFORMS['half_depth'] = HalfDepth(standardize_depth=False)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        fit(tmp_path, "depth", plugin="half_depth", transform="half_depth")
        assert load_tokenizer(tmp_path / "codebook").codebook.max() < 0.51
        del MODALITY_TRANSFORMS["half_depth"], sys.modules["half_depth"]  # as in a new process
        save_tokens.main(
            [
                "--tokenizer",
                str(tmp_path / "codebook"),
                "--data_root",
                str(tmp_path),
                "--num_crops",
                "1",
                "--modality",
                "depth",
                "--num_workers",
                "0",
                "--plugin",
                "half_depth",
                "--output_modality",
                "tok_half",
            ]
        )
        assert len(read_files(tmp_path / "tok_half")) == 6
    finally:
        MODALITY_TRANSFORMS.pop("half_depth", None)
        sys.modules.pop("half_depth", None)


def test_maps_of_classes(tmp_path):
    write_files(tmp_path, "semseg", 6)  # classes 0 and 3
    with pytest.raises(UserError, match="class id 3 of semseg is not below one_hot_classes = 3"):
        fit(tmp_path, "semseg", one_hot_classes=3)
    fit(tmp_path, "semseg", one_hot_classes=4)
    tokenizer = load_tokenizer(tmp_path / "codebook")
    assert set(tokenizer.decode_tokens(torch.arange(32).view(1, 4, 8)).unique().tolist()) == {0.0, 3.0}


def test_codebook_needs_enough_patches(tmp_path):
    write_files(tmp_path, "rgb", 2)
    with pytest.raises(UserError, match="gives only 32 patches for 1000 codes: lower vocab_size"):
        fit(tmp_path, "rgb", vocab_size=1000, num_crops=1)
    assert not (tmp_path / "codebook").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "'epochs' must be at least 1, not 0"),
        ({"vocab_size": 0}, "'vocab_size' must be at least 1"),
        ({"input_size": 30}, "input_size 30 is not a multiple of patch_size 8"),
        ({"vocab_siz": 3}, r"unknown key '--vocab_siz' \(did you mean '--vocab_size'\?\)"),
    ],
)
def test_options_that_do_not_fit_are_an_error(tmp_path, changes, message):
    write_files(tmp_path, "rgb", 2)
    with pytest.raises(UserError, match=message):
        fit(tmp_path, "rgb", **changes)
