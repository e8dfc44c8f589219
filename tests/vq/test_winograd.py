"""Fast convolutions compute what convolutions compute."""

import pytest
import torch
import torch.nn.functional as F

from fourm.vq import winograd
from fourm.vq.divae import DiVAE
from fourm.vq.winograd import Conv3x3, fast_convolutions


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 8, 24, 20), (1, 8, 21, 23), (3, 8, 56, 56)])
def test_the_result_is_that_of_a_convolution_up_to_rounding(shape):
    torch.manual_seed(0)
    conv, x = Conv3x3(8, 16), torch.randn(shape)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    with fast_convolutions(conv):
        fast = conv(x)
        assert list(winograd._transformed.get()) == [conv]
    assert fast.dtype == torch.float32 and (fast - exact).abs().max() < 2e-5 * exact.abs().max()
    assert not torch.equal(fast, conv(x)), "outside, it is a plain convolution"


@torch.no_grad()
def test_images_of_a_batch_are_convolved_in_parts_that_fit_a_cache(monkeypatch):
    torch.manual_seed(0)
    conv, x = Conv3x3(8, 8), torch.randn(5, 8, 16, 20)
    with fast_convolutions(conv):
        whole = conv(x)
        for images in (1, 2):
            monkeypatch.setattr(winograd, "_MAX_NUMBERS", images * 36 * 4 * 5 * 8)
            torch.testing.assert_close(conv(x), whole)


def test_training_and_other_precisions_and_small_maps_and_strides_use_a_plain_convolution():
    conv, x = Conv3x3(4, 4), torch.randn(1, 4, 24, 24)
    plain = conv(x)
    with fast_convolutions(conv):
        assert torch.equal(conv(x), plain) and plain.requires_grad
        with torch.no_grad():
            assert torch.equal(conv(x[..., :8]), F.conv2d(x[..., :8], conv.weight, conv.bias, padding=1))
        assert not winograd._transformed.get()
    with torch.no_grad(), fast_convolutions(strided := Conv3x3(4, 4, stride=2)):
        assert strided(x).shape == (1, 4, 12, 12)
    with torch.autocast("cpu", torch.bfloat16), fast_convolutions(conv):
        assert winograd._transformed.get() is None


def test_decoding_by_diffusion_uses_them_and_forgets_the_transformed_weights():
    torch.manual_seed(0)
    options = {"enc_type": "vit/B_1-Wi_32-H_2", "codebook_size": 16, "image_size": 96, "dec_type": "unet_patched/Wi_32"}
    model = DiVAE(**options, scheduler="ddim").eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    ids = torch.randint(16, (1, 6, 6))
    used = []
    handle = model.decoder.out[-1].register_forward_hook(lambda *_: used.append(len(winograd._transformed.get())))
    fast = model.decode_tokens(ids, timesteps=3, seed=0)
    handle.remove()
    assert used[-1] > 10 and winograd._transformed.get() is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_MIN_SIDE", 1000)
        plain = model.decode_tokens(ids, timesteps=3, seed=0)
    assert not torch.equal(fast, plain) and torch.allclose(fast, plain, atol=1e-3)
