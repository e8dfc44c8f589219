"""Whether a checkpoint is continued as it was begun: what of the configuration, data and vocabulary is different now."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourm.train.config import RunConfig
from fourm.train.options import saved_options
from fourm.utils.errors import UserError
from fourm.utils.urls import redact

_ABSENT = object()


def check_same_run(config: RunConfig, saved: Mapping[str, Any], identity: Mapping[str, Any], where: Path) -> None:
    """Raise a :class:`UserError` that lists what has changed since a checkpoint, unless ``allow_changes`` is set.

    Args:
        saved: the state of the checkpoint; one of an earlier version says nothing of data and vocabulary.
        identity: :meth:`Task.identity` now.
    """
    if config.allow_changes:
        return
    before, now = saved["config"], json.loads(json.dumps(_of_config(saved_options(config))))
    before = _of_config(before)
    fixed = [item.name for item in dataclasses.fields(config) if item.metadata.get("fixed")]
    changes = _differences({key: before.get(key, _ABSENT) for key in fixed}, now)
    for part, facts in identity.items():
        if part in saved.get("identity", {}):
            changes += _differences(redact(saved["identity"][part]), json.loads(json.dumps(facts)))
    if changes:
        more = f"; and {len(changes) - 12} more" if len(changes) > 12 else ""
        raise UserError(
            f"checkpoint {where} is of a run with another configuration (then → now): {'; '.join(changes[:12])}{more}. Take "
            "these back; or choose another output_dir, with 'finetune' for its weights; or set --allow_changes to go on so"
        )


def check_same_meaning(config: RunConfig, saved: Mapping[str, Any], identity: Mapping[str, Any], where: Path) -> None:
    """The same for an evaluation, whose data may be different ones: of all else that weights mean nothing without."""
    if config.allow_changes:
        return
    for part, facts in identity.items():
        known = saved.get("identity", {}).get(part)
        if part != "data" and known and known != facts:
            raise UserError(
                f"checkpoint {where} was trained with another {', '.join(facts)} than this configuration names; take the one it "
                "was trained with"
            )


def _of_config(values: Mapping[str, Any]) -> dict[str, Any]:
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    found = dict(values) | {"dtype": short.get(str(values.get("dtype")), values.get("dtype"))}
    if not found.get("model_ema"):
        found.pop("model_ema_decay", None)
    return found


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is another; keys that did not exist then are passed over."""
    found = []
    for key in [*before, *(key for key in now if key not in before and ": " in key)]:
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if old is not _ABSENT and new is _ABSENT and " " not in key:
            continue  # of a configuration
        if old != new and not (old is _ABSENT and " " not in key):
            found += _difference(key, old, new)
    return found


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
