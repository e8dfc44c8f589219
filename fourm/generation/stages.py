"""Several models one after another: each goes on from what is given and what those before it have generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fourm.generation.sampler import Result, Sampler

_STRIDE = 2_654_435_769  # 2³² / golden ratio: no stage draws the numbers of another one, or of a sample nearby


@dataclass(frozen=True)
class Stage:
    """A model, what it is to generate, and from what.

    Attributes:
        conditions: its inputs, by their full names.
        targets: modalities, by their full names.
        settings: further arguments of the sampler.
    """

    sampler: Sampler
    conditions: tuple[str, ...]
    targets: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def generate(stages: Sequence[Stage], samples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[Result]:
    """What all stages together make of each sample.

    Args:
        samples: modality → value, as for the first stage's sampler.
        seeds: one per sample, of the first stage; those of the others follow from it.
    """
    known: list[dict[str, Any]] = [dict(sample) for sample in samples]
    for index, stage in enumerate(stages):
        given = [{name: sample[name] for name in stage.conditions} for sample in known]
        own = [seed + index * _STRIDE for seed in seeds]
        results = stage.sampler(given, stage.targets, own, **stage.settings)
        known = [{**before, **result} for before, result in zip(known, results, strict=True)]
    return known
