"""Checkpoints: folders that are there completely or not at all, in formats that run no code when they are read.

``checkpoints/step-00001234/`` holds

* ``model.safetensors`` and ``config.json``: the model, as ``FM.from_pretrained`` reads it
* ``optimizer.safetensors``: ``PARAMETER/STATE`` → tensor
* ``state.json``: the step, the position in the data of every rank, the state of the log, the sizes of the other files

Nothing of a random generator is kept: all randomness of a step derives from the seed and the number of its batch.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourm.models import FM
from fourm.utils.errors import UserError
from fourm.utils.files import atomic_path

log = logging.getLogger("fourm")
STATE = "state.json"


def save_checkpoint(
    folder: Path, step: int, model: FM, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep_last: int
) -> Path:
    """Write ``folder/step-…``; of it and those before keep the newest ``keep_last``, 0 = all."""
    target = folder / f"step-{step:08d}"
    with atomic_path(target) as path:
        path.mkdir()
        model._save_pretrained(path)  # save_pretrained would add a model card
        save_file(_optimizer_tensors(model, optimizer), path / "optimizer.safetensors")
        sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
        (path / STATE).write_text(json.dumps({"step": step, "files": sizes, **state}))
    before = [path for path in sorted(folder.glob("step-*"), reverse=True) if path.name <= target.name]
    for old in before[keep_last:] if keep_last else ():
        shutil.rmtree(old)
    return target


def export_model(checkpoint: Path, folder: Path) -> None:
    """Put the model of a checkpoint into ``folder``, where ``FM.from_pretrained`` looks for it."""
    for name in ("config.json", "model.safetensors"):
        with atomic_path(folder / name) as path:
            shutil.copyfile(checkpoint / name, path)


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint whose files are all there and complete.

    Raises:
        UserError: they are not.
    """
    try:
        state = json.loads((path / STATE).read_text())
        for name, size in state["files"].items():
            found = (path / name).stat().st_size
            if found != size:
                raise UserError(f"checkpoint {path} is damaged: {name} has {found} bytes, not {size}")
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"checkpoint {path} is damaged or none at all: {error}") from error
    return state


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder`` but the damaged ones, which are named in warnings; newest first."""
    complete = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_state(path)
            complete.append(path)
        except UserError as error:
            log.warning("%s; passed over", error)
    return complete


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process has left of a checkpoint that it was writing."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


_STATES = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")


def load_checkpoint(path: Path, model: FM, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer state in place.

    Raises:
        UserError: the files are damaged, or belong to another model.
    """
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
        tensors = load_file(path / "optimizer.safetensors")
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint {path} does not fit this configuration: {reason}") from error
    for name, parameter in model.named_parameters():
        found = {
            key: tensor.to(parameter.device) for key in _STATES if (tensor := tensors.get(f"{name}/{key}")) is not None
        }
        if found:
            optimizer.state[parameter] = found


def _optimizer_tensors(model: FM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }
