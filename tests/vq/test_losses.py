"""Losses, metrics and pictures of tokenizers, against formulas that are written out."""

import math
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fourm.utils.errors import UserError
from fourm.vq.domains import DOMAINS
from fourm.vq.features import FeatureNetwork, timm_network
from fourm.vq.frechet import FrechetDistance, PooledFeatures
from fourm.vq.losses import LOSSES, PerceptualLoss, PerceptualOptions
from fourm.vq.metrics import (
    abs_rel,
    code_counts,
    codebook_metrics,
    metrics_of,
    ms_ssim,
    region_counts,
    region_metrics,
    sample_metrics,
)
from fourm.vq.pictures import side_by_side


def test_losses_are_the_documented_formulas():
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    products = [
        F.cosine_similarity(x[b, :, i, j], y[b, :, i, j], dim=0) for b in range(2) for i in range(3) for j in range(4)
    ]
    assert LOSSES["cosine_1d"](x, y).item() == pytest.approx(1 - torch.stack(products).mean().item(), rel=1e-5)
    products = [F.cosine_similarity(x[b, c].flatten(), y[b, c].flatten(), dim=0) for b in range(2) for c in range(5)]
    assert LOSSES["cosine"](x, y).item() == pytest.approx(1 - torch.stack(products).mean().item(), rel=1e-5)
    ids = torch.randint(5, (2, 3, 4))
    expected = -x.log_softmax(1).gather(1, ids[:, None]).mean()
    assert LOSSES["cross_entropy"](x, ids).item() == pytest.approx(expected.item(), rel=1e-5)
    error = (x - y).abs()
    expected = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
    assert LOSSES["smooth_l1"](x, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_binary_cross_entropy_reaches_zero_and_its_published_namesake_does_not():
    mask = (torch.rand(2, 1, 8, 8) > 0.5).float()
    perfect = 40 * (2 * mask - 1)
    assert LOSSES["binary_cross_entropy"](perfect, mask).item() == pytest.approx(0, abs=1e-6)
    assert LOSSES["softmax_of_sigmoids"](perfect, mask).item() == pytest.approx(0.3133, abs=1e-4)


@dataclass(frozen=True, kw_only=True)
class Perceptual(PerceptualOptions):
    """Options"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return str(path)


@pytest.mark.parametrize("kind", ["cosine", "l1"])
def test_perceptual_loss_compares_what_the_blocks_of_a_network_see(weights, kind):
    options = Perceptual(
        percept_loss_weight=1.0,
        percept_model="test_vit",
        percept_layers="blocks.1-blocks.3",
        percept_loss_fn=kind,
        dtype_percept="fp32",
    )
    network = timm_network("test_vit", weights)
    loss = PerceptualLoss(network, options)
    torch.manual_seed(0)
    size = network.pretrained_cfg["input_size"][-1]
    x, y = (torch.rand(2, 3, size, size, requires_grad=True), torch.rand(2, 3, size, size))
    seen: list[torch.Tensor] = []
    handles = [network.blocks[i].register_forward_hook(lambda module, inputs, out: seen.append(out)) for i in (1, 3)]
    for picture in (x, y):
        network(((picture + 1) / 2 - loss.mean) / loss.std)
    for handle in handles:
        handle.remove()
    if kind == "cosine":
        expected = sum(1 - F.cosine_similarity(seen[i], seen[i + 2], dim=-1).mean() for i in (0, 1))
    else:
        unit = [F.normalize(part, dim=-1) for part in seen]
        expected = sum((unit[i] - unit[i + 2]).abs().sum(-1).mean() for i in (0, 1))
    found = loss(x, y)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    found.backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in network.parameters())
    # A mean over samples: as many more of the same change nothing.
    assert loss(x.repeat(3, 1, 1, 1), y.repeat(3, 1, 1, 1)).item() == pytest.approx(found.item(), rel=1e-4)
    with pytest.raises(UserError, match="test_vit has 6 blocks"):
        PerceptualLoss(network, Perceptual(percept_model="test_vit", percept_layers="blocks.6"))
    with pytest.raises(UserError, match="'percept_layers' must be like"):
        Perceptual(percept_layers="layers.1")


def test_features_are_those_of_patches_or_of_the_class_token(weights):
    network = timm_network("test_vit", weights, dynamic_img_size=True)
    x = torch.rand(2, 3, 96, 64)
    tokens = network.forward_features(x)
    expected = network.head(network.fc_norm(tokens))
    found = FeatureNetwork(network)(x)
    assert found.shape == (2, expected.shape[-1], 6, 4)
    torch.testing.assert_close(found[0, :, 1, 2], expected[0, 1 + 4 + 2])
    whole = FeatureNetwork(network, single=True)(x)
    torch.testing.assert_close(whole[:, :, 0, 0], F.normalize(expected[:, 0], dim=-1))
    with pytest.raises(UserError, match="timm has no network 'test_vitt' \\(did you mean"):
        timm_network("test_vitt", weights)


def test_metrics_of_known_errors():
    target = torch.zeros(2, 3, 4, 4)
    found = sample_metrics(["l1", "mse", "psnr"], target + 0.2, target)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {"l1": 0.2, "mse": 0.04, "psnr": 20}, rel=1e-5
    )
    normals = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).view(2, 3, 1, 1)
    turned = torch.tensor([[1.0, 1, 0], [0, 1, 0]]).view(2, 3, 1, 1)
    assert sample_metrics(["angle"], turned, normals)["angle"].item() == pytest.approx(22.5, rel=1e-3)
    logits, mask = torch.tensor([[5.0, 5, -5, -5]]).view(1, 1, 2, 2), torch.tensor([[1.0, 0, 0, 0]]).view(1, 1, 2, 2)
    assert sample_metrics(["iou"], logits, mask)["iou"].item() == 0.5
    assert metrics_of(DOMAINS["normal"], "normal", True) == ["l1", "mse", "psnr", "angle"]
    assert metrics_of(DOMAINS["depth"], "depth", False) == ["l1", "mse"]


def test_relative_errors_of_depth():
    torch.manual_seed(0)
    depth = torch.rand(2, 1, 4, 4) + 0.1
    depth[0, 0, 0] = 0  # unknown
    standardised = (depth - 0.5) / 0.2
    errors = sample_metrics(["abs_rel", "abs_rel_fitted"], standardised, standardised, depth)
    assert all(value.item() == pytest.approx(0, abs=1e-5) for value in errors.values())
    # 0.1 of the standardised depth is 0.02 of the depth, a shift that the fit removes.
    shifted = sample_metrics(["abs_rel", "abs_rel_fitted"], standardised + 0.1, standardised, depth)
    expected = [(0.02 / d[d > 0]).mean().item() for d in depth]
    assert shifted["abs_rel"].item() == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert shifted["abs_rel_fitted"].item() == pytest.approx(0, abs=1e-5)
    assert abs_rel(torch.ones(1, 4), torch.zeros(1, 4)).item() == 0  # nothing is known


def test_ms_ssim_is_highest_for_equal_pictures():
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(2, 3, 22, 22) * 2 - 1, (176, 176), mode="bilinear")
    assert ms_ssim(x, x).item() == pytest.approx(1, abs=1e-4)
    noisy, noisier = (ms_ssim(x + size * torch.randn_like(x), x).item() for size in (0.1, 0.5))
    assert noisier < noisy < 0.99


def test_the_frechet_distance_is_that_of_two_gaussians_whatever_the_batches(weights):
    network = timm_network("test_vit", weights)
    torch.manual_seed(0)
    target, prediction = torch.rand(24, 1, 32, 32) * 2 - 1, torch.rand(24, 1, 32, 32)
    real, fake = (PooledFeatures(network)(x.expand(-1, 3, -1, -1)).double() for x in (target, prediction))
    covariances = [features.T.cov() for features in (real, fake)]
    eigenvalues = torch.linalg.eigvals(covariances[0] @ covariances[1])
    expected = (real.mean(0) - fake.mean(0)).square().sum() + sum(c.trace() for c in covariances)
    expected = (expected - 2 * eigenvalues.sqrt().real.sum()).item()
    distance = FrechetDistance(network)
    for sizes in ((24,), (5, 19)):
        parts = [distance.statistics(*pair) for pair in zip(prediction.split(sizes), target.split(sizes), strict=True)]
        sums = {name: sum(part[name] for part in parts) for name in parts[0]}
        assert distance.distance(sums) == pytest.approx(expected, rel=1e-3) and expected > 0
    assert math.isnan(distance.distance(distance.statistics(prediction[:1], target[:1])))


def test_figures_of_codes_and_classes_add_up_over_batches():
    ids = torch.tensor([[[0, 1], [1, 0]], [[0, 1], [1, 2]]])
    counts = code_counts(ids[:1], 1, 8) + code_counts(ids[1:], 1, 8)
    assert counts.tolist() == [[3, 4, 1, 0, 0, 0, 0, 0]]
    entropy = -sum(p * math.log(p) for p in (3 / 8, 4 / 8, 1 / 8))
    assert codebook_metrics(counts) == pytest.approx({"code_usage": 3 / 8, "perplexity": math.exp(entropy)})
    two = code_counts(torch.tensor([[[[0]], [[1]]]]), 2, 2)
    assert two.tolist() == [[1, 0], [0, 1]] and codebook_metrics(two)["perplexity"] == pytest.approx(1)
    logits = F.one_hot(torch.tensor([[[0, 1, 1, 1]]]), 3).permute(0, 3, 1, 2).float()
    found = region_metrics(region_counts(logits, torch.tensor([[[0, 0, 1, 1]]]), 3))
    assert found == pytest.approx({"miou": (1 / 2 + 2 / 3) / 2})


@pytest.mark.parametrize("name", ["rgb", "depth", "semseg_coco", "sam_mask", "CLIP-B16", "DINOv2-B14-global"])
def test_every_kind_of_reconstruction_can_be_looked_at(name):
    domain = DOMAINS[name]
    torch.manual_seed(0)
    shape = (2, domain.labels or domain.channels, 4, 4)
    original = torch.randint(9, (2, 4, 4)) if domain.labels else torch.randn(shape)
    reconstruction = F.one_hot(original, 134).permute(0, 3, 1, 2).float() if domain.labels else original
    found = side_by_side(domain, original, 40 * reconstruction if name == "sam_mask" else reconstruction)
    if domain.kind == "vector":
        assert found is None
        return
    assert found.shape == (2, 3, 64, 128) and 0 <= found.min() < found.max() <= 1
    left, right = found.chunk(2, dim=3)
    assert name == "sam_mask" or torch.allclose(left, right, atol=1e-4)
