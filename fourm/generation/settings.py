"""Generation settings of each target, as written in configurations, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fourm.data.modality_info import Modality, as_modality
from fourm.generation.decoding import CLASSES, kind_of
from fourm.generation.schedules import build_chained_generation_schedules
from fourm.utils.config import check_keys, convert
from fourm.utils.errors import UserError
from fourm.utils.options import option

COLUMNS: dict[str, type] = {
    "tokens_per_target": int,
    "autoregression_schemes": str,
    "decoding_steps": int,
    "token_decoding_schedules": str,
    "temps": float,
    "temp_schedules": str,
    "cfg_scales": float,
    "cfg_schedules": str,
}
"""Arguments of :func:`build_chained_generation_schedules` that have one value per target, and their types."""


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """Settings of the targets"""

    tokens_per_target: Any = option(
        "number of tokens; this and the following keys take one value, or one per target joined by '-'", None
    )
    autoregression_schemes: Any = option("halton, maskgit or roar (images), autoregressive (sequences)", None)
    decoding_steps: Any = option("number of decoding steps (images)", None)
    token_decoding_schedules: Any = option("tokens per step: linear or cosine (images)", None)
    temps: Any = option("sampling temperatures; 0 = always the most likely token", None)
    temp_schedules: Any = option("temperature schedules: constant, linear or onex:MIN:POWER", None)
    cfg_scales: Any = option("guidance scales; 1 = no guidance", None)
    cfg_schedules: Any = option("guidance schedules: constant", None)
    top_k: int | float | None = option(
        "sample only from the most likely tokens: a count, or a fraction of the vocabulary; 0 = all",
        None,
        at_least=0,
        at_most=10**8,
    )
    top_p: float | None = option(
        "sample only from the most likely tokens with this total probability; 0 = all", None, at_least=0, at_most=1
    )


def default_settings(target: Modality) -> dict[str, Any]:
    """Return default settings for a target.

    Many colour pictures fit a prompt, so they are sampled at a high temperature at first, and with guidance. Geometry,
    segmentation, edges and features follow from the inputs, so they use nearly the most likely tokens, in few steps.
    Guidance doubles the cost. In the demo, it improved segmentation, which otherwise prefers the most common class, and
    it made normals worse. Texts are sampled nearly greedily.
    """
    assert target.max_tokens  # resolve_modalities makes sure that every target has a maximum
    tokens = target.max_tokens
    common = {"tokens_per_target": tokens, "token_decoding_schedules": "linear", "cfg_schedules": "constant"}
    if target.type != "img":
        return common | {
            "autoregression_schemes": "autoregressive",
            "decoding_steps": 1,
            "temps": 0.3,
            "temp_schedules": "constant",
            "cfg_scales": 1.0,
        }
    if kind_of(target) == "rgb":
        return common | {
            "autoregression_schemes": "roar",
            "decoding_steps": max(tokens // 4, 1),
            "temps": 3.0,
            "temp_schedules": "onex:0.5:0.5",
            "cfg_scales": 3.0,
        }
    return common | {
        "autoregression_schemes": "roar",
        "decoding_steps": max(tokens // 4, 1),
        "temps": 0.01,
        "temp_schedules": "constant",
        "cfg_scales": 2.0 if kind_of(target) in CLASSES else 1.0,
    }


def chained_schedule(
    cond_domains: Sequence[str],
    targets: Sequence[str],
    modality_info: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    cfg_grow_conditioning: bool = True,
    where: str = "settings",
    own: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Build the schedule of a chain of targets.

    Args:
        cond_domains: Modalities that guidance empties.
        targets: Modalities to generate, in this order.
        modality_info: The modalities of the model.
        settings: Any of :data:`COLUMNS`: one value for all targets, or one per target, as a list, as values joined by
            ``-``, or as a mapping by target. The rest comes from ``own`` and :func:`default_settings`, but a given
            temperature stays constant unless its schedule is given, too.
        cfg_grow_conditioning: Let finished targets guide the targets after them.
        where: What error messages refer to.
        own: The model's own default settings of targets.

    Raises:
        UserError: If the settings do not fit the targets.
    """
    check_keys(settings, COLUMNS, where)
    own = own or {}
    defaults = [default_settings(as_modality(name, modality_info[name])) | dict(own.get(name, {})) for name in targets]
    columns = {}
    for key, value_type in COLUMNS.items():
        given = per_target(settings.get(key), value_type, targets, f"{where}: '{key}'")
        columns[key] = [d[key] if value is None else value for value, d in zip(given, defaults, strict=True)]
        if key == "temps":
            for default, temperature in zip(defaults, given, strict=True):
                if temperature is not None:
                    default["temp_schedules"] = "constant"
    if not cond_domains:
        columns["cfg_scales"] = [1.0] * len(targets)  # guidance needs conditions
    return build_chained_generation_schedules(
        cond_domains, targets, **columns, cfg_grow_conditioning=cfg_grow_conditioning, modality_info=modality_info
    )


def per_target(value: Any, value_type: type, targets: Sequence[str], where: str) -> list[Any]:
    """Convert a setting to one value per target, None for the default; see :func:`chained_schedule`."""
    if isinstance(value, Mapping):
        check_keys(value, targets, where)
        values = [value.get(name) for name in targets]
    elif isinstance(value, str) or not isinstance(value, Sequence):
        parts = value.split("-") if isinstance(value, str) else [value]
        values = list(parts) * len(targets) if len(parts) == 1 else list(parts)
    else:
        values = list(value)
    if len(values) != len(targets):
        raise UserError(f"{where} has {len(values)} values for {len(targets)} targets ({', '.join(targets)})")
    return [None if v is None else convert(v, value_type, where) for v in values]
