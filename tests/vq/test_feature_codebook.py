"""Tokens of a network's features; the networks are timm's smallest, with random weights."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from fourm.utils.errors import DataError, UserError
from fourm.vq import FeatureCodebook, FeatureCodebookConfig, load_tokenizer, save_tokens
from fourm.vq.feature_codebook import create_backbone
from tests.vq.image_files import read_files, write_files
from tests.vq.test_fit_codebook import fit

SIZE = 32
NETWORKS = [("test_vit", 16, 64), ("test_efficientnet", 8, 32), ("test_efficientnet", 16, 48)]  # stride, channels


def config(backbone="test_efficientnet", patch_size=8, **changes):
    return FeatureCodebookConfig(
        **{"modality": "rgb", "vocab_size": 8, "patch_size": patch_size, "num_channels": 3, "input_size": SIZE}
        | changes,
        backbone=backbone,
    )


@pytest.mark.parametrize(("backbone", "patch_size", "channels"), NETWORKS)
def test_items_are_the_directions_of_the_network_s_features(backbone, patch_size, channels):
    torch.manual_seed(0)
    network = create_backbone(config(backbone, patch_size))
    images = torch.rand(2, 3, SIZE, SIZE)
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    maps = network.eval().forward_intermediates((images - mean) / std, norm=True, intermediates_only=True)
    expected = [features for features in maps if features.shape[2] == SIZE // patch_size][-1].detach()
    items = FeatureCodebook(config(backbone, patch_size), network).items(images * 2 - 1)
    assert items.shape == (2, SIZE // patch_size, SIZE // patch_size, channels)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(items, expected.permute(0, 2, 3, 1), atol=1e-5, rtol=0)


def test_images_become_tokens_and_tokens_features(tmp_path):
    write_files(tmp_path, "rgb", 8)
    torch.manual_seed(0)
    weights = timm.create_model("test_efficientnet").state_dict()
    save_file(weights, tmp_path / "network.safetensors")
    fit(tmp_path, "rgb", backbone="test_efficientnet", backbone_weights=tmp_path / "network.safetensors")
    tokenizer = load_tokenizer(tmp_path / "codebook")
    assert isinstance(tokenizer, FeatureCodebook) and tokenizer.config.backbone == "test_efficientnet"
    own = tokenizer.backbone.state_dict()
    assert own and all(torch.equal(tensor, weights[name]) for name, tensor in own.items())
    # What follows on the map is not kept.
    assert len(own) < len(weights)
    save_tokens.main(
        [
            "--tokenizer",
            str(tmp_path / "codebook"),
            "--data_root",
            str(tmp_path),
            "--output_modality",
            "tok_net@32",
            "--num_crops",
            "2",
            "--device",
            "cpu",
        ]
    )
    tokens = torch.stack([torch.from_numpy(array) for array in read_files(tmp_path / "tok_net@32").values()]).long()
    assert tokens.shape == (8, 2, 16) and len(tokens.unique()) > 8
    features = tokenizer.decode_tokens(tokens.view(16, 4, 4))
    assert features.shape == (16, 32, 4, 4)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(16, 4, 4))


def test_the_nearest_feature_is_a_token(tmp_path):
    tokenizer = FeatureCodebook(config())
    images = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    items = tokenizer.items(images)
    report = tokenizer.fit(items.flatten(0, 2), epochs=3, generator=torch.Generator().manual_seed(0))
    ids = tokenizer.tokenize(images)
    distances = (items[:, :, :, None] - tokenizer.codebook).square().sum(-1)
    assert torch.equal(ids, distances.argmin(-1)) and 0 < report.error < 1
    tokenizer.save(tmp_path / "t")
    assert torch.equal(load_tokenizer(tmp_path / "t").tokenize(images), ids)


def test_a_network_of_one_size_says_so():
    with pytest.raises(DataError, match="takes images of 32x32, not"):
        FeatureCodebook(config("test_vit", 16)).tokenize(torch.zeros(1, 3, 64, 64))
    assert FeatureCodebook(config()).tokenize(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "test_efficientnett"}, r"timm has no network 'test_efficientnett' \(did you mean"),
        ({"patch_size": 4, "backbone": "test_vit"}, "test_vit has feature maps of stride 16: patch_size must be one"),
        ({"backbone": "test_vit", "one_hot_classes": 3}, "'one_hot_classes' is for patches"),
        ({"backbone_weights": "w.pth"}, "'backbone_weights' needs a 'backbone'"),
        (
            {"backbone": "test_resnet", "backbone_weights": "none.pth"},
            "none.pth does not hold the weights of test_resnet",
        ),
    ],
)
def test_options_that_do_not_fit_are_an_error(tmp_path, changes, message):
    write_files(tmp_path, "rgb", 2)
    with pytest.raises(UserError, match=message):
        fit(tmp_path, "rgb", **changes)
    assert not (tmp_path / "codebook").exists()


class Stranger:
    """What no file of weights holds."""


def test_weights_of_another_network_and_objects_are_an_error(tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    torch.save({"state_dict": Stranger()}, tmp_path / "object.pth")
    with pytest.raises(UserError, match="object.pth does not hold the weights of test_efficientnet: .*Stranger"):
        create_backbone(config(), tmp_path / "object.pth")
    with pytest.raises(UserError, match="vit.pth does not hold the weights of test_efficientnet: .*Missing key"):
        create_backbone(config(), tmp_path / "vit.pth")


def test_images_without_colours_are_an_error(tmp_path):
    write_files(tmp_path, "depth", 2)
    with pytest.raises(UserError, match="backbone test_vit needs RGB images, but depth has 1 channels"):
        fit(tmp_path, "depth", backbone="test_vit", patch_size=16)
