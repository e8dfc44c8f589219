"""How the weights of a checkpoint were trained: the facts that its exported model carries for its model card."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fourm.models.model_card import Tables, checked_tables, to_header
from fourm.train.checkpoint import read_state
from fourm.train.journal import LOG, read_lines
from fourm.utils.checkpoints import ModelFormat, export_model
from fourm.utils.errors import UserError


def export_with_facts(checkpoint: Path, folder: Path, model_format: ModelFormat, ema: bool = False) -> None:
    """Export the model of a checkpoint with the facts about its training; see :func:`export_model`."""
    export_model(checkpoint, folder, model_format, ema, to_header(training_facts(checkpoint, ema)))


def training_facts(checkpoint: Path, ema: bool = False) -> Tables:
    """Collect the facts from the state of a checkpoint and, if it still lies in its run folder, from the log.

    Args:
        ema: Report the results of the moving average of the weights.
    """
    try:
        state = read_state(checkpoint)
    except UserError:  # the weights can be used without it
        return {}
    step, samples = state["step"], state["global_batch"]
    training = {
        "task": state.get("task"),
        "steps": step,
        "samples per step": samples,
        "samples": step * samples,
        "optimizer": state["config"].get("opt"),
        "precision": state["config"].get("dtype"),
        "weights": "moving average" if ema else "",
        "fourm": _version(),
    }
    facts = checked_tables(state.get("facts")) | {"Training": [training]}
    return facts | checked_tables({"Results": _results(checkpoint.parent.parent / LOG, step, state.get("losses"), ema)})


def _results(log: Path, step: int, losses: list[str] | None, ema: bool) -> list[dict[str, Any]]:
    """Return the results of the evaluation after ``step``, a row for each data set and way to evaluate it.

    Args:
        losses: The names of the losses of the task; other means in the log are metrics. None takes all for losses.
    """
    lines = [line["eval"] for line in read_lines(log)[0] if line["step"] == step and "eval" in line]
    try:
        return [
            {"data set": dataset, "evaluation": kind.removesuffix("_ema")}
            | {key: result[key] for key in ("samples", "loss")}
            | {
                f"loss of {name}" if losses is None or name in losses else name: mean
                for name, mean in result["per_modality"].items()
            }
            | result.get("metrics", {})
            for dataset, kinds in (lines[-1] if lines else {}).items()
            for kind, result in kinds.items()
            if kind.endswith("_ema") == ema
        ]
    except (AttributeError, KeyError, TypeError):  # somebody has edited the log
        return []


def _version() -> str:
    try:
        return version("fourm")
    except PackageNotFoundError:  # the source tree is used without being installed
        return ""
