"""Checkpoints: folders that are either complete or absent, in formats that run no code when they are read.

``checkpoints/step-00001234/`` has the same format for every strategy and number of processes. It holds

* ``shard-*.safetensors``: the tensors, or parts of tensors, that each process writes: ``model/PARAMETER``,
  ``ema/PARAMETER`` and ``optimizer/PARAMETER/STATE``
* ``config.json``: the configuration of the model
* ``state.json``: everything else that the run needs to continue, see :func:`fourm.train.resume.state_to_save`
* ``checksums.json``: the sizes and checksums of all of these

There is no state of a random generator: all randomness of a step derives from the seed and the number of its batch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from fourm.train import ema
from fourm.train.nonfinite import first_non_finite
from fourm.train.parallel import Processes
from fourm.utils.checkpoints import CHECKPOINT_FILES, CHECKSUMS, CONFIG, EMA, MODEL, STATE, checksum, read_metadata
from fourm.utils.errors import UserError
from fourm.utils.files import atomic_folder
from fourm.utils.options import Options, option
from fourm.utils.paths import InputPath

log = logging.getLogger("fourm")
OPTIMIZER = "optimizer/"
_GROUPS = (MODEL, EMA, OPTIMIZER)  # in separate files, so that weights can be read without optimizer states
_STATES = {  # of a parameter, by the ``algorithm`` of its group
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "muon": ("momentum_buffer",),
}
_STATE_TYPES = {"step": int, "config": dict, "global_batch": int, "layout": dict, "loss_scale": list, "ranks": list}
SAVED_MARKER = ".saved.txt"  # in a run folder that has had a checkpoint, even if it has been removed since


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """Checkpoints"""

    save_ckpt_freq: int = option("epochs between two checkpoints; 0 = only save at the end", 1, at_least=0)
    save_every_minutes: float = option(
        "also save this many minutes after the last checkpoint; 0 = never", 0.0, at_least=0
    )
    keep_last: int = option("number of checkpoints to keep; 0 = all", 2, at_least=0)
    async_save: bool = option("write checkpoints in the background, from a copy in host memory", True)
    auto_resume: bool = option("continue from the newest complete checkpoint in output_dir or s3_save_dir", True)
    resume: InputPath = option("continue from this checkpoint, or the newest of this run: a folder or an s3:// URL", "")
    allow_changes: bool = option(
        "continue from a checkpoint although the data, seed or schedule have changed since", False
    )
    finetune: InputPath = option(
        "start from these weights: a run folder, a .safetensors or .pth file, an s3:// URL of these, or a hub id",
        "",
    )
    start_epoch: int = option(
        "first epoch of a run that does not resume from a checkpoint", 0, at_least=0, at_most=10**9
    )


class CheckpointWriter:
    """Writes the checkpoints of a run to ``folder``. All processes make the same calls.

    Args:
        keep_last: The number of checkpoints to keep; 0 keeps all.
        background: Whether to write while the training goes on.
        on_saved: Called in the main process with each checkpoint that is complete; must return quickly.
        protected: Old checkpoints that must not be removed yet.
    """

    def __init__(
        self,
        folder: Path,
        parallel: Processes,
        keep_last: int,
        background: bool,
        on_saved: Callable[[Path], None] | None = None,
        protected: Container[Path] = (),
    ):
        self.folder, self._parallel, self._keep_last, self._background = folder, parallel, keep_last, background
        self._on_saved, self._protected = on_saved, protected
        # The messages of the writer threads must not mix with those of the training.
        self._group: Any = parallel.new_group()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None

    def save(self, step: int, config: dict[str, Any], tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Start to write ``step-…`` when the previous checkpoint is complete. The tensors may change afterwards.

        Args:
            config: The configuration of the model.
            tensors: The tensors or, under FSDP, their shards, by name.
            state: The state of the run, for JSON; that of the main process is written.

        Raises:
            UserError: This checkpoint or the one before could not be written, or holds values that are not finite.
        """
        self.wait()
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        copy = DefaultStager(options).stage(tensors)
        self._pending = self._thread.submit(self._write, self.folder / f"step-{step:08d}", config, copy, state)
        if not self._background:
            self.wait()

    def wait(self) -> None:
        """Wait until no checkpoint is being written.

        Raises:
            UserError: The checkpoint could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, target: Path, config: dict[str, Any], tensors: Any, state: dict[str, Any]) -> None:
        parallel, group = self._parallel, self._group
        with contextlib.ExitStack() as stack:

            def check() -> None:
                if name := first_non_finite(tensors.items()):
                    raise UserError(f"{name} holds values that are not finite. {divergence_advice(target.parent)}")

            def begin() -> Path:
                path = stack.enter_context(atomic_folder(target, CHECKPOINT_FILES))
                (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
                (path / STATE).write_text(json.dumps(state))
                return path

            def write_shards() -> dict[str, list[int]]:
                files = {name: _GROUPS.index(name[: name.index("/") + 1]) + 1 for name in tensors}
                writer = dcp.HuggingFaceStorageWriter(str(path), files, save_distributed=True)
                try:
                    dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=not parallel.distributed)
                except dcp.CheckpointException as error:  # with the errors of all processes, in all of them
                    raise next(iter(error.failures.values()))[0] from error
                return {file.name: checksum(file) for file in path.glob(f"shard-{parallel.rank + 1:05d}-*")}

            def finish() -> None:
                files = {name: entry for share in shards for name, entry in share.items()}
                files |= {name: checksum(path / name) for name in (CONFIG, STATE)}
                assert set(files) == {file.name for file in path.iterdir()}
                (path / CHECKSUMS).write_text(json.dumps(files))
                stack.close()
                (target.parent.parent / SAVED_MARKER).touch()
                if self._keep_last:
                    self._remove_old_checkpoints(target)

            try:
                parallel.together(check, group)
                path = parallel.from_main(begin, group)
                shards = parallel.together(write_shards, group)
                parallel.from_main(finish, group)
            except UserError as error:
                raise UserError(f"checkpoint {target} could not be written: {error}") from error
        if self._on_saved and parallel.is_main:
            self._on_saved(target)  # the other processes do not wait for it

    def _remove_old_checkpoints(self, newest: Path) -> None:
        checkpoints = [path for path in sorted(newest.parent.glob("step-*"), reverse=True) if path.name <= newest.name]
        for old in checkpoints[self._keep_last :]:
            if old not in self._protected:
                # Renamed first, so that no half of a checkpoint is ever left; leftovers are removed at the next start.
                shutil.rmtree(old.rename(old.with_name(f".tmp-{old.name}")), ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """Read the ``state.json`` of a checkpoint.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        state = json.loads((path / STATE).read_bytes())
        valid = {key: type(state[key]) is expected for key, expected in _STATE_TYPES.items()}
        valid |= {key: valid[key] and state[key] >= minimum for key, minimum in (("step", 0), ("global_batch", 1))}
        identity = state.get("identity", {})  # earlier versions did not write it
        valid["identity"] = type(identity) is dict and all(type(part) is dict for part in identity.values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: {STATE} is damaged ({type(error).__name__}: {error})") from error
    for key, is_valid in valid.items():
        if not is_valid:
            raise UserError(f"checkpoint {path}: {STATE} is damaged: '{key}' is missing or invalid")
    return state


def read_task_name(path: Path) -> str:
    """Read the name of the task that a checkpoint was trained on; empty in checkpoints of earlier versions.

    Raises:
        UserError: The state is damaged.
    """
    try:
        return str(json.loads((path / STATE).read_bytes()).get("task", ""))
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"checkpoint {path}: {STATE} is damaged ({type(error).__name__}: {error})") from error


def divergence_advice(folder: Path) -> str:
    """Say what to do after a training has diverged, and which checkpoint in ``folder`` is the last good one."""
    newest = max((path.name for path in folder.glob("step-*")), default=None)
    if newest is None:
        return "There is no checkpoint yet: check the data, lower blr or set clip_grad, and start the run again"
    return (
        f"The last good checkpoint is {folder / newest}, from which the same command continues: check the data first, "
        "or lower blr or set clip_grad, with --allow_changes"
    )


def remove_unfinished(folder: Path) -> None:
    """Remove the leftovers of checkpoints that a killed process was writing or removing."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def tensors_to_save(model: nn.Module, optimizer: torch.optim.Optimizer, average: ema.EMA | None) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name; a tied parameter has one name."""
    states = {
        f"{OPTIMIZER}{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }
    averages = {EMA + name: value for name, value in average.average.items()} if average else {}
    return _model_tensors(model) | averages | states


def load_tensors(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, average: ema.EMA | None
) -> None:
    """Load weights, their moving average and the optimizer state in place; all processes must call this.

    Args:
        path: The checkpoint.
        optimizer: The optimizer whose state is loaded, unless the checkpoint is of another one; None loads no state.
        average: The moving average to load; starts from the weights if the checkpoint has none.

    Raises:
        UserError: The checkpoint is of another model.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    stored = read_metadata(path)
    tensors = _model_tensors(model)
    has_average = any(name.startswith(EMA) for name in stored)
    if average and has_average:
        tensors |= {EMA + name: value for name, value in average.average.items()}
    if optimizer is not None:
        tensors |= _allocate_states(model, optimizer, stored)
    expected = {name for name in stored if not name.startswith((OPTIMIZER, EMA))}
    own = {name for name in tensors if name.startswith(MODEL)}
    differences = [f"it has no {name}" for name in sorted(own - expected)]
    differences += [f"the model has no {name}" for name in sorted(expected - own)]
    differences += [
        f"{name} has shape {tuple(stored[name].size)}, not {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in stored and stored[name].size != tensor.shape
    ]
    if differences:
        raise UserError(f"checkpoint {path} does not fit this configuration: {'; '.join(differences[:3])}")
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    if average and not has_average:
        for name, tensor in average.tensors.items():
            average.average[name].copy_(tensor.detach())


def _allocate_states(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Container[str]) -> dict[str, Tensor]:
    """Give the optimizer zeros for the states that a checkpoint has, and return them by their names in it."""
    tensors = {}
    algorithms = {p: group["algorithm"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        for key in _STATES[algorithms[parameter]]:
            full_name = f"{OPTIMIZER}{name}/{key}"
            if full_name in stored:
                state = torch.zeros_like(parameter, requires_grad=False)
                tensors[full_name] = torch.zeros((), device=parameter.device) if key == "step" else state
                optimizer.state[parameter][key] = tensors[full_name]
    return tensors


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {MODEL + name: tensor.detach() for name, tensor in tensors.items()}
