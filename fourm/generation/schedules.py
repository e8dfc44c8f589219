"""Generation schedules: targets one after another, each in steps with tokens and temperatures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fourm.data.modality_info import MODALITY_INFO, as_modality
from fourm.generation.token_sampling import MIN_TEMPERATURE
from fourm.utils.config import Range
from fourm.utils.errors import UserError, did_you_mean

GenerationSchedule = Sequence[Mapping[str, Any]]
"""Steps, each a dict of target_domain, scheme, num_tokens, temperature, cfg_scale and cfg_cond_domains."""

IMAGE_SCHEMES, SEQUENCE_SCHEMES = ("halton", "maskgit", "roar"), ("autoregressive",)


def linear_schedule(num_steps: int, num_tokens: int) -> list[int]:
    """Return the tokens of each step, as equal as possible, larger steps first and without empty steps."""
    ends = np.linspace(0, num_tokens, num_steps + 1).astype(int)
    return [n for n in sorted(np.diff(ends).tolist(), reverse=True) if n]


def cosine_schedule(num_steps: int, num_tokens: int) -> list[int]:
    """Return the tokens of each step along a cosine; the last step takes the remaining tokens."""
    remaining = 0.5 * (1 + np.cos(np.pi * np.arange(num_steps) / num_steps))
    counts: list[int] = []
    for share in remaining[:-1] - remaining[1:]:
        counts.append(min(round(num_tokens * share), num_tokens - sum(counts)))
    return [*counts, num_tokens - sum(counts)]


TOKEN_SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {"linear": linear_schedule, "cosine": cosine_schedule}


def temperatures(schedule: str, temperature: float, token_schedule: Sequence[int]) -> list[float]:
    """Return the temperature of each step.

    Args:
        schedule: ``constant``, ``linear``, or ``onex:MIN:POWER``, which falls from ``temperature`` to MIN like
            x^−POWER.
        temperature: Temperature of the first step (``onex``: before the first step).
        token_schedule: Tokens of each step.

    Raises:
        UserError: If the schedule is unknown.
    """
    name, *parameters = schedule.split(":")
    decoded = np.cumsum(token_schedule) / max(sum(token_schedule), 1)
    if name == "constant" and not parameters:
        return [float(temperature)] * len(token_schedule)
    if name == "linear" and not parameters:
        values = temperature * (1 - np.concatenate([[0.0], decoded[:-1]]))
    elif name == "onex" and len(parameters) == 2 and all(map(_is_number, parameters)):
        low, power = map(float, parameters)
        u = np.linspace(1, 100, sum(token_schedule)) ** -power
        u = (u - u.min()) / (np.ptp(u) or 1.0)
        u = u[np.minimum(np.arange(len(token_schedule)), len(u) - 1)]  # empty steps may outnumber the tokens
        values = low + (temperature - low) * (1 - decoded) * u
    else:
        raise UserError(f"temp_schedules: '{schedule}' is none of constant, linear and onex:MIN:POWER")
    return np.maximum(values, MIN_TEMPERATURE).tolist()


def _is_number(text: str) -> bool:
    return text.isascii() and text.replace(".", "", 1).isdigit() and len(text) < 20


_RANGES = {
    "tokens_per_target": Range(at_least=1, at_most=10**6),
    "decoding_steps": Range(at_least=1, at_most=10**5),
    "temps": Range(at_least=0, at_most=1e6),
    "cfg_scales": Range(at_least=0, at_most=1e6),
}


def build_chained_generation_schedules(
    cond_domains: Sequence[str],
    target_domains: Sequence[str],
    tokens_per_target: Sequence[int],
    autoregression_schemes: Sequence[str],
    decoding_steps: Sequence[int],
    token_decoding_schedules: Sequence[str],
    temps: Sequence[float],
    temp_schedules: Sequence[str],
    cfg_scales: Sequence[float | Sequence[float]],
    cfg_schedules: Sequence[str],
    cfg_grow_conditioning: bool = False,
    modality_info: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Build the schedule of a chain of targets.

    All arguments except the first and the last two have one entry per target.

    Args:
        cond_domains: Modalities that guidance empties.
        target_domains: Modalities to generate, in this order.
        tokens_per_target: Number of tokens of an image, maximum number of tokens of a sequence.
        autoregression_schemes: ``halton``, ``maskgit`` or ``roar`` for images, ``autoregressive`` for sequences.
        decoding_steps: Number of steps of an image; a sequence is one step.
        token_decoding_schedules: ``linear`` or ``cosine`` for images.
        temps: Temperatures; 0 takes the most likely token.
        temp_schedules: See :func:`temperatures`; the temperature of a sequence is constant.
        cfg_scales: Guidance scales; 1 means no guidance. :meth:`GenerationSampler.generate_multi_guided` takes one
            weight per condition.
        cfg_schedules: ``constant``.
        cfg_grow_conditioning: Add every finished target to the ``cond_domains`` of the targets after it.
        modality_info: The modalities; None uses the modality table.

    Returns:
        Steps with target_domain, scheme, num_tokens, temperature, cfg_scale and cfg_cond_domains.

    Raises:
        UserError: If the arguments do not fit together.
    """
    columns = {
        "tokens_per_target": tokens_per_target,
        "autoregression_schemes": autoregression_schemes,
        "decoding_steps": decoding_steps,
        "token_decoding_schedules": token_decoding_schedules,
        "temps": temps,
        "temp_schedules": temp_schedules,
        "cfg_scales": cfg_scales,
        "cfg_schedules": cfg_schedules,
    }
    for name, column in columns.items():
        if isinstance(column, str) or len(column) != len(target_domains):
            raise UserError(f"{name} must have one entry for each of the {len(target_domains)} target_domains")
        for target, value in zip(target_domains, column, strict=True):
            # The weights of several conditions, a list, may be negative.
            if name in _RANGES and not isinstance(value, (list, tuple)):
                _RANGES[name].check(value, f"{name} of {target}")
    conditions = [*cond_domains]
    schedule: list[dict[str, Any]] = []
    for target, tokens, scheme, steps, token_schedule, temp, temp_schedule, scale, scale_schedule in zip(
        target_domains, *columns.values(), strict=True
    ):
        if scale_schedule != "constant":
            raise UserError(f"cfg_schedules: '{scale_schedule}' of {target} is unknown; use constant")
        scheme = scheme.lower()
        if scheme in SEQUENCE_SCHEMES:
            pairs = [(tokens, float(temp))]
        else:
            counts = _token_schedule(target, token_schedule, steps, tokens)
            pairs = list(zip(counts, temperatures(temp_schedule, temp, counts), strict=True))
        schedule += [
            {
                "target_domain": target,
                "scheme": scheme,
                "num_tokens": count,
                "temperature": temperature,
                "cfg_scale": scale,
                "cfg_cond_domains": [*conditions],
            }
            for count, temperature in pairs
        ]
        if cfg_grow_conditioning:
            conditions.append(target)
    modality_info = MODALITY_INFO if modality_info is None else modality_info
    check_schedule(schedule, modality_info, where="target_domains")
    for name in cond_domains:
        if name not in modality_info:
            raise UserError(f"cond_domains: unknown modality '{name}'{did_you_mean(name, modality_info)}")
    return schedule


def _token_schedule(target: str, name: str, steps: int, tokens: int) -> list[int]:
    if name not in TOKEN_SCHEDULES:
        raise UserError(f"token_decoding_schedules: '{name}' of {target} is none of {', '.join(TOKEN_SCHEDULES)}")
    return TOKEN_SCHEDULES[name](steps, tokens)


def check_schedule(
    schedule: GenerationSchedule,
    modality_info: Mapping[str, Mapping[str, Any]],
    where: str = "schedule",
    multi: bool = False,
) -> None:
    """Check that a schedule fits the modalities.

    Args:
        schedule: The schedule.
        modality_info: The modalities that can be targets.
        where: What error messages refer to.
        multi: Whether the conditions of guidance are given separately from the schedule.

    Raises:
        UserError: If it does not.
    """
    for step in schedule:
        missing = {"target_domain", "scheme", "num_tokens", "temperature"} - step.keys()
        if missing:
            raise UserError(f"{where}: a step lacks {', '.join(sorted(missing))}: {dict(step)}")
        target, scheme = step["target_domain"], step["scheme"]
        if target not in modality_info:
            raise UserError(f"{where}: '{target}' cannot be generated{did_you_mean(target, modality_info)}")
        modality = as_modality(target, modality_info[target])
        if modality.vocab_size is None:
            raise UserError(f"{where}: {target} does not consist of tokens, so it cannot be generated")
        schemes = IMAGE_SCHEMES if modality.type == "img" else SEQUENCE_SCHEMES
        if scheme not in schemes:
            *others, last = schemes
            allowed = f"{', '.join(others)} or {last}" if others else last
            raise UserError(
                f"{where}: {target} is {'an image' if modality.type == 'img' else 'a sequence'} and can be generated "
                f"with {allowed}, not {scheme}{did_you_mean(scheme, schemes)}"
            )
        if not multi and step.get("cfg_scale", 1.0) != 1.0 and not step.get("cfg_cond_domains"):
            raise UserError(
                f"{where}: guidance of {target} needs cond_domains to empty; name some, or set cfg_scale to 1"
            )
    for target, steps in itertools.groupby(schedule, key=lambda step: step["target_domain"]):
        tokens = sum(step["num_tokens"] or 0 for step in steps)
        positions = as_modality(target, modality_info[target]).max_tokens
        if positions and tokens > positions:
            raise UserError(f"{where}: {target} has {positions} positions, fewer than the {tokens} tokens to generate")
