"""A tokenizer that decodes by Stable Diffusion: a ControlNet (https://arxiv.org/abs/2302.05543) steers it by the tokens.

Stable Diffusion and ControlNet are those of diffusers and transformers; of a Stable Diffusion only safetensors are read.

Shapes: B images, H x W pixels, h x w tokens, L latent width, Z x Z positions of Stable Diffusion's latents, H/8 of its images,
T = 77 words of a text, E numbers that stand for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourm.utils.errors import MissingDependency, UserError
from fourm.utils.options import option
from fourm.vq.diffusion import DECODING_STEPS, Generators, diffusers, generators, sample, set_steps
from fourm.vq.divae import DiffusionOptions, DiffusionVQ, precision
from fourm.vq.quantizers import WHOLE, Part
from fourm.vq.vqvae import outputs

_CHANNELS = (32, 96, 256)
"""Of the convolutions through which the ControlNet reads the tokens, after L."""
_TEXT = ("decoder.text_encoder.text_model.", "decoder.text_encoder.")
"""Beginnings of names of the text encoder's weights: in transformers until 4, and from 5 on."""


@dataclass(frozen=True, kw_only=True)
class VQControlNetOptions(DiffusionOptions):
    """Encoder, quantizer and Stable Diffusion"""

    sd_path: str = option(
        "Stable Diffusion 1.x: a folder, or an id on the Hugging Face hub", "runwayml/stable-diffusion-v1-5"
    )
    image_size_sd: int | None = option("side of the decoded images, image_size by default", None, at_least=8)
    pretrained_cn: bool = option("the ControlNet begins with the weights of Stable Diffusion", False)
    enable_xformer: bool = option("ignored: attention is torch's", False)
    adapter: None = option("not supported", None)


class StableDiffusion:
    """What a folder or repository of Stable Diffusion holds, part by part.

    Raises:
        MissingDependency: diffusers or transformers is not installed.
    """

    def __init__(self, path: str):
        diffusers()
        try:
            import transformers
        except ImportError as error:
            raise MissingDependency("transformers", "Stable Diffusion", "'fourm[diffusion]'") from error
        self.path = path
        self._text_classes = (transformers.CLIPTextModel, transformers.CLIPTextConfig, transformers.CLIPTokenizer)

    def models(self, weights: bool) -> dict[str, nn.Module]:
        """The ``unet``, ``vae`` and ``text_encoder``.

        Args:
            weights: With the weights in the files; otherwise nothing but the configurations is read.

        Raises:
            UserError: there are no such files.
        """
        found = {}
        for name, cls in {"unet": diffusers().UNet2DConditionModel, "vae": diffusers().AutoencoderKL}.items():
            if weights:
                found[name] = self._read(cls.from_pretrained, name, use_safetensors=True, low_cpu_mem_usage=False)
            else:
                found[name] = cls.from_config(self._read(cls.load_config, name))
        model, config, _ = self._text_classes
        if weights:
            found["text_encoder"] = self._read(model.from_pretrained, "text_encoder", use_safetensors=True)
        else:
            found["text_encoder"] = model(self._read(config.from_pretrained, "text_encoder"))
        for module in found["text_encoder"].modules():
            if hasattr(module, "position_ids"):
                del module.position_ids  # a buffer that is in no file; encode_text makes it
        return found

    def tokenizer(self) -> Any:
        """Text → ids; raises like :meth:`models`."""
        return self._read(self._text_classes[2].from_pretrained, "tokenizer")

    def scheduler(self, **options: Any) -> Any:
        """The scheduler of diffusers, with ``options`` instead of those of the file; raises like :meth:`models`."""
        config = self._read(diffusers().PNDMScheduler.load_config, "scheduler")
        return diffusers().PNDMScheduler.from_config(config, **options)

    def _read(self, read: Any, part: str, **options: Any) -> Any:
        try:
            return read(self.path, subfolder=part, **options)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"sd_path '{self.path}' holds no {part} of Stable Diffusion: {reason}") from error


class ControlledUNet(nn.Module):
    """Stable Diffusion's UNet and text encoder, which stay as they are, and a ControlNet."""

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
            text: (B, T, E) from :meth:`encode_text`; the empty text by default.
            cond_scale: Weight of the ControlNet.
            unconditional: Without the text, and of the ControlNet only with what it adds in the middle of the UNet, as in the
                published guidance.

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
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut off after 77 words → (B, T, E)."""
        length, device = self.empty_str_encoding.shape[1], self.empty_str_encoding.device
        ids = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        return self.text_encoder(ids, position_ids=torch.arange(length, device=device)[None])[0]


class VQControlNet(DiffusionVQ):
    """A tokenizer that decodes by Stable Diffusion.

    What is noised, and what it decodes, are the latents of Stable Diffusion's VAE (B, 4, Z, Z), whose size is always that of
    images of ``image_size_sd``; :meth:`vae_decode` makes images of them.

    Args:
        arguments: :class:`VQControlNetOptions`.

    Raises:
        UserError: ``sd_path`` holds no Stable Diffusion.
        MissingDependency: diffusers or transformers is not installed.
    """

    options_class = VQControlNetOptions
    picture_options = MappingProxyType({"seed": 0, "vae_decode": True})
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
        """Initialise everything; the parts of Stable Diffusion get their weights from its files."""
        super().init_weights()
        decoder = self.decoder
        if decoder.empty_str_encoding.is_meta:
            return
        parts = self.stable_diffusion.models(weights=True)
        for name, part in {"unet": decoder.unet, "text_encoder": decoder.text_encoder, "vae": self.vae}.items():
            part.load_state_dict(parts[name].state_dict())
        decoder.controlnet.load_state_dict(_controlnet(parts["unet"], self.latent_dim, self.pretrained_cn).state_dict())
        decoder.empty_str_encoding.copy_(decoder.encode_text([""]))

    def _frozen_parts(self) -> list[nn.Module]:
        return [self.decoder.unet, self.decoder.text_encoder, self.vae]

    def train(self, mode: bool = True) -> VQControlNet:
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    @cached_property
    def noise_scheduler(self) -> Any:
        """The scheduler of diffusers that noises latents in training: Stable Diffusion's own."""
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
        """A training step.

        Args:
            input_clean: (B, C, H, W), to be tokenized.
            input_noised: (B, 4, Z, Z), latents from :meth:`vae_encode` with noise.
            timesteps: Integers (B,), how much noise there is.
            cond_mask: (B, h, w) bool, tokens that are hidden from the decoder; drawn at random by default, if the options
                say so.
            orig_res: Ignored.
            prompt: A text for all images, or one for each; the empty one by default.

        Returns:
            The predicted noise (B, 4, Z, Z), loss of the quantizer (1,), and its statistics if they are asked for.
        """
        found = self.quantized(input_clean, part)
        cond_mask = self.hidden_tokens(found.latents) if cond_mask is None else cond_mask
        text = self._text(prompt, len(input_noised))
        return outputs(self.decoder(input_noised, timesteps, found.latents, cond_mask, text), found, return_statistics)

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
        """Sample latents of Stable Diffusion from those of tokens.

        Args:
            quant: (B, L, h, w).
            timesteps: Number of steps, 50 by default; the first one asks the decoder twice.
            image_size: ``image_size_sd``, if anything: it is always that of the images.
            vae_decode: Return images.
            prompt: A text for all images, or one for each; the empty one by default.
            guidance_scale: Above 1, how far to go beyond what would be predicted without text and tokens.
            cond_scale: Weight of the tokens.
            generator, verbose, scheduler_timesteps_mode, orig_res, seed, dtype: As of :meth:`DiVAE.decode_quant`.

        Returns:
            (B, 4, Z, Z) or, with ``vae_decode``, (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: a number of steps, seeds, prompts or pixels that cannot be.
        """
        if image_size not in (None, self.image_size_sd):
            raise UserError(f"images are always of {self.image_size_sd} pixels (image_size_sd), not {image_size}")
        scheduler = self.stable_diffusion.scheduler(timestep_spacing=scheduler_timesteps_mode)
        set_steps(scheduler, DECODING_STEPS if timesteps is None else timesteps)
        text = self._text(prompt, len(quant))

        def predict(x: Tensor, t: Tensor) -> Tensor:
            found = self.decoder(x, t, quant, text=text, cond_scale=cond_scale)
            if guidance_scale <= 1:
                return found
            without = self.decoder(x, t, quant, cond_scale=cond_scale, unconditional=True)
            return without + guidance_scale * (found - without)

        side = self.image_size_sd // 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (len(quant), self.decoder.unet.config.in_channels, side, side)
        with precision(quant.device, dtype):
            noise = generators(seed, generator, len(quant))
            latents = sample(predict, shape, scheduler, noise, quant.device, verbose)
        return self.vae_decode(latents) if vae_decode else latents

    @torch.no_grad()
    def vae_encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → latents (B, 4, H/8, W/8), a sample of those that stand for them."""
        return self.vae.encode(x).latent_dist.sample(generator) * self.vae.config.scaling_factor

    @torch.no_grad()
    def vae_decode(self, z: Tensor, clip: bool = True) -> Tensor:
        """Latents (B, 4, Z, Z) → images (B, 3, 8 Z, 8 Z), in [-1, 1] if they are clipped."""
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
    """A ControlNet of the shape of ``unet``, which reads latents of tokens instead of pictures."""
    model = diffusers().ControlNetModel.from_unet(
        unet,
        conditioning_channels=cond_channels,
        conditioning_embedding_out_channels=(cond_channels, *_CHANNELS),
        load_weights_from_unet=pretrained,
    )
    for convolution in model.controlnet_cond_embedding.blocks:
        convolution.stride = (1, 1)  # pictures are eight times as large as what the UNet sees; latents are as large
    return model
