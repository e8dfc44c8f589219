"""The U-ViT: the published layers and size, and what its latents do."""

import pytest
import torch
from torch import nn

from fourm.utils.errors import UserError
from fourm.vq.uvit import SIZES, UViT, uvit_size
from fourm.vq.vit import ViTSize

C, L = 3, 8


@pytest.fixture(scope="module")
def model() -> UViT:
    """With the smallest of transformers, and weights that are not those of the start."""
    torch.manual_seed(0)
    model = UViT(C, L, ViTSize(32, 2, 2), dropout=0.2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, C, 48, 64, generator=g), torch.tensor([3, 900]), torch.randn(2, L, 3, 4, generator=g)


def test_the_published_size_has_the_published_keys():
    with torch.device("meta"):
        model = UViT(3, 32, uvit_size("uvit_b_p4_f16"))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 334
    table = shapes["mid_block.mid_pos_emb"]
    assert table == (1, 768, 32, 32)
    learned = sum(p.numel() for p in model.parameters())
    assert learned + 768 * 32 * 32 == pytest.approx(127.5e6, abs=5e4)
    assert shapes["conv_in.weight"] == (128, 3, 4, 4)
    assert shapes["mid_block.mid_block.11.adaLN_modulation.weight"] == (4 * 768, 512)
    assert shapes["mid_block.mid_block.11.adaLN_gate.weight"] == (2 * 768, 512)


def test_names_give_sizes():
    assert [uvit_size(name).depth for name in SIZES] == [12, 24, 32]
    assert uvit_size("uvit_p4_f16/B_3-Wi_192-H_6") == ViTSize(192, 3, 6)
    with pytest.raises(UserError, match=r"unknown U-ViT 'uvit_b_p4_f8' \(did you mean 'uvit_b_p4_f16'\?\)"):
        uvit_size("uvit_b_p4_f8")


def test_blocks_begin_as_the_identity(inputs):
    torch.manual_seed(0)
    model = UViT(C, L, ViTSize(32, 2, 2)).eval()
    y, time = torch.randn(2, 12, 32), torch.randn(2, 512)
    assert torch.equal(model.mid_block.mid_block[0](y, time), y)
    x, time = torch.randn(2, 128, 4, 4), torch.randn(2, 512)
    assert torch.equal(model.down_blocks[0].resnets[0](x, time), x)


def test_every_parameter_gets_a_gradient(model, inputs):
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    model(*inputs, mask).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.zero_grad()


@torch.no_grad()
def test_pictures_of_a_batch_do_not_touch_each_other(model, inputs):
    x, t, cond = inputs
    assert torch.allclose(model(*inputs)[1:], model(x[1:], t[1:], cond[1:]), atol=1e-5)


@torch.no_grad()
def test_masked_latents_become_the_mask_token(model, inputs):
    x, t, cond = inputs
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0, 1, 2] = True
    other = cond.clone()
    other[0, :, 1, 2] = 5
    before = model.mid_block.mask_token.clone()
    assert torch.equal(model(x, t, cond, mask), model(x, t, other, mask))
    assert not torch.allclose(model(x, t, cond), model(x, t, cond, mask))
    assert torch.equal(model.mid_block.mask_token, before)


@torch.no_grad()
def test_the_middle_follows_its_formulas(model):
    g = torch.Generator().manual_seed(2)
    middle = model.mid_block
    x, time, cond = (torch.randn(*s, generator=g) for s in ((2, 256, 3, 4), (2, 512), (2, L, 3, 4)))
    table = nn.functional.interpolate(middle.mid_pos_emb, (3, 4), mode="bicubic").flatten(2).mT
    y = middle.mid_proj_in(x.flatten(2).mT) + middle.mid_cond_proj(cond.flatten(2).mT) + table
    s = time * time.sigmoid()
    for block in middle.mid_block:
        shift1, scale1, shift2, scale2 = block.adaLN_modulation(s)[:, None].chunk(4, -1)
        gate1, gate2 = block.adaLN_gate(s)[:, None].chunk(2, -1)
        norm = nn.functional.layer_norm(y, (32,), block.norm1.weight, block.norm1.bias, 1e-5)
        y = y + gate1 * block.attn(norm * (1 + scale1) + shift1)
        norm = nn.functional.layer_norm(y, (32,), block.norm2.weight, block.norm2.bias, 1e-5)
        y = y + gate2 * block.mlp(norm * (1 + scale2) + shift2)
    expected = middle.mid_proj_out(y).mT.reshape(2, 256, 3, 4)
    assert torch.allclose(middle(x, time, cond, None), expected, atol=1e-5)


def test_sides_that_layers_do_not_divide_are_refused(model, inputs):
    with pytest.raises(UserError, match="multiples of 16 pixels, not 40x64"):
        model(torch.zeros(2, C, 40, 64), inputs[1], inputs[2])
