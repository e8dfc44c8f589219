"""Checkpoints: folders that are there completely or not at all, in formats that run no code when they are read.

``checkpoints/step-00001234/`` is the same whatever the strategy and the number of processes. It holds

* ``shard-*.safetensors``: from every process the tensors, or parts of them, that it had to write: ``model/PARAMETER``,
  ``ema/PARAMETER`` and ``optimizer/PARAMETER/STATE``
* ``config.json``: of the model
* ``state.json``: the step, the position in the data of every rank, the state of the log, the configuration of the run
* ``checksums.json``: of all of these

Nothing of a random generator is kept: all randomness of a step derives from the seed and the number of its batch.
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
from fourm.train.nonfinite import first_not_finite
from fourm.train.parallel import Processes
from fourm.utils.checkpoints import CHECKPOINT_FILES, CHECKSUMS, CONFIG, EMA, MODEL, STATE, checksum, read_metadata
from fourm.utils.errors import UserError
from fourm.utils.files import atomic_folder
from fourm.utils.options import Options, option
from fourm.utils.paths import InputPath

log = logging.getLogger("fourm")
OPTIMIZER = "optimizer/"
_KINDS = (MODEL, EMA, OPTIMIZER)  # each has files of its own, so that weights are read without optimizer states
_STATES = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}
_STATE_TYPES = {"step": int, "config": dict, "global_batch": int, "layout": dict, "loss_scale": list, "ranks": list}
SAVED = ".saved.txt"  # in a run folder: there was a checkpoint once, even if it has been removed


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """Checkpoints"""

    save_ckpt_freq: int = option("save every so many epochs; 0 = only at the end", 1, at_least=0)
    save_every_minutes: float = option("save also after so many minutes; 0 = never", 0.0, at_least=0)
    keep_last: int = option("checkpoints that are kept; 0 = all", 2, at_least=0)
    async_save: bool = option("write checkpoints while the training goes on, from a copy in the host's memory", True)
    auto_resume: bool = option("continue from the newest complete checkpoint in output_dir or s3_save_dir", True)
    resume: InputPath = option("continue from this checkpoint, or the newest of this run: a folder or an s3:// URL", "")
    allow_changes: bool = option(
        "continue from a checkpoint although the data, seed or schedule have changed since", False
    )
    finetune: InputPath = option(
        "start from these weights: a run folder, .safetensors, .pth, s3:// URL of one of these, or a hub id", ""
    )
    start_epoch: int = option(
        "first epoch, when weights come without a checkpoint's position", 0, at_least=0, at_most=10**9
    )


class CheckpointWriter:
    """Writes the checkpoints of a run into ``folder``. All processes make the same calls.

    Args:
        keep_last: Checkpoints that are kept; 0 = all.
        background: Write while the training goes on.
        saved: Called in the main process with each checkpoint that is complete; it returns soon.
        in_use: Old checkpoints that are not removed yet.
    """

    def __init__(
        self, folder: Path, parallel: Processes, keep_last: int, background: bool,
        saved: Callable[[Path], None] | None = None, in_use: Container[Path] = (),
    ):  # fmt: skip
        self._folder, self._parallel, self._keep_last, self._background = folder, parallel, keep_last, background
        self._saved, self._in_use = saved, in_use
        # What the writers have to tell one another must not mix with what the training says meanwhile.
        self._group: Any = parallel.new_group()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None

    def save(self, step: int, config: dict[str, Any], tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to write ``step-…``; the tensors may change as soon as this returns. One at a time: waits for the previous.

        Args:
            config: of the model.
            tensors: name → tensor or, under FSDP, its shard.
            state: of this run, for JSON; the main process's counts.

        Raises:
            UserError: of this checkpoint or the one before: it could not be written, or holds values that are not finite.
        """
        self.wait()
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        copy = DefaultStager(options).stage(tensors)
        self._pending = self._thread.submit(self._write, self._folder / f"step-{step:08d}", config, copy, state)
        if not self._background:
            self.wait()

    def wait(self) -> None:
        """Return when no checkpoint is being written any more.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, target: Path, config: dict[str, Any], tensors: Any, state: dict[str, Any]) -> None:
        parallel, group = self._parallel, self._group
        with contextlib.ExitStack() as stack:

            def check() -> None:
                if name := first_not_finite(tensors.items()):
                    raise UserError(f"{name} holds values that are not finite. {advice(target.parent)}")

            def begin() -> Path:
                path = stack.enter_context(atomic_folder(target, CHECKPOINT_FILES))
                (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
                (path / STATE).write_text(json.dumps(state))
                return path

            def write_shards() -> dict[str, list[int]]:
                kinds = {name: _KINDS.index(name[: name.index("/") + 1]) + 1 for name in tensors}
                writer = dcp.HuggingFaceStorageWriter(str(path), kinds, save_distributed=True)
                try:
                    dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=not parallel.distributed)
                except dcp.CheckpointException as error:  # the first error of any process, in all of them
                    raise next(iter(error.failures.values()))[0] from error
                return {file.name: checksum(file) for file in path.glob(f"shard-{parallel.rank + 1:05d}-*")}

            def finish() -> None:
                files = {name: entry for share in shards for name, entry in share.items()}
                files |= {name: checksum(path / name) for name in (CONFIG, STATE)}
                assert set(files) == {file.name for file in path.iterdir()}
                (path / CHECKSUMS).write_text(json.dumps(files))
                stack.close()
                (target.parent.parent / SAVED).touch()
                before = [old for old in sorted(target.parent.glob("step-*"), reverse=True) if old.name <= target.name]
                for old in before[self._keep_last :] if self._keep_last else ():
                    if old not in self._in_use:
                        # Never half a checkpoint; what cannot be removed now goes at the next start.
                        shutil.rmtree(old.rename(old.with_name(f".tmp-{old.name}")), ignore_errors=True)

            try:
                parallel.together(check, group)
                path = parallel.from_main(begin, group)
                shards = parallel.together(write_shards, group)
                parallel.from_main(finish, group)
            except UserError as error:
                raise UserError(f"checkpoint {target} could not be written: {error}") from error
        if self._saved and parallel.is_main:
            self._saved(target)  # the others do not wait for it


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint.

    Raises:
        UserError: it is not there, or is something else.
    """
    try:
        state = json.loads((path / STATE).read_bytes())
        found = {key: type(state[key]) is kind for key, kind in _STATE_TYPES.items()}
        found |= {key: found[key] and state[key] >= least for key, least in (("step", 0), ("global_batch", 1))}
        identity = state.get("identity", {})  # which earlier versions did not write
        found["identity"] = type(identity) is dict and all(type(part) is dict for part in identity.values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: {STATE} is damaged ({type(error).__name__}: {error})") from error
    if not all(found.values()):
        wrong = next(key for key, right in found.items() if not right)
        raise UserError(f"checkpoint {path}: {STATE} is damaged: it has no proper '{wrong}'")
    return state


def trained_task(path: Path) -> str:
    """The name of the task that a checkpoint is of; empty if its state does not tell it.

    Raises:
        UserError: the state is damaged.
    """
    try:
        return str(json.loads((path / STATE).read_bytes()).get("task", ""))
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"checkpoint {path}: {STATE} is damaged ({type(error).__name__}: {error})") from error


def advice(folder: Path) -> str:
    """What to do when training has diverged, with the last good checkpoint in ``folder``."""
    good = max((path.name for path in folder.glob("step-*")), default=None)
    if good is None:
        return "There is no checkpoint yet: look at the data, lower blr or set clip_grad, and start again"
    return (
        f"The last good checkpoint is {folder / good}, from which the same command goes on: look at the data first, or lower "
        "blr or set clip_grad, with --allow_changes"
    )


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process has left of a checkpoint that it was writing or removing."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def tensors_to_save(model: nn.Module, optimizer: torch.optim.Optimizer, average: ema.EMA | None) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names in it; a tied parameter is there once."""
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

    Of the states of another optimizer none are loaded; without ``optimizer`` none at all.

    A checkpoint without a moving average lets it start from the weights.

    Raises:
        UserError: the checkpoint is of another model.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    known = read_metadata(path)
    tensors = _model_tensors(model)
    if average and any(name.startswith(EMA) for name in known):
        tensors |= {EMA + name: value for name, value in average.average.items()}
    for name, parameter in model.named_parameters():
        for key in () if optimizer is None else _STATES[type(optimizer).__name__]:
            if optimizer is not None and (full := f"{OPTIMIZER}{name}/{key}") in known:
                state = torch.zeros_like(parameter, requires_grad=False)
                tensors[full] = torch.zeros((), device=parameter.device) if key == "step" else state
                optimizer.state[parameter][key] = tensors[full]
    expected = {name for name in known if not name.startswith((OPTIMIZER, EMA))}
    own = {name for name in tensors if name.startswith(MODEL)}
    different = [f"it has no {name}" for name in sorted(own - expected)]
    different += [f"the model has no {name}" for name in sorted(expected - own)]
    different += [
        f"{name} has shape {tuple(known[name].size)}, not {tuple(tensor.shape)}"
        for name, tensor in tensors.items() if name in known and known[name].size != tensor.shape
    ]  # fmt: skip
    if different:
        raise UserError(f"checkpoint {path} does not fit this configuration: {'; '.join(different[:3])}")
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    if average and not any(name.startswith(EMA) for name in known):
        for name, tensor in average.tensors.items():
            average.average[name].copy_(tensor.detach())


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {MODEL + name: tensor.detach() for name, tensor in tensors.items()}
