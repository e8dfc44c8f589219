"""How each target is generated: values per target as the configurations write them, and defaults for what they leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fourm.data.modality_info import Modality, as_modality
from fourm.generation.decoding import CLASSES, kind_of
from fourm.generation.schedules import build_chained_generation_schedules
from fourm.utils.config import check_keys, convert
from fourm.utils.errors import UserError

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
"""Arguments of :func:`build_chained_generation_schedules` with a value per target."""


def default_settings(target: Modality) -> dict[str, Any]:
    """Values that suit a kind of modality.

    Many colour pictures fit a prompt: they are drawn hot at first and guided. Geometry, segmentation, edges and features
    follow from what is given: nearly the likeliest tokens, in few steps. Guidance costs twice as much; it made the demo's
    segmentation better, which else prefers the commonest class, and its normals worse. Texts are written nearly greedily.
    """
    assert target.max_tokens  # every target has a limit: resolve_modalities
    tokens = target.max_tokens
    common = {"tokens_per_target": tokens, "token_decoding_schedules": "linear", "cfg_schedules": "constant"}
    if target.type != "img":
        return common | {
            "autoregression_schemes": "autoregressive", "decoding_steps": 1, "temps": 0.3, "temp_schedules": "constant",
            "cfg_scales": 1.0,
        }  # fmt: skip
    if kind_of(target) == "rgb":
        return common | {
            "autoregression_schemes": "roar", "decoding_steps": max(tokens // 4, 1), "temps": 3.0,
            "temp_schedules": "onex:0.5:0.5", "cfg_scales": 3.0,
        }  # fmt: skip
    return common | {
        "autoregression_schemes": "roar", "decoding_steps": max(tokens // 4, 1), "temps": 0.01,
        "temp_schedules": "constant", "cfg_scales": 2.0 if kind_of(target) in CLASSES else 1.0,
    }  # fmt: skip


def chained_schedule(
    cond_domains: Sequence[str],
    targets: Sequence[str],
    modality_info: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    cfg_grow_conditioning: bool = True,
    where: str = "settings",
) -> list[dict[str, Any]]:
    """The schedule of a chain of targets.

    Args:
        settings: any of :data:`COLUMNS`; each a value for all targets, or one per target: a list, values joined by
            ``-``, or a mapping by the target's name. What is left out: :func:`default_settings`; a temperature that is
            given stays constant unless its schedule is given too.
        where: what error messages name.

    Raises:
        UserError: settings that do not fit the targets.
    """
    check_keys(settings, COLUMNS, where)
    defaults = [default_settings(as_modality(name, modality_info[name])) for name in targets]
    columns = {}
    for key, value_type in COLUMNS.items():
        given = per_target(settings.get(key), value_type, targets, f"{where}: '{key}'")
        columns[key] = [own[key] if value is None else value for value, own in zip(given, defaults, strict=True)]
        if key == "temps":
            for own, temperature in zip(defaults, given, strict=True):
                own["temp_schedules"] = own["temp_schedules"] if temperature is None else "constant"
    if not cond_domains:
        columns["cfg_scales"] = [1.0] * len(targets)  # there is nothing to be guided by
    return build_chained_generation_schedules(
        cond_domains, targets, **columns, cfg_grow_conditioning=cfg_grow_conditioning, modality_info=modality_info
    )


def per_target(value: Any, value_type: type, targets: Sequence[str], where: str) -> list[Any]:
    """A setting as one value per target, None where nothing is said; see :func:`chained_schedule`."""
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
