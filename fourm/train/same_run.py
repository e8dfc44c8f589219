"""Checks that a run continues with the configuration, data and vocabulary with which its checkpoint was made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourm.train.config import RunConfig
from fourm.train.device import SHORT_DTYPES
from fourm.train.options import saved_options
from fourm.utils.errors import UserError
from fourm.utils.urls import redact

_ABSENT = object()


def check_same_run(config: RunConfig, saved: Mapping[str, Any], identity: Mapping[str, Any], where: Path) -> None:
    """Raise a :class:`UserError` that lists what has changed since a checkpoint, unless ``allow_changes`` is set.

    Args:
        saved: The state of the checkpoint; those of earlier versions have no data and vocabulary.
        identity: The current result of :meth:`Task.identity`.
        where: The checkpoint.
    """
    if config.allow_changes:
        return
    before, now = _normalised(saved["config"]), json.loads(json.dumps(_normalised(saved_options(config))))
    fixed = [item.name for item in dataclasses.fields(config) if item.metadata.get("fixed")]
    changes = _differences({key: before.get(key, _ABSENT) for key in fixed}, now)
    for part, facts in identity.items():
        if part in saved.get("identity", {}):
            changes += _differences(redact(saved["identity"][part]), json.loads(json.dumps(facts)))
    if changes:
        more = f"; and {len(changes) - 12} more" if len(changes) > 12 else ""
        raise UserError(
            f"checkpoint {where} is of a run with another configuration (then → now): "
            f"{'; '.join(changes[:12])}{more}. Undo these changes; or choose another output_dir, with 'finetune' for "
            "the weights; or set --allow_changes to continue with them"
        )


def check_same_vocabulary(
    config: RunConfig, saved: Mapping[str, Any], identity: Mapping[str, Any], where: Path
) -> None:
    """Do the same for an evaluation, which may have other options and data, but not another vocabulary."""
    if config.allow_changes:
        return
    for part, facts in identity.items():
        saved_facts = saved.get("identity", {}).get(part)
        if part != "data" and saved_facts and saved_facts != facts:
            raise UserError(
                f"checkpoint {where} was trained with another {', '.join(facts)} than this configuration names; use "
                "the one it was trained with"
            )


def _normalised(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without abbreviations, and without options that have no effect."""
    normalised = dict(values) | {"dtype": SHORT_DTYPES.get(str(values.get("dtype")), values.get("dtype"))}
    for switch, option in (("model_ema", "model_ema_decay"), ("batch_warmup_steps", "batch_warmup_parts")):
        if not normalised.get(switch):
            normalised.pop(option, None)
    return normalised


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe what has changed, without options that only one version has. Keys of options have no spaces."""
    differences = []
    for key in [*before, *(key for key in now if key not in before and ": " in key)]:
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if _ABSENT in (old, new) and " " not in key:
            continue
        if old != new:
            differences += _difference(key, old, new)
    return differences


def _difference(key: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
        return [
            text
            for name in names
            for text in _difference(f"{key}.{name}", old.get(name, _ABSENT), new.get(name, _ABSENT))
        ]
    return [f"{key} {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = "none" if value is _ABSENT else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
