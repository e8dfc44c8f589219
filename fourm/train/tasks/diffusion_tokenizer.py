"""Training of tokenizers with a diffusion decoder: DiVAEs, and ControlNets for Stable Diffusion.

Shapes: B samples, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourm.train.tasks.tokenizer import TokenizerTraining, TokenizerTrainingConfig, Values
from fourm.vq.controlnet import VQControlNet
from fourm.vq.divae import DiVAE
from fourm.vq.pictures import resized
from fourm.vq.training_options import ControlNetOptions, DecoderOptions, DiffusionOptions


@dataclass(frozen=True, kw_only=True)
class DiVAEConfig(DecoderOptions, DiffusionOptions, TokenizerTrainingConfig):
    """All keys of ``run_training_divae.py``"""


@dataclass(frozen=True, kw_only=True)
class VQControlNetConfig(ControlNetOptions, TokenizerTrainingConfig):
    """All keys of ``run_training_vqcontrolnet.py``"""

    def loaded_size(self, training: bool) -> int:
        size = super().loaded_size(training)
        return max(size, self.input_size_sd or 0) if self.max_input_size else size


class DiVAETraining(TokenizerTraining[DiVAEConfig]):
    """Trains a DiVAE: an encoder, a quantizer and a diffusion decoder."""

    name, config_class, model_class, format = "divae", DiVAEConfig, DiVAE, DiVAE.model_format()

    def model_arguments(self) -> dict[str, Any]:
        config = self.config
        return (
            super().model_arguments()
            | config.diffusion_arguments(config.bounded)
            | {
                "dec_type": config.decoder_type,
                "image_size_dec": config.input_size_dec,
            }
        )

    def _forward(self, model: nn.Module, values: Values, **options: Any) -> tuple[Any, ...]:
        schedule = getattr(model, "module", model).noise_scheduler
        noised, noise, steps = noise_at_random(schedule, values.images, values.seeds)
        prediction, *others = model(values.images, noised, steps, part=values.part, **options)
        prediction_type = self.config.prediction_type
        if prediction_type == "v_prediction-epsilon_loss":
            prediction, prediction_type = implied_noise(schedule, prediction.float(), noised, steps), "epsilon"
        return (prediction, diffusion_target(prediction_type, schedule, values.images, noise, steps)), *others

    def _reconstruction(self, model: nn.Module, values: Values, prediction: Tensor, target: Tensor) -> Tensor:
        assert values.seeds is not None
        options = {"timesteps": self.config.num_eval_timesteps, "seed": values.seeds.tolist(), "verbose": False}
        return model.autoencode(values.images, **options).float()  # type: ignore[operator]


class VQControlNetTraining(TokenizerTraining[VQControlNetConfig]):
    """Trains a ControlNet, with which Stable Diffusion decodes the tokens of a frozen tokenizer."""

    name, config_class, model_class, format = (
        "vqcontrolnet",
        VQControlNetConfig,
        VQControlNet,
        VQControlNet.model_format(),
    )
    forward_methods = (*TokenizerTraining.forward_methods, "vae_encode")

    def model_arguments(self) -> dict[str, Any]:
        config = self.config
        return (
            super().model_arguments()
            | config.condition_arguments()
            | {
                "sd_path": config.sd_path,
                "image_size_sd": config.input_size_sd,
                "pretrained_cn": config.pretrained_cn,
                "enable_xformer": config.use_xformer,
            }
        )

    def _forward(self, model: nn.Module, values: Values, **options: Any) -> tuple[Any, ...]:
        unwrapped: Any = getattr(model, "module", model)
        clean = unwrapped.vae_encode(resized(values.loaded, unwrapped.image_size_sd))
        noised, noise, steps = noise_at_random(unwrapped.noise_scheduler, clean, values.seeds)
        prediction, *others = model(values.images, noised, steps, part=values.part, **options)
        return (prediction, noise), *others

    def _reconstruction(self, model: nn.Module, values: Values, prediction: Tensor, target: Tensor) -> Tensor:
        assert values.seeds is not None
        config = self.config
        decoded = model.autoencode(  # type: ignore[operator]
            values.images,
            timesteps=config.num_eval_timesteps,
            guidance_scale=config.guidance_scale,
            cond_scale=config.cond_scale,
            seed=values.seeds.tolist(),
            vae_decode=True,
            verbose=False,
        )
        return resized(decoded.float(), values.images.shape[-1])


def noise_at_random(schedule: Any, clean: Tensor, seeds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Add noise to each sample, at a random noise level.

    Args:
        schedule: A scheduler of diffusers.
        clean: (B, C, H, W).
        seeds: One seed per sample, (B,), with which an evaluation does not depend on the batches; None draws from
            torch's global generator.

    Returns:
        The noised samples and the noise, (B, C, H, W) float32 each, and the noise levels (B,) int64.
    """
    levels = schedule.config.num_train_timesteps
    if seeds is None:
        noise = torch.randn_like(clean, dtype=torch.float32)
        steps = torch.randint(levels, (len(clean),), device=clean.device)
    else:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in generators])
        steps = torch.stack([torch.randint(levels, (), generator=generator) for generator in generators])
        noise, steps = noise.to(clean.device), steps.to(clean.device)
    return schedule.add_noise(clean.float(), noise, steps), noise, steps


def diffusion_target(prediction_type: str, schedule: Any, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """Return the target of a network with this ``prediction_type``, (B, C, H, W)."""
    if prediction_type == "v_prediction":
        return schedule.get_velocity(clean.float(), noise, steps)
    return noise if prediction_type == "epsilon" else clean


def implied_noise(schedule: Any, velocity: Tensor, noised: Tensor, steps: Tensor) -> Tensor:
    """Return the noise that a predicted velocity implies, (B, C, H, W)."""
    alphas = schedule.alphas_cumprod.to(velocity.device)[steps].view(-1, 1, 1, 1)
    return alphas.sqrt() * velocity + (1 - alphas).sqrt() * noised
