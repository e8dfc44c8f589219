"""Noise schedules and sampling of the tokenizers that decode by diffusion; the schedulers are those of diffusers.

A picture x0 and noise ε make x_t = √ᾱ_t x0 + √(1 - ᾱ_t) ε; ᾱ falls from almost 1 to 0 over T time steps. What a network
predicts of x_t is x0 ("sample"), ε ("epsilon") or v = √ᾱ_t ε - √(1 - ᾱ_t) x0 ("v_prediction", Salimans & Ho,
https://arxiv.org/abs/2202.00512). That ᾱ ends at 0, and that sampling begins at the last step, is after Lin et al.
(https://arxiv.org/abs/2305.08891).

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

from fourm.utils.errors import MissingDependency, UserError, did_you_mean

DECODING_STEPS = 50
SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Schedules that diffusers has; "shifted_cosine:SHIFT" is the other one."""
SHIFTED_COSINE = "shifted_cosine"
PREDICTIONS = ("sample", "epsilon", "v_prediction")
SPACINGS = ("trailing", "leading", "linspace")

Generators = torch.Generator | list[torch.Generator] | None
"""Where the noise of a batch comes from: one generator, or one of every picture, or torch's global one."""


def diffusers() -> ModuleType:
    """
    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependency("diffusers", "decoding by diffusion", "'fourm[diffusion]'") from error
    return diffusers


@dataclass(frozen=True)
class NoiseSchedule:
    """How pictures are noised, and how noise is turned into pictures.

    Attributes:
        sampler: "ddim" or "ddpm".
        num_train_timesteps: T.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", or "shifted_cosine:SHIFT" (Hoogeboom et al.,
            https://arxiv.org/abs/2301.11093), which has less noise if SHIFT is below 1.
        prediction_type: "sample", "epsilon" or "v_prediction".
        clip: While sampling, keep the predicted x0 in [-1, 1].
        zero_terminal_snr: Rescale the schedule so that nothing of the picture is left at the last step.

    Raises:
        UserError: a value is none of those.
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
        """A new scheduler of diffusers.

        Args:
            spacing: Which steps :func:`set_steps` chooses: "trailing", "leading" or "linspace". DDPM has "leading" alone.

        Raises:
            MissingDependency: diffusers is not installed.
            UserError: there is no such spacing.
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
    """ᾱ (T,) of the cosine schedule with its log-SNR lowered by 2 log ``shift``; 0 at the last step."""
    t = torch.linspace(0, 1, steps, dtype=torch.float64)
    log_snr = -2 * (torch.log(torch.tan(t * math.pi / 2)) + math.log(shift))
    alphas = log_snr.clamp(-15, 15).float().sigmoid()
    alphas[-1] = 0
    return alphas


def set_steps(scheduler: Any, steps: int) -> None:
    """Choose the steps of a sampling.

    Raises:
        UserError: there are fewer than 1, or more than in training.
    """
    total = scheduler.config.num_train_timesteps
    if not 1 <= steps <= total:
        raise UserError(f"the number of decoding steps must be from 1 to {total}, not {steps}")
    scheduler.set_timesteps(steps)
    if isinstance(scheduler, diffusers().DDIMScheduler) and scheduler.config.timestep_spacing == "trailing":
        # A step of DDIM is a whole number wide. Where that does not divide T, diffusers would begin steps elsewhere than
        # the one before them ended.
        scheduler.timesteps = torch.arange(total, 0, -(total // steps)) - 1


def generators(seed: int | Sequence[int] | None, generator: Generators, batch: int) -> Generators:
    """Where the noise of ``batch`` pictures comes from.

    Args:
        seed: One of every picture, or the first one's, which the others' follow. A picture's noise depends on its own seed
            alone, not on what else is in the batch.
        generator: Instead of a seed.

    Raises:
        UserError: both are given, or not as many as there are pictures.
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
    """From noise to pictures, by the steps that :func:`set_steps` chose.

    The state between steps is float32, whatever the precision of ``predict``.

    Args:
        predict: (x_t (B, C, H, W), steps (B,)) → what the schedule predicts, (B, C, H, W).
        shape: (B, C, H, W).
        generator: On the CPU, it gives the same noise whatever ``device`` is.
        verbose: Show a progress bar.

    Returns:
        ``shape``, float32.
    """
    from diffusers.utils.torch_utils import randn_tensor

    # Drawn on the CPU if there is no generator, too: torch.manual_seed then means the same on all devices.
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
    """Tokens that a decoder in training shall do without, drawn from torch's global generator.

    Args:
        probability: That tokens of an image are masked.
        shape: (B, N_H, N_W).
        tokens: How many of an image's tokens are masked then, at least and at most; all by default.

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
