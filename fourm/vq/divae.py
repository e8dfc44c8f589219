"""Tokenizers whose decoder is a diffusion model in pixel space (arXiv 2312.06647, section 2 and appendix).

Shapes: B images, C channels, H x W pixels, h x w tokens, L latent width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fourm.utils.errors import UserError
from fourm.utils.options import option
from fourm.vq.diffusion import (
    DECODING_STEPS,
    Generators,
    NoiseSchedule,
    conditioning_mask,
    generators,
    sample,
    set_steps,
)
from fourm.vq.options import VQOptions
from fourm.vq.quantizers import WHOLE, Part
from fourm.vq.unet import PatchedUNet, unet_width
from fourm.vq.uvit import SIZES, UViT, uvit_size
from fourm.vq.vqvae import VQ, outputs
from fourm.vq.weights import Shapes
from fourm.vq.winograd import fast_convolutions

_TWINS = ("decoder.downsample_mid.conv.", "decoder.downsample_mid.Conv2d_0.")
"""Prefixes of the two names of one convolution of a U-ViT in diffusers; safetensors files may contain either."""


@dataclass(frozen=True, kw_only=True)
class DiffusionVQOptions(VQOptions):
    """Encoder and quantizer, and how a decoder learns to do without tokens"""

    cls_free_guidance_dropout: float = option(
        "share of the images whose tokens are hidden from the decoder in training", 0.0, at_least=0, at_most=1
    )
    masked_cfg: bool = option("only some of such an image's tokens are hidden", False)
    masked_cfg_low: int = option("at least this number of them", 0, at_least=0)
    masked_cfg_high: int | None = option("at most this number of them, all by default", None, at_least=0)

    def check(self) -> None:
        super().check()
        if self.masked_cfg_high is not None and self.masked_cfg_low > self.masked_cfg_high:
            raise UserError(
                f"tokenizer: 'masked_cfg_low' {self.masked_cfg_low} is above 'masked_cfg_high' {self.masked_cfg_high}"
            )


@dataclass(frozen=True, kw_only=True)
class DiVAEOptions(DiffusionVQOptions):
    """Encoder, quantizer, decoder and noise"""

    dec_type: str = option(
        "unet_patched, unet_patched/Wi_64, uvit_{b,l,h}_p4_f16 or uvit_p4_f16/B_3-Wi_192-H_6", "unet_patched"
    )
    image_size_dec: int | None = option("ignored: the size of images follows that of their tokens", None, at_least=1)
    num_train_timesteps: int = option("time steps of the noise schedule", 1000, at_least=2, at_most=2**16)
    scheduler: str = option("how images are sampled: ddim or ddpm", "ddim")
    beta_schedule: str = option("linear, scaled_linear, squaredcos_cap_v2, or shifted_cosine:0.5", "squaredcos_cap_v2")
    prediction_type: str = option("what the decoder predicts: sample, epsilon or v_prediction", "v_prediction")
    clip_sample: bool = option("sampling keeps what it takes for the image in [-1, 1]", False)
    thresholding: bool = option("the same", True)
    zero_terminal_snr: bool = option("the last time step is nothing but noise", True)
    conditioning: Literal["concat"] = option("how a U-ViT reads the tokens", "concat")
    dec_transformer_dropout: float = option("dropout of a U-ViT's transformer", 0.2, at_least=0, at_most=1)

    def check(self) -> None:
        super().check()
        self.noise_schedule()

    def noise_schedule(self) -> NoiseSchedule:
        """Return the noise schedule that the options describe.

        Raises:
            UserError: A name is unknown.
        """
        return NoiseSchedule(
            sampler=self.scheduler.lower().removesuffix("scheduler"),  # DDIMScheduler is an accepted name, too
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
            prediction_type=self.prediction_type,
            # The published thresholding cuts at quantiles that are then limited to 1, and so is a plain clipping.
            clip=self.thresholding or self.clip_sample,
            zero_terminal_snr=self.zero_terminal_snr,
        )


class DiffusionVQ(VQ):
    """The base class of tokenizers with a diffusion decoder."""

    options_class: ClassVar[type[DiffusionVQOptions]] = DiffusionVQOptions
    cls_free_guidance_dropout: float
    masked_cfg: bool
    masked_cfg_low: int
    masked_cfg_high: int | None

    def decode_pictures(self, ids: Tensor, **options: Any) -> Tensor:
        """See :meth:`ImageTokenizer.decode_pictures`. By default, the same tokens always give the same picture."""
        return super().decode_pictures(ids, **{"seed": [0] * len(ids), **options})

    def hidden_tokens(self, quant: Tensor) -> Tensor | None:
        """Draw which tokens of latents (B, L, h, w) a training step hides from the decoder: (B, h, w) bool, or None."""
        if not self.training or not self.cls_free_guidance_dropout:
            return None
        batch, _, height, width = quant.shape
        high = height * width if self.masked_cfg_high is None else self.masked_cfg_high
        some = (self.masked_cfg_low, high) if self.masked_cfg else None
        return conditioning_mask(self.cls_free_guidance_dropout, (batch, height, width), quant.device, some)


class DiVAE(DiffusionVQ):
    """A tokenizer with a diffusion decoder in pixel space.

    Args:
        arguments: The fields of :class:`DiVAEOptions`.
    """

    options_class = DiVAEOptions
    decoder: nn.Module
    image_size_dec: int

    def build_decoder(self, options: DiVAEOptions) -> None:
        self.image_size_dec = options.image_size_dec or options.image_size
        self.noise_schedule = options.noise_schedule()
        channels, latents = options.n_labels or options.n_channels, options.latent_dim
        self.decoder_channels = channels
        if options.dec_type.startswith("uvit_"):
            self.decoder = UViT(channels, latents, uvit_size(options.dec_type), options.dec_transformer_dropout)
        else:
            self.decoder = PatchedUNet(channels, latents, unet_width(options.dec_type))

    def init_weights(self) -> None:
        super().init_weights()
        self.decoder.init_weights()  # type: ignore[operator]

    @cached_property
    def noise_scheduler(self) -> Any:
        """The scheduler of diffusers with which images are noised in training.

        Raises:
            MissingDependency: diffusers is not installed.
        """
        return self.noise_schedule.scheduler()

    def forward(  # type: ignore[override]
        self,
        input_clean: Tensor,
        input_noised: Tensor,
        timesteps: Tensor,
        cond_mask: Tensor | None = None,
        orig_res: Any = None,
        part: Part = WHOLE,
        return_statistics: bool = False,
    ) -> tuple[Any, ...]:
        """Run the model in a training step.

        Args:
            input_clean: The images to tokenize, (B, C, H, W).
            input_noised: The noised images, (B, C, H, W).
            timesteps: The noise levels, integers (B,).
            cond_mask: The tokens to hide from the decoder, (B, h, w) bool; None draws them as the options say.
            orig_res: Ignored.
            part: Which micro-batch of a training step this is.
            return_statistics: Also return the statistics of the quantizer.

        Returns:
            The prediction of the decoder (B, C, H, W), the loss of the quantizer (1,) and, on request, its statistics.
        """
        quantized = self.quantized(input_clean, part)
        cond_mask = self.hidden_tokens(quantized.latents) if cond_mask is None else cond_mask
        return outputs(
            self.decoder(input_noised, timesteps, quantized.latents, cond_mask), quantized, return_statistics
        )

    @torch.no_grad()
    def decode_quant(  # type: ignore[override]
        self,
        quant: Tensor,
        timesteps: int | None = None,
        scheduler: Any = None,
        generator: Generators = None,
        image_size: int | tuple[int, int] | None = None,
        verbose: bool = False,
        scheduler_timesteps_mode: str = "trailing",
        orig_res: Any = None,
        *,
        seed: int | Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Sample images from latents.

        Args:
            quant: (B, L, h, w).
            timesteps: The number of steps, 50 by default.
            scheduler: A scheduler of diffusers, instead of the model's own.
            generator: The source of the noise; None for torch's global generator.
            image_size: The side length, or height and width, in pixels; None for the size that the tokens stand for.
            verbose: Show a progress bar.
            scheduler_timesteps_mode: "trailing", "leading" or "linspace".
            orig_res: Ignored.
            seed: One seed per image, or the seed of the first image, from which the others count up, instead of a
                generator. The noise of an image then depends only on its own seed.
            dtype: The precision of the decoder, such as ``torch.bfloat16``; None for that of its weights.

        Returns:
            (B, C, H, W), float32.

        Raises:
            UserError: The number of steps or seeds, or the size is invalid.
            MissingDependency: diffusers is not installed.
        """
        scheduler = scheduler or self.noise_schedule.scheduler(scheduler_timesteps_mode)
        set_steps(scheduler, DECODING_STEPS if timesteps is None else timesteps)
        height, width = (side * self.input_patch for side in quant.shape[2:])
        if image_size is not None:
            height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        shape = (len(quant), self.decoder_channels, height, width)
        with precision(quant.device, dtype), fast_convolutions(self.decoder):
            return sample(
                lambda x, t: self.decoder(x, t, quant),
                shape,
                scheduler,
                generators(seed, generator, len(quant)),
                quant.device,
                verbose,
            )

    @classmethod
    def names_in_file(cls, name: str) -> tuple[str, ...]:
        for one, other in (_TWINS, _TWINS[::-1]):
            if name.startswith(one):
                return name, other + name.removeprefix(one)
        return (name,)

    @classmethod
    def config_of_file(cls, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        derived = super().config_of_file(config, shapes)
        if conv := shapes.get("decoder.input_blocks.0.0.weight"):
            width = conv[0]
            derived["dec_type"] = "unet_patched" if width == 256 else f"unet_patched/Wi_{width}"
        elif table := shapes.get("decoder.mid_block.mid_pos_emb"):
            configured = str(config.get("dec_type"))
            if not configured.startswith("uvit_") or uvit_size(configured).dim != table[1]:
                derived["dec_type"] = next((name for name, size in SIZES.items() if size.dim == table[1]), configured)
        return derived


def precision(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return a context in which networks compute in ``dtype``; None changes nothing."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
