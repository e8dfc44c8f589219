"""Noise schedules and sampling for tokenizers that decode by diffusion, with the schedulers of diffusers.

A picture x0 is noised to x_t = √ᾱ_t x0 + √(1 - ᾱ_t) ε with noise ε, and ᾱ falls from almost 1 to 0 over T time steps.
From x_t, a network predicts x0 ("sample"), ε ("epsilon") or v = √ᾱ_t ε - √(1 - ᾱ_t) x0 ("v_prediction", Salimans & Ho,
https://arxiv.org/abs/2202.00512). As proposed by Lin et al. (https://arxiv.org/abs/2305.08891), ᾱ ends at 0 and
sampling begins at the last step.

Shapes: B images, C channels, H x W pixels, N_H x N_W tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fourm.utils.dependencies import optional_import
from fourm.utils.errors import UserError, did_you_mean

DECODING_STEPS = 50
SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""The schedules of diffusers; "shifted_cosine:SHIFT" is implemented here."""
SHIFTED_COSINE = "shifted_cosine"
PREDICTIONS = ("sample", "epsilon", "v_prediction")
SPACINGS = ("trailing", "leading", "linspace")

Generators = torch.Generator | list[torch.Generator] | None
"""The source of the noise of a batch: one generator, one per picture, or None for torch's global generator."""


def diffusers() -> ModuleType:
    """Import diffusers.

    Raises:
        MissingDependency: It is not installed.
    """
    with optional_import("diffusers", "decoding by diffusion", "'fourm[diffusion]'"):
        import diffusers
    return diffusers


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule with its sampler.

    Attributes:
        sampler: "ddim" or "ddpm".
        num_train_timesteps: T.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", or "shifted_cosine:SHIFT" (Hoogeboom et al.,
            https://arxiv.org/abs/2301.11093), which is less noisy if SHIFT is below 1.
        prediction_type: "sample", "epsilon" or "v_prediction".
        clip: Clip the predicted x0 to [-1, 1] while sampling.
        zero_terminal_snr: Rescale the schedule so that the last step is pure noise.

    Raises:
        UserError: A value is not one of these.
    """

    sampler: str = "ddim"
    num_train_timesteps: int = 1000
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: str = "v_prediction"
    clip: bool = True
    zero_terminal_snr: bool = True

    def __post_init__(self) -> None:
        _check("scheduler", self.sampler, SCHEDULERS)
        _check("prediction_type", self.prediction_type, PREDICTIONS)
        if self._shift is None:
            _check("beta_schedule", self.beta_schedule, (*BETAS, f"{SHIFTED_COSINE}:0.5"))

    def scheduler(self, spacing: str = "trailing") -> Any:
        """Return a new scheduler of diffusers.

        Args:
            spacing: The steps that :func:`set_steps` chooses: "trailing", "leading" or "linspace". DDPM always uses
                "leading".

        Raises:
            MissingDependency: diffusers is not installed.
            UserError: There is no such spacing.
        """
        _check("scheduler_timesteps_mode", spacing, SPACINGS)
        options = {"timestep_spacing": spacing} if self.sampler == "ddim" else {}
        scheduler = getattr(diffusers(), SCHEDULERS[self.sampler])(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule="linear" if self._shift is not None else self.beta_schedule,
            prediction_type=self.prediction_type,
            clip_sample=self.clip,
            rescale_betas_zero_snr=self.zero_terminal_snr and self._shift is None,
            **options,
        )
        if self._shift is not None:
            scheduler.alphas_cumprod = shifted_cosine(self.num_train_timesteps, self._shift)
        return scheduler

    @property
    def _shift(self) -> float | None:
        name, _, shift = self.beta_schedule.partition(":")
        try:
            return float(shift) if name == SHIFTED_COSINE and float(shift) > 0 else None
        except ValueError:
            return None


def shifted_cosine(steps: int, shift: float) -> Tensor:
    """Return ᾱ (T,) of the cosine schedule with its log-SNR lowered by 2 log ``shift``; the last value is 0."""
    t = torch.linspace(0, 1, steps, dtype=torch.float64)
    log_snr = -2 * (torch.log(torch.tan(t * math.pi / 2)) + math.log(shift))
    alphas = log_snr.clamp(-15, 15).float().sigmoid()
    alphas[-1] = 0
    return alphas


def set_steps(scheduler: Any, steps: int) -> None:
    """Choose the number of sampling steps.

    Raises:
        UserError: The number is less than 1, or more than in training.
    """
    total = scheduler.config.num_train_timesteps
    if not 1 <= steps <= total:
        raise UserError(f"the number of decoding steps must be from 1 to {total}, not {steps}")
    scheduler.set_timesteps(steps)
    if isinstance(scheduler, diffusers().DDIMScheduler) and scheduler.config.timestep_spacing == "trailing":
        # The width of a DDIM step is an integer. If it does not divide T, the steps of diffusers would not begin where
        # the previous ones end.
        scheduler.timesteps = torch.arange(total, 0, -(total // steps)) - 1


def generators(seed: int | Sequence[int] | None, generator: Generators, batch: int) -> Generators:
    """Return the source of the noise of ``batch`` pictures.

    Args:
        seed: One seed per picture, or the seed of the first picture, from which the others count up. The noise of a
            picture depends only on its own seed.
        generator: A generator, instead of a seed.
        batch: The number of pictures.

    Raises:
        UserError: Both are given, or the number of seeds is not that of the pictures.
    """
    if seed is None:
        return generator
    if generator is not None:
        raise UserError("give a seed or a generator, not both")
    seeds = range(seed, seed + batch) if isinstance(seed, int) else seed
    if len(seeds) != batch:
        raise UserError(f"{len(seeds)} seeds were given for {batch} images")
    return [torch.Generator().manual_seed(s) for s in seeds]


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    scheduler: Any,
    generator: Generators,
    device: torch.device,
    verbose: bool = False,
) -> Tensor:
    """Sample pictures from noise, in the steps that :func:`set_steps` chose.

    The state between steps is float32, whatever the precision of ``predict``.

    Args:
        predict: Maps x_t (B, C, H, W) and steps (B,) to the prediction of the network (B, C, H, W).
        shape: (B, C, H, W).
        scheduler: A scheduler of diffusers.
        generator: The source of the noise. A generator on the CPU gives the same noise on every device.
        device: The device of the pictures.
        verbose: Show a progress bar.

    Returns:
        Pictures of shape ``shape``, float32.
    """
    from diffusers.utils.torch_utils import randn_tensor

    # Without a generator the noise is drawn on the CPU, too: torch.manual_seed has the same effect on all devices.
    source = generator[0] if isinstance(generator, list) else generator
    x = randn_tensor(tuple(shape), generator, source.device if source else torch.device("cpu"), torch.float32)
    x = x.to(device) * scheduler.init_noise_sigma
    # Not all schedulers draw noise.
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for step in tqdm(scheduler.timesteps, desc="decoding", disable=not verbose):
        prediction = predict(scheduler.scale_model_input(x, step), step.to(device).expand(len(x)))
        x = scheduler.step(prediction.float(), step, x, **options).prev_sample
    return x


def conditioning_mask(
    probability: float, shape: tuple[int, int, int], device: torch.device, tokens: tuple[int, int] | None = None
) -> Tensor:
    """Choose the tokens that are hidden from a decoder in training, with torch's global generator.

    Args:
        probability: The probability that tokens of an image are masked.
        shape: (B, N_H, N_W).
        device: The device of the mask.
        tokens: The minimum and the maximum number of tokens that are masked in such an image; None masks all.

    Returns:
        (B, N_H, N_W) bool, True = masked.
    """
    count = shape[1] * shape[2]
    masked = torch.rand(shape[0], 1, device=device) < probability
    if tokens is not None:
        low, high = (min(number, count) for number in tokens)
        number = torch.randint(low, high + 1, (shape[0], 1), device=device)
        rank = torch.rand(shape[0], count, device=device).argsort(1).argsort(1)
        masked = masked & (rank < number)
    return masked.expand(shape[0], count).reshape(shape)


def _check(name: str, value: str, known: Sequence[str] | dict[str, str]) -> None:
    if value not in known:
        raise UserError(f"{name} '{value}' is none of {', '.join(known)}{did_you_mean(str(value), known)}")
