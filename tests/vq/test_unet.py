"""The patched UNet: the published layers, what its latents do, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import Timesteps

from fourm.utils.errors import UserError
from fourm.vq.unet import AttentionBlock, GroupNorm, PatchedUNet, embed_timesteps, unet_width

C, L = 3, 8


@pytest.fixture(scope="module")
def unet() -> PatchedUNet:
    """Of the smallest width that 32 groups allow, with weights that are not those of the start."""
    torch.manual_seed(0)
    model = PatchedUNet(C, L, width=32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, C, 64, 96, generator=g), torch.tensor([3, 900]), torch.randn(2, L, 4, 6, generator=g)


def test_it_predicts_zero_at_the_start(inputs):
    assert not PatchedUNet(C, L, width=32)(*inputs).any()


def test_every_parameter_gets_a_gradient(unet, inputs):
    unet(*inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in unet.parameters())
    unet.zero_grad()


@torch.no_grad()
def test_pictures_of_a_batch_do_not_touch_each_other(unet, inputs):
    x, t, cond = inputs
    assert torch.allclose(unet(*inputs)[1:], unet(x[1:], t[1:], cond[1:]), atol=1e-5)


@torch.no_grad()
def test_latents_belong_to_the_pixels_of_their_token(unet, inputs):
    x, t, cond = inputs
    on_patches = cond.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert torch.equal(unet(*inputs), unet(x, t, on_patches))


@torch.no_grad()
def test_masked_latents_do_not_count(unet, inputs):
    x, t, cond = inputs
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[0, 1, 2] = True
    other = cond.clone()
    other[0, :, 1, 2] = 5
    assert torch.equal(unet(x, t, cond, mask), unet(x, t, other, mask))
    assert not torch.equal(unet(x, t, cond), unet(x, t, cond, mask))
    assert torch.equal(cond, inputs[2])  # what the caller has is as it was


def test_sides_that_levels_do_not_halve_are_refused(unet, inputs):
    _, t, cond = inputs
    with pytest.raises(UserError, match="multiples of 32 pixels, not 64x80"):
        unet(torch.zeros(2, C, 64, 80), t, cond)


@torch.no_grad()
def test_half_precision_stays_near(unet, inputs):
    exact = unet(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = unet(*inputs)
    assert mixed.dtype == torch.bfloat16
    assert (mixed - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_time_steps_are_embedded_as_diffusers_does():
    steps = torch.tensor([0, 1, 500, 999])
    assert torch.allclose(embed_timesteps(steps, 256), Timesteps(256, True, 0)(steps), atol=1e-6)


@torch.no_grad()
def test_attention_is_that_of_one_head():
    torch.manual_seed(0)
    block = AttentionBlock(64)
    x = torch.randn(2, 64, 3, 5)
    q, k, v = block.qkv(block.norm(x).flatten(2)).chunk(3, dim=1)
    weights = torch.softmax(torch.einsum("bdn,bdm->bnm", q, k) / 8, dim=-1)
    expected = x + block.proj_out(torch.einsum("bnm,bdm->bdn", weights, v)).view_as(x)
    assert torch.allclose(block(x), expected, atol=1e-5)


def test_norms_are_computed_in_float32():
    norm = GroupNorm(32)
    x = torch.randn(1, 32, 8, 8).bfloat16()
    expected = F.group_norm(x.float(), 32, norm.weight, norm.bias, 1e-5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), expected)


def test_names_give_widths():
    assert unet_width("unet_patched") == 256
    assert unet_width("unet_patched/Wi_64") == 64
    for name in ("unet_cat", "unet_patched/Wi_48", "unet_patched/Wi_0", "unet_patched/64"):
        with pytest.raises(UserError, match=f"'{name}' is not a UNet: use unet_patched, or unet_patched/Wi_64"):
            unet_width(name)
