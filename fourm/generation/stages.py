"""Runs several models in a row, each conditioned on the inputs and on the results of the models before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fourm.generation.sampler import Result, Sampler

_SEED_STRIDE = 2_654_435_769  # 2³² / golden ratio: keeps the seeds of stages and of nearby samples apart


@dataclass(frozen=True)
class Stage:
    """One model with its inputs and targets.

    Attributes:
        sampler: The model and its tokenizers.
        conditions: Full names of the input modalities.
        targets: Full names of the modalities to generate.
        settings: Further arguments of the sampler.
    """

    sampler: Sampler
    conditions: tuple[str, ...]
    targets: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def generate(stages: Sequence[Stage], samples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[Result]:
    """Run all stages on each sample.

    Args:
        stages: The stages, in order.
        samples: Samples that map modalities to values, as for the sampler of the first stage.
        seeds: Seed of each sample in the first stage; the seeds of later stages are derived from it.

    Returns:
        The inputs and the results of all stages for each sample.
    """
    known: list[dict[str, Any]] = [dict(sample) for sample in samples]
    for index, stage in enumerate(stages):
        given = [{name: sample[name] for name in stage.conditions} for sample in known]
        stage_seeds = [seed + index * _SEED_STRIDE for seed in seeds]
        results = stage.sampler(given, stage.targets, stage_seeds, **stage.settings)
        known = [{**sample, **result} for sample, result in zip(known, results, strict=True)]
    return known
