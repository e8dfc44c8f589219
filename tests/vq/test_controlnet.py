"""VQControlNet on a tiny, random Stable Diffusion: sampling, guidance, what is trained, and files."""

import sys

import diffusers
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from fourm.generation.decode_dict import decode_dict
from fourm.train.fsdp import FSDP
from fourm.train.parallel import DDP
from fourm.train.tasks.diffusion_tokenizer import VQControlNetTraining
from fourm.utils.errors import MissingDependency, UserError
from fourm.vq import load_tokenizer
from fourm.vq.controlnet import StableDiffusion
from fourm.vq.vqvae import VQControlNet
from tests.train.tokenizer_data import write_config, write_pictures
from tests.train.toy_run import kill, log_lines, losses, run_in_process, run_ranks, start_ranks, wait_for_step
from tests.vq.stable_diffusion import write_stable_diffusion

IDS = torch.tensor([[[3, 7], [0, 9]], [[5, 5], [1, 2]]])


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> str:
    return write_stable_diffusion(tmp_path_factory.mktemp("stable-diffusion"))


def toy(stable_diffusion: str, **options) -> VQControlNet:
    """As it begins."""
    torch.manual_seed(0)
    defaults = {
        "enc_type": "vit/B_1-Wi_32-H_2",
        "image_size": 32,
        "image_size_sd": 32,
        "codebook_size": 10,
        "latent_dim": 8,
        "sd_path": stable_diffusion,
        "pretrained_cn": True,
        "freeze_enc": True,
    }
    return VQControlNet(**defaults | options).eval()


@pytest.fixture(scope="module")
def model(stable_diffusion) -> VQControlNet:
    """With a ControlNet that has an effect."""
    model = toy(stable_diffusion)
    with torch.no_grad():
        for parameter in model.decoder.controlnet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_the_controlnet_changes_nothing_at_the_start(stable_diffusion):
    model = toy(stable_diffusion)
    x, t, latents = torch.randn(2, 4, 4, 4), torch.tensor([5, 900]), model.tokens_to_embedding(IDS)
    with torch.no_grad():
        expected = model.decoder.unet(x, t, model.decoder.empty_str_encoding.expand(2, -1, -1)).sample
        assert torch.allclose(model.decoder(x, t, latents), expected, atol=1e-6)


def test_it_begins_with_the_weights_of_stable_diffusion(stable_diffusion):
    unet = diffusers.UNet2DConditionModel.from_pretrained(stable_diffusion, subfolder="unet").state_dict()
    for pretrained in (True, False):
        decoder = toy(stable_diffusion, pretrained_cn=pretrained).decoder
        assert all(torch.equal(tensor, unet[name]) for name, tensor in decoder.unet.state_dict().items())
        assert torch.equal(decoder.controlnet.conv_in.weight, unet["conv_in.weight"]) == pretrained


def test_convolutions_read_the_tokens_at_the_size_of_the_latents(model):
    shapes = {
        name: list(parameter.shape[:2])
        for name, parameter in model.decoder.controlnet.controlnet_cond_embedding.named_parameters()
        if name.endswith("weight")
    }
    channels = [[8, 8], [32, 8], [32, 32], [96, 32], [96, 96], [256, 96]]
    blocks = {f"blocks.{i}.weight": shape for i, shape in enumerate(channels)}
    assert shapes == {"conv_in.weight": [8, 8], **blocks, "conv_out.weight": [32, 256]}
    assert model.decoder.controlnet.controlnet_cond_embedding(torch.zeros(1, 8, 4, 4)).shape == (1, 32, 4, 4)


@torch.no_grad()
def _predict(model, x, t, latents, text, scale, unconditional=False):
    """The decoder, written out."""
    decoder = model.decoder
    cond = F.interpolate(latents, (4, 4), mode="nearest")
    down, middle = decoder.controlnet(x, t, text, cond, return_dict=False)
    factor = 0 if unconditional else scale
    down = [residual * factor for residual in down]
    return decoder.unet(
        x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle * scale
    ).sample


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_decoding_follows_its_formulas(model, stable_diffusion, guidance):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(stable_diffusion, subfolder="tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(stable_diffusion, subfolder="text_encoder")
    text, empty = (
        encoder(tokenizer([t] * 2, padding="max_length", max_length=77, return_tensors="pt").input_ids)[0].detach()
        for t in ("a cat", "")
    )
    scheduler = diffusers.PNDMScheduler.from_pretrained(stable_diffusion, subfolder="scheduler")
    scheduler.set_timesteps(4)
    latents = model.tokens_to_embedding(IDS)
    x = torch.cat([torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    for t in scheduler.timesteps:
        found = _predict(model, x, t, latents, text, 0.8)
        if guidance:
            without = _predict(model, x, t, latents, empty, 0.8, unconditional=True)
            found = without + guidance * (found - without)
        x = scheduler.step(found, t, x).prev_sample
    got = model.decode_tokens(IDS, timesteps=4, seed=3, prompt="a cat", guidance_scale=guidance, cond_scale=0.8)
    assert torch.allclose(got, x, atol=1e-4)


def test_generation_decodes_colours_by_it(model):
    batch = {"tok_rgb@32": {"tensor": IDS.flatten(1)}}
    options = {"decoding_steps": 2, "activate_controlnet": True}
    decoded = decode_dict(batch, torch.nn.ModuleDict({"controlnet": model}), None, **options)["tok_rgb@32"]
    assert decoded.shape == (2, 32, 32, 3) and 0 <= decoded.min() < decoded.max() <= 1
    weaker = decode_dict(batch, {"controlnet": model}, None, controlnet_cond_scale=0.1, **options)["tok_rgb@32"]
    plain = decode_dict(batch, {"controlnet": model}, None, controlnet_guidance_scale=1.0, **options)["tok_rgb@32"]
    assert abs(decoded - weaker).max() > 1e-4 and abs(decoded - plain).max() > 1e-4


def test_pictures_are_decoded_with_the_options_that_a_user_sets(model, monkeypatch):
    monkeypatch.setattr(model, "picture_options", {"timesteps": 2, "seed": 1})
    expected = model.decode_tokens(IDS, timesteps=2, seed=1, vae_decode=True)
    assert model.decode_pictures(IDS, timesteps=3).equal(expected)


def test_a_prompt_and_a_seed_for_each_image(model):
    together = model.decode_tokens(IDS, timesteps=2, seed=[5, 2], prompt=["a cat", "dogs"])
    alone = model.decode_tokens(IDS[1:], timesteps=2, seed=2, prompt="dogs")
    assert torch.allclose(together[1:], alone, atol=1e-4)
    assert not torch.allclose(model.decode_tokens(IDS[1:], timesteps=2, seed=2), alone, atol=1e-3)
    with pytest.raises(UserError, match="1 prompts were given for 2 images"):
        model.decode_tokens(IDS, timesteps=2, prompt=["a cat"])


def test_latents_and_images(model):
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    first, second = (model.vae_encode(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (1, 4, 4, 4) and torch.equal(first, second)
    scaling = model.vae.config.scaling_factor
    with torch.no_grad():
        assert torch.allclose(model.vae_decode(first, clip=False), model.vae.decode(first / scaling).sample)
    images = model.decode_tokens(IDS, timesteps=2, seed=1, vae_decode=True)
    assert images.shape == (2, 3, 32, 32) and images.abs().max() <= 1
    assert torch.equal(images, model.vae_decode(model.decode_tokens(IDS, timesteps=2, seed=1)))


def test_bfloat16_on_request(model):
    exact = model.decode_tokens(IDS, timesteps=2, seed=1)
    mixed = model.decode_tokens(IDS, timesteps=2, seed=1, dtype=torch.bfloat16)
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_only_the_controlnet_is_trained(stable_diffusion):
    model = toy(stable_diffusion).train()
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([10, 700])
    latents, noise = model.vae_encode(x), torch.randn(2, 4, 4, 4)
    prediction, code_loss = model(x, model.noise_scheduler.add_noise(latents, noise, t), t, prompt="a cat")
    assert prediction.shape == (2, 4, 4, 4) and code_loss.shape == (1,)
    (prediction - noise).square().mean().backward()
    trained = {name.rpartition(".controlnet.")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder"}
    assert model.decoder.controlnet.controlnet_mid_block.weight.grad.any()
    assert model.decoder.controlnet.training
    assert not any(part.training for part in (model.decoder.unet, model.decoder.text_encoder, model.vae, model.encoder))


def test_files_whatever_version_of_transformers_wrote_them(model, tmp_path):
    model.save_pretrained(tmp_path)
    expected = model.decode_tokens(IDS, timesteps=2, seed=1, prompt="a cat")
    weights = load_file(tmp_path / "model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"encoder", "quant_proj", "quantize", "decoder", "vae"}
    prefix, other = "decoder.text_encoder.", "decoder.text_encoder.text_model."
    if any(name.startswith(other) for name in weights):
        prefix, other = other, prefix
    renamed = {name.replace(prefix, other): tensor for name, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    for content in (weights, renamed):
        save_file(content, tmp_path / "model.safetensors")
        loaded = load_tokenizer(tmp_path)
        assert type(loaded) is VQControlNet
        assert torch.equal(loaded.decode_tokens(IDS, timesteps=2, seed=1, prompt="a cat"), expected)


def test_built_on_the_meta_device_it_begins_alike(stable_diffusion):
    with torch.device("meta"):
        model = toy(stable_diffusion)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    expected = toy(stable_diffusion)
    for name, tensor in expected.decoder.unet.state_dict().items():
        assert torch.equal(model.decoder.unet.state_dict()[name], tensor), name
    latents = model.tokens_to_embedding(IDS)
    got, want = (
        m.decode_quant(latents, timesteps=2, seed=1, prompt="a cat", vae_decode=True) for m in (model, expected)
    )
    assert torch.equal(got, want)


def test_what_it_refuses(model, stable_diffusion, tmp_path):
    with pytest.raises(UserError, match=r"always of 32 pixels \(image_size_sd\), not 64"):
        model.decode_tokens(IDS, image_size=64)
    with pytest.raises(UserError, match=r"holds no unet of Stable Diffusion"):
        toy(str(tmp_path))
    with pytest.raises(UserError, match="adapter"):
        toy(stable_diffusion, adapter="some/model")


def test_what_to_install_if_transformers_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    with pytest.raises(MissingDependency, match=r"transformers: pip install 'fourm\[diffusion\]'"):
        StableDiffusion("anywhere")


def write_run(folder, stable_diffusion, **keys):
    pictures = folder / "pictures" if (folder / "pictures").exists() else write_pictures(folder / "pictures", 8, 2)
    keys = {
        "sd_path": stable_diffusion,
        "input_size_max": 32,
        "input_size_sd": 32,
        "max_input_size": True,
        "pretrained_cn": True,
        "freeze_enc": True,
        "epoch_size": 16,
        "epochs": 1,
        "num_eval_timesteps": 2,
        "model_ema": False,
        "blr": 0.05,
    } | keys
    config = write_config(folder, pictures, **keys)
    content = yaml.safe_load(config.read_text())
    del content["decoder_type"]
    config.write_text(yaml.safe_dump(content))
    return config


@pytest.fixture(scope="module")
def alone(stable_diffusion, tmp_path_factory):
    """A run of one process with accumulation, of which two processes do half of each step."""
    config = write_run(tmp_path_factory.mktemp("alone"), stable_diffusion, batch_size=2, accum_iter=2, num_streams=2)
    run_in_process(config, task=VQControlNetTraining)
    return config.parent / "out"


def test_it_is_trained_by_the_loop_and_its_folder_decodes(alone, stable_diffusion):
    assert len(losses(alone)) == 4
    results = log_lines(alone)[-1]["eval"]["rgb"]
    assert results.keys() == {"16px", "32px"} and results["32px"]["samples"] == 2
    weights, start = load_file(alone / "model.safetensors"), toy(stable_diffusion).state_dict()
    frozen = [name for name in start if "unet" in name or name.startswith("vae.")]
    assert all(torch.equal(weights[name], start[name]) for name in frozen)
    trained = "decoder.controlnet.controlnet_mid_block.weight"
    assert not torch.equal(weights[trained], start[trained])
    decoded = load_tokenizer(alone).decode_tokens(IDS, timesteps=2, seed=0, vae_decode=True)
    assert decoded.shape == (2, 3, 32, 32)


@pytest.mark.dist
@pytest.mark.parametrize("strategy", [DDP, FSDP])
def test_two_processes_train_it_as_one_and_resume_after_kill(alone, stable_diffusion, tmp_path, strategy):
    config = write_run(tmp_path, stable_diffusion, batch_size=2, save_every_minutes=1e-9, keep_last=1)
    ranks = start_ranks(config, strategy=strategy, task=VQControlNetTraining)
    wait_for_step(config, 2, ranks)
    kill(ranks)
    run_ranks(config, "--save_every_minutes", 0, strategy=strategy, task=VQControlNetTraining)
    assert "resumed from" in (tmp_path / "out" / "log.txt").read_text()
    assert losses(tmp_path / "out") == pytest.approx(losses(alone), rel=1e-3)
    weights, expected = (load_file(out / "model.safetensors") for out in (tmp_path / "out", alone))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-4)
    one, two = (log_lines(out)[-1]["eval"]["rgb"]["32px"]["per_modality"] for out in (alone, tmp_path / "out"))
    assert two == pytest.approx(one, rel=2e-2)
