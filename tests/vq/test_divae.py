"""DiVAE: the published numbers, sampling against a plain loop, sizes, seeds and precision, files."""

import hashlib
import math
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourm.utils.errors import MissingDependency, UserError
from fourm.vq import load_tokenizer
from fourm.vq.vqvae import VQ, DiVAE
from tests.vq.golden import assert_probed, fill, image

TOY = {
    "enc_type": "vit/B_1-Wi_32-H_2",
    "dec_type": "unet_patched/Wi_32",
    "image_size": 32,
    "patch_size": 16,
    "codebook_size": 20,
    "latent_dim": 8,
}
PUBLISHED = {
    "enc_type": "vit_s_enc",
    "dec_type": "unet_patched",
    "image_size": 32,
    "codebook_size": 256,
    "latent_dim": 32,
    "post_mlp": True,
    "prediction_type": "sample",
    "beta_schedule": "linear",
    "scheduler": "ddim",
}
IDS = torch.tensor([[[3, 7, 1, 9], [0, 19, 4, 1]], [[5, 5, 5, 5], [11, 2, 8, 0]], [[1, 2, 3, 4], [5, 6, 7, 8]]])


def toy(**options) -> DiVAE:
    """With weights that are not those of the start, at which nothing is predicted."""
    torch.manual_seed(0)
    model = DiVAE(**TOY | options).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model() -> DiVAE:
    return toy()


@pytest.mark.slow
@torch.no_grad()
def test_numbers_of_the_published_code():
    model = fill(DiVAE(**PUBLISHED))
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in model.state_dict().items())
    assert len(lines) == 556
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "01bdfe5b26080749549159223b21106f235824f11d1fdb1f9a11dda2b693fa0d"

    x = image(60, 2, 3, 32, 32)
    noise = torch.from_numpy(np.random.default_rng(61).standard_normal((2, 3, 32, 32)).astype(np.float32))
    steps = torch.tensor([7, 611])
    tokens = model.tokenize(x)
    assert tokens.tolist() == [[[46, 150], [16, 246]], [[108, 120], [7, 252]]]
    noised = model.noise_scheduler.add_noise(x, noise, steps)
    assert_probed(
        noised,
        -0.0740087,
        0.745635,
        [
            1.47109,
            -0.561049,
            -0.526112,
            0.0964345,
            -1.02169,
            1.7126,
            -0.699656,
            -0.164139,
            -0.442184,
            1.72437,
            -0.965263,
            1.07556,
        ],
    )
    assert_probed(
        model(x, noised, steps)[0],
        -0.0194453,
        0.458097,
        [
            -0.527968,
            -0.12964,
            0.183019,
            0.369897,
            0.637185,
            0.0652224,
            -0.185017,
            -0.178832,
            0.0278039,
            -0.0487127,
            -0.577512,
            -1.50277,
        ],
    )
    assert_probed(
        model.decode_tokens(tokens, timesteps=4, generator=torch.Generator().manual_seed(3)),
        -0.011346,
        0.433583,
        [
            -0.108737,
            -0.458183,
            -0.657711,
            0.642008,
            0.338865,
            -0.150529,
            0.733064,
            0.162615,
            0.371546,
            0.439217,
            -0.753764,
            -1.0,
        ],
    )


def _alphas() -> Tensor:
    """ᾱ of the cosine schedule, rescaled to end at 0, after the formulas in the papers."""
    t = torch.arange(1001, dtype=torch.float64) / 1000
    f = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    root = (1 - betas).cumprod(0).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@torch.no_grad()
def test_it_decodes_in_50_ddim_steps(model):
    ids = IDS[:1, :, :2]
    latents, alphas = model.tokens_to_embedding(ids), _alphas().float()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    for t in range(999, -1, -20):
        alpha, after = alphas[t], alphas[t - 20] if t >= 20 else torch.ones(())
        v = model.decoder(x, torch.tensor([t]), latents)
        clean = (alpha.sqrt() * x - (1 - alpha).sqrt() * v).clamp(-1, 1)
        noise = alpha.sqrt() * v + (1 - alpha).sqrt() * x
        x = after.sqrt() * clean + (1 - after).sqrt() * noise
    assert torch.allclose(model.decode_tokens(ids, seed=9), x, atol=1e-3)


def test_the_size_of_images_follows_that_of_tokens(model):
    assert model.decode_tokens(IDS, timesteps=1).shape == (3, 3, 32, 64)
    assert model.decode_tokens(IDS[:, :, :2], timesteps=1).shape == (3, 3, 32, 32)
    assert model.decode_tokens(IDS, timesteps=1, image_size=64).shape == (3, 3, 64, 64)
    assert model.decode_tokens(IDS, timesteps=1, image_size=(64, 96)).shape == (3, 3, 64, 96)
    assert model.autoencode(torch.zeros(2, 3, 64, 32), timesteps=1).shape == (2, 3, 64, 32)


def test_the_noise_of_an_image_depends_on_its_own_seed_alone(model):
    together = model.decode_tokens(IDS, timesteps=3, seed=[4, 8, 6])
    alone = model.decode_tokens(IDS[1:2], timesteps=3, seed=8)
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    assert not torch.allclose(model.decode_tokens(IDS[1:2], timesteps=3, seed=4), alone, atol=1e-2)
    assert torch.equal(model.decode_tokens(IDS, timesteps=3, seed=[4, 8, 6]), together)


def test_one_generator_draws_for_the_batch(model):
    first, second = (
        model.decode_tokens(IDS, timesteps=3, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(model.decode_tokens(IDS, timesteps=3), first)


def test_bfloat16_on_request(model):
    exact = model.decode_tokens(IDS, timesteps=4, seed=1)
    mixed = model.decode_tokens(IDS, timesteps=4, seed=1, dtype=torch.bfloat16)
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_its_own_scheduler_and_that_of_the_caller():
    ddim, ddpm = toy(scheduler="DDIMScheduler"), toy(scheduler="ddpm")
    expected = ddpm.decode_tokens(IDS, timesteps=4, seed=1)
    assert not torch.allclose(ddim.decode_tokens(IDS, timesteps=4, seed=1), expected, atol=1e-2)
    other = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    assert torch.equal(ddim.decode_tokens(IDS, timesteps=4, seed=1, scheduler=other), expected)


def test_clipping_is_what_the_options_say():
    clipped, free = (toy(prediction_type="sample", thresholding=on) for on in (True, False))
    with torch.no_grad():
        for model in (clipped, free):
            model.decoder.out[-1].bias.fill_(3)
    assert clipped.decode_tokens(IDS, timesteps=4, seed=1).max() == 1
    assert free.decode_tokens(IDS, timesteps=4, seed=1).max() > 2
    clipped = toy(prediction_type="sample", thresholding=False, clip_sample=True)
    assert clipped.decode_tokens(IDS, timesteps=4, seed=1).abs().max() <= 1


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_of_training(frozen):
    model = toy(freeze_enc=frozen).train()
    x, noise, t = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.tensor([10, 700])
    prediction, code_loss = model(x, model.noise_scheduler.add_noise(x, noise, t), t)
    target = model.noise_scheduler.get_velocity(x, noise, t)
    ((prediction - target).square().mean() + code_loss.sum()).backward()
    assert prediction.shape == x.shape and code_loss.shape == (1,)
    assert all(p.grad is not None for p in model.decoder.parameters())
    assert (model.encoder.proj.weight.grad is None) == frozen


@torch.no_grad()
def test_tokens_are_hidden_in_training_alone():
    model = toy(cls_free_guidance_dropout=1.0)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([10, 700])
    latents = model.encode(x)[0]
    shown = model.decoder(x, t, latents)
    hidden = model.decoder(x, t, torch.zeros_like(latents))
    assert not torch.allclose(shown, hidden, atol=1e-3)
    assert torch.equal(model(x, x, t)[0], shown)
    assert torch.equal(model.train()(x, x, t)[0], hidden)
    all_shown = model(x, x, t, cond_mask=torch.zeros(2, 2, 2, dtype=torch.bool))[0]
    assert torch.allclose(all_shown, shown, atol=1e-5)
    some = toy(cls_free_guidance_dropout=1.0, masked_cfg=True, masked_cfg_low=1, masked_cfg_high=3).train()
    counts = {int(n) for _ in range(20) for n in some.hidden_tokens(latents).flatten(1).sum(1)}
    assert counts == {1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": 0}, "number of decoding steps must be from 1 to 1000, not 0"),
        ({"seed": [1, 2]}, "2 seeds were given for 3 images"),
        ({"image_size": 40}, "multiples of 32 pixels, not 40x40"),
        ({"scheduler_timesteps_mode": "trailin"}, "did you mean 'trailing'"),
    ],
)
def test_what_cannot_be_decoded(model, options, message):
    with pytest.raises(UserError, match=message):
        model.decode_tokens(IDS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dec_type": "unet_cat"}, "'unet_cat' is not a UNet"),
        ({"dec_type": "uvit_b_p4_f8"}, "unknown U-ViT 'uvit_b_p4_f8'"),
        ({"beta_schedule": "cosine"}, "beta_schedule 'cosine' is none of linear"),
        ({"conditioning": "xattn"}, "conditioning"),
        ({"masked_cfg_low": 3, "masked_cfg_high": 2}, "'masked_cfg_low' 3 is above 'masked_cfg_high' 2"),
    ],
)
def test_options_that_there_are_not(options, message):
    with pytest.raises(UserError, match=message):
        DiVAE(**TOY | options)


@pytest.mark.parametrize("decoder", ["unet_patched/Wi_32", "uvit_p4_f16/B_1-Wi_32-H_2"])
def test_files(decoder, tmp_path):
    model = toy(dec_type=decoder, n_channels=1, image_size=64)
    model.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is DiVAE and loaded.config == model.config
    x = torch.randn(1, 1, 64, 64)
    ids = model.tokenize(x)
    assert torch.equal(loaded.tokenize(x), ids)
    assert torch.equal(loaded.decode_tokens(ids, timesteps=2, seed=1), model.decode_tokens(ids, timesteps=2, seed=1))
    assert torch.equal(VQ.from_pretrained(tmp_path).tokenize(x), ids)


def test_the_decoder_is_that_of_the_weights(tmp_path):
    toy().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("unet_patched/Wi_32", "unet_patched"))
    assert load_tokenizer(tmp_path).dec_type == "unet_patched/Wi_32"


@pytest.mark.parametrize("dropped", ["conv", "Conv2d_0"])
def test_a_convolution_with_two_names_may_have_either_in_a_file(dropped, tmp_path):
    model = toy(dec_type="uvit_p4_f16/B_1-Wi_32-H_2")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: w for name, w in weights.items() if f"downsample_mid.{dropped}." not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, tmp_path / "model.safetensors")
    loaded = DiVAE.from_pretrained(tmp_path)
    assert torch.equal(loaded.decode_tokens(IDS, timesteps=2, seed=1), model.decode_tokens(IDS, timesteps=2, seed=1))


def test_without_diffusers_it_tokenizes_but_does_not_decode(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it fails
    model = toy()
    ids = model.tokenize(torch.zeros(1, 3, 32, 32))
    with pytest.raises(MissingDependency, match=r"pip install 'fourm\[diffusion\]'"):
        model.decode_tokens(ids)
