"""A tokenizer that decodes with Stable Diffusion and a ControlNet, which reads the tokens.

ControlNets are described in https://arxiv.org/abs/2302.05543. The models are those of diffusers and transformers. Only
safetensors files of Stable Diffusion are read.

Shapes: B images, H x W pixels, h x w tokens, L latent width, Z x Z positions of Stable Diffusion's latents, with
Z = H/8, T = 77 tokens of a text, E width of their embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourm.utils.dependencies import optional_import
from fourm.utils.errors import UserError
from fourm.utils.options import option
from fourm.vq.diffusion import DECODING_STEPS, Generators, diffusers, generators, sample, set_steps
from fourm.vq.divae import DiffusionVQ, DiffusionVQOptions, precision
from fourm.vq.quantizers import WHOLE, Part
from fourm.vq.vqvae import outputs

_CHANNELS = (32, 96, 256)
"""Channels, after L, of the convolutions with which the ControlNet reads the latents of the tokens."""
_TEXT = ("decoder.text_encoder.text_model.", "decoder.text_encoder.")
"""Prefixes of the text encoder's weights: those of transformers up to version 4, and from version 5 on."""


@dataclass(frozen=True, kw_only=True)
class VQControlNetOptions(DiffusionVQOptions):
    """Encoder, quantizer and Stable Diffusion"""

    sd_path: str = option(
        "Stable Diffusion 1.x: a folder, or an id on the Hugging Face hub", "runwayml/stable-diffusion-v1-5"
    )
    image_size_sd: int | None = option("side length of the decoded images (default: image_size)", None, at_least=8)
    pretrained_cn: bool = option("start the ControlNet from the weights of Stable Diffusion", False)
    enable_xformer: bool = option("ignored: attention is torch's", False)
    adapter: None = option("not supported", None)


class StableDiffusion:
    """Reads the parts of Stable Diffusion from a folder or from the Hugging Face hub.

    Args:
        path: The folder or the id on the hub.

    Raises:
        MissingDependency: diffusers or transformers is not installed.
    """

    def __init__(self, path: str):
        diffusers()
        with optional_import("transformers", "Stable Diffusion", "'fourm[diffusion]'"):
            import transformers
        self.path = path
        self._text_classes = (transformers.CLIPTextModel, transformers.CLIPTextConfig, transformers.CLIPTokenizer)

    def models(self, weights: bool) -> dict[str, nn.Module]:
        """Build the ``unet``, ``vae`` and ``text_encoder``.

        Args:
            weights: Load the weights; otherwise only the configurations are read.

        Raises:
            UserError: The files do not exist.
        """
        models = {}
        for name, cls in {"unet": diffusers().UNet2DConditionModel, "vae": diffusers().AutoencoderKL}.items():
            if weights:
                models[name] = self._read(cls.from_pretrained, name, use_safetensors=True, low_cpu_mem_usage=False)
            else:
                models[name] = cls.from_config(self._read(cls.load_config, name))
        model, config, _ = self._text_classes
        if weights:
            models["text_encoder"] = self._read(model.from_pretrained, "text_encoder", use_safetensors=True)
        else:
            models["text_encoder"] = model(self._read(config.from_pretrained, "text_encoder"))
        for module in models["text_encoder"].modules():
            if hasattr(module, "position_ids"):
                del module.position_ids  # this buffer is in no file; encode_text passes the positions instead
        return models

    def tokenizer(self) -> Any:
        """Load the tokenizer of texts; raises like :meth:`models`."""
        return self._read(self._text_classes[2].from_pretrained, "tokenizer")

    def scheduler(self, **options: Any) -> Any:
        """Load the scheduler, with ``options`` that replace those of the file; raises like :meth:`models`."""
        config = self._read(diffusers().PNDMScheduler.load_config, "scheduler")
        return diffusers().PNDMScheduler.from_config(config, **options)

    def _read(self, read: Any, part: str, **options: Any) -> Any:
        try:
            return read(self.path, subfolder=part, **options)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"sd_path '{self.path}' holds no {part} of Stable Diffusion: {reason}") from error


class ControlledUNet(nn.Module):
    """The frozen UNet and text encoder of Stable Diffusion, with a ControlNet."""

    def __init__(self, unet: Any, text_encoder: Any, tokenizer: Any, cond_channels: int):
        super().__init__()
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer
        self.controlnet = _controlnet(unet, cond_channels, pretrained=False)
        config = text_encoder.config
        self.empty_str_encoding = nn.Parameter(
            torch.empty(1, config.max_position_embeddings, config.hidden_size), requires_grad=False
        )

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        cond: Tensor,
        cond_mask: Tensor | None = None,
        text: Tensor | None = None,
        cond_scale: float = 1.0,
        unconditional: bool = False,
    ) -> Tensor:
        """Predict the noise in latents of Stable Diffusion.

        Args:
            x: (B, 4, Z, Z).
            timesteps: Integers (B,).
            cond: Latents of the tokens (B, L, h, w).
            cond_mask: (B, h, w) bool; latents at True count as unknown.
            text: (B, T, E) from :meth:`encode_text`; None for the empty text.
            cond_scale: The weight of the ControlNet.
            unconditional: Ignore the text, and all of the ControlNet except its output for the middle of the UNet, as
                in the published guidance.

        Returns:
            (B, 4, Z, Z).
        """
        if text is None or unconditional:
            text = self.empty_str_encoding.expand(len(x), -1, -1)
        if cond_mask is not None:
            cond = cond.masked_fill(cond_mask[:, None], 0)
        dtype = self.empty_str_encoding.dtype
        x, cond, text = x.to(dtype), F.interpolate(cond.to(dtype), x.shape[2:], mode="nearest"), text.to(dtype)
        down, middle = self.controlnet(x, timesteps, text, cond, conditioning_scale=cond_scale, return_dict=False)
        if unconditional:
            down = [torch.zeros_like(residual) for residual in down]
        return self.unet(
            x,
            timesteps,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], text_encoder: Any = None) -> Tensor:
        """Encode texts, which are cut off after T tokens, to (B, T, E).

        Args:
            texts: B texts.
            text_encoder: The model to encode them with; None for the own one.
        """
        text_encoder = text_encoder or self.text_encoder
        length, device = self.empty_str_encoding.shape[1], next(text_encoder.parameters()).device
        ids = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        return text_encoder(ids, position_ids=torch.arange(length, device=device)[None])[0]


class VQControlNet(DiffusionVQ):
    """A tokenizer that decodes with Stable Diffusion.

    It noises and decodes the latents of Stable Diffusion's VAE (B, 4, Z, Z), whose size is always that of images of
    ``image_size_sd`` pixels. :meth:`vae_decode` converts them to images.

    Args:
        arguments: The fields of :class:`VQControlNetOptions`.

    Raises:
        UserError: ``sd_path`` does not contain Stable Diffusion.
        MissingDependency: diffusers or transformers is not installed.
    """

    options_class = VQControlNetOptions
    decoder: ControlledUNet
    vae: Any
    image_size_sd: int
    latent_dim: int
    pretrained_cn: bool

    def build_decoder(self, options: VQControlNetOptions) -> None:
        self.image_size_sd = options.image_size_sd or options.image_size
        self.stable_diffusion = StableDiffusion(options.sd_path)
        parts = self.stable_diffusion.models(weights=False)
        tokenizer = self.stable_diffusion.tokenizer()
        self.decoder = ControlledUNet(parts["unet"], parts["text_encoder"], tokenizer, options.latent_dim)
        self.vae = parts["vae"]
        for part in self._frozen_parts():
            part.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all weights; those of Stable Diffusion come from its files."""
        super().init_weights()
        decoder = self.decoder
        if decoder.empty_str_encoding.is_meta:
            return
        parts = self.stable_diffusion.models(weights=True)
        for name, part in {"unet": decoder.unet, "text_encoder": decoder.text_encoder, "vae": self.vae}.items():
            part.load_state_dict(parts[name].state_dict())
        decoder.controlnet.load_state_dict(_controlnet(parts["unet"], self.latent_dim, self.pretrained_cn).state_dict())
        # By the model that was read: the weights of the own text encoder may be shards.
        decoder.empty_str_encoding.copy_(decoder.encode_text([""], parts["text_encoder"]))

    def _frozen_parts(self) -> list[nn.Module]:
        return [self.decoder.unet, self.decoder.text_encoder, self.vae]

    def train(self, mode: bool = True) -> VQControlNet:
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    @cached_property
    def noise_scheduler(self) -> Any:
        """Stable Diffusion's scheduler, which noises latents in training."""
        return self.stable_diffusion.scheduler()

    def forward(  # type: ignore[override]
        self,
        input_clean: Tensor,
        input_noised: Tensor,
        timesteps: Tensor,
        cond_mask: Tensor | None = None,
        orig_res: Any = None,
        prompt: str | Sequence[str] | None = None,
        part: Part = WHOLE,
        return_statistics: bool = False,
    ) -> tuple[Any, ...]:
        """Predict the noise in latents, in a training step.

        Args:
            input_clean: The images to tokenize, (B, C, H, W).
            input_noised: Noised latents from :meth:`vae_encode`, (B, 4, Z, Z).
            timesteps: The noise levels, integers (B,).
            cond_mask: The tokens to hide from the decoder, (B, h, w) bool; None draws them as the options say.
            orig_res: Ignored.
            prompt: A text for all images, or one for each; None for the empty text.
            part: Which micro-batch of a training step this is.
            return_statistics: Also return the statistics of the quantizer.

        Returns:
            The predicted noise (B, 4, Z, Z), the loss of the quantizer (1,) and, on request, its statistics.
        """
        quantized = self.quantized(input_clean, part)
        cond_mask = self.hidden_tokens(quantized.latents) if cond_mask is None else cond_mask
        text = self._text(prompt, len(input_noised))
        prediction = self.decoder(input_noised, timesteps, quantized.latents, cond_mask, text)
        return outputs(prediction, quantized, return_statistics)

    @torch.no_grad()
    def decode_quant(  # type: ignore[override]
        self,
        quant: Tensor,
        timesteps: int | None = None,
        generator: Generators = None,
        image_size: int | None = None,
        verbose: bool = False,
        vae_decode: bool = False,
        scheduler_timesteps_mode: str = "leading",
        prompt: str | Sequence[str] | None = None,
        orig_res: Any = None,
        guidance_scale: float = 0.0,
        cond_scale: float = 1.0,
        *,
        seed: int | Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Sample latents of Stable Diffusion from latents of tokens.

        Args:
            quant: (B, L, h, w).
            timesteps: The number of steps, 50 by default; the first step runs the decoder twice.
            image_size: Must be None or ``image_size_sd``, because all images have this size.
            vae_decode: Decode the latents to images.
            prompt: A text for all images, or one for each; None for the empty text.
            guidance_scale: The scale of classifier-free guidance; values up to 1 switch it off.
            cond_scale: The weight of the ControlNet.
            generator, verbose, scheduler_timesteps_mode, orig_res, seed, dtype: See :meth:`DiVAE.decode_quant`.

        Returns:
            (B, 4, Z, Z), or (B, 3, H, W) in [-1, 1] with ``vae_decode``.

        Raises:
            UserError: The number of steps, seeds or prompts, or the size is invalid.
        """
        if image_size not in (None, self.image_size_sd):
            raise UserError(f"images are always of {self.image_size_sd} pixels (image_size_sd), not {image_size}")
        scheduler = self.stable_diffusion.scheduler(timestep_spacing=scheduler_timesteps_mode)
        set_steps(scheduler, DECODING_STEPS if timesteps is None else timesteps)
        text = self._text(prompt, len(quant))

        def predict(x: Tensor, t: Tensor) -> Tensor:
            conditional = self.decoder(x, t, quant, text=text, cond_scale=cond_scale)
            if guidance_scale <= 1:
                return conditional
            unconditional = self.decoder(x, t, quant, cond_scale=cond_scale, unconditional=True)
            return unconditional + guidance_scale * (conditional - unconditional)

        side = self.image_size_sd // 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (len(quant), self.decoder.unet.config.in_channels, side, side)
        with precision(quant.device, dtype):
            noise = generators(seed, generator, len(quant))
            latents = sample(predict, shape, scheduler, noise, quant.device, verbose)
        return self.vae_decode(latents) if vae_decode else latents

    def decode_pictures(self, ids: Tensor, **options: Any) -> Tensor:
        """See :meth:`DiffusionVQ.decode_pictures`; latents are decoded to images."""
        return super().decode_pictures(ids, **{"vae_decode": True, **options})

    @torch.no_grad()
    def vae_encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample latents (B, 4, H/8, W/8) of images (B, 3, H, W) in [-1, 1]."""
        return self.vae.encode(x).latent_dist.sample(generator) * self.vae.config.scaling_factor

    @torch.no_grad()
    def vae_decode(self, z: Tensor, clip: bool = True) -> Tensor:
        """Decode latents (B, 4, Z, Z) to images (B, 3, 8 Z, 8 Z), which are in [-1, 1] if ``clip``."""
        x = self.vae.decode(z / self.vae.config.scaling_factor).sample
        return x.clamp(-1, 1) if clip else x

    def _text(self, prompt: str | Sequence[str] | None, batch: int) -> Tensor | None:
        if prompt is None:
            return None
        texts = [prompt] * batch if isinstance(prompt, str) else list(prompt)
        if len(texts) != batch:
            raise UserError(f"{len(texts)} prompts were given for {batch} images")
        return self.decoder.encode_text(texts)

    @classmethod
    def names_in_file(cls, name: str) -> tuple[str, ...]:
        old, new = _TEXT
        if name.startswith(old):
            return name, new + name.removeprefix(old)
        return (name, old + name.removeprefix(new)) if name.startswith(new) else (name,)


def _controlnet(unet: Any, cond_channels: int, pretrained: bool) -> Any:
    """Build a ControlNet that fits ``unet`` and reads latents of tokens instead of pictures."""
    model = diffusers().ControlNetModel.from_unet(
        unet,
        conditioning_channels=cond_channels,
        conditioning_embedding_out_channels=(cond_channels, *_CHANNELS),
        load_weights_from_unet=pretrained,
    )
    for convolution in model.controlnet_cond_embedding.blocks:
        convolution.stride = (1, 1)  # unlike pictures, the latents already have the resolution of the UNet
    return model
