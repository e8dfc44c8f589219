"""Resuming: which checkpoint a run continues from, and what it restores if the number of processes has changed."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from fourm.data.unified_datasets import draws_in_epoch
from fourm.train.checkpoint import SAVED_MARKER, load_tensors, read_state
from fourm.train.config import RunConfig
from fourm.train.options import saved_options
from fourm.train.parallel import Processes
from fourm.train.run_copy import RunCopy, fetch_if_remote
from fourm.train.same_run import check_same_run, check_same_vocabulary
from fourm.train.step import Trainer
from fourm.utils import model_store
from fourm.utils.checkpoints import CHECKSUMS, WEIGHTS, complete_checkpoints, verify
from fourm.utils.errors import UserError

log = logging.getLogger("fourm")


def find_checkpoint(config: RunConfig, folder: Path, copy: RunCopy, parallel: Processes) -> Path | None:
    """Return the checkpoint to continue from, or None for a new run; all processes must call this.

    With ``auto_resume`` it is the newest intact checkpoint of this run. If there is none, it is the checkpoint that
    ``resume`` names, or the newest intact one of the run folder that it names.

    Args:
        folder: The folder of the checkpoints of this run.
        copy: The copy of this run in a store; a newer checkpoint there is fetched.

    Raises:
        UserError: ``resume`` names no checkpoint, all are damaged, or a new run would mix with the checkpoints of an
            old one.
    """
    candidates = parallel.from_main(lambda: _candidates(config, folder, copy))
    for place in candidates:
        path = Path(fetch_if_remote(place, model_store.find_checkpoint, config, parallel))
        share = slice(parallel.rank, None, parallel.world_size)  # of the files whose checksums are computed
        try:
            parallel.together(partial(verify, path, share))
            return path
        except UserError as error:
            if parallel.is_main:
                log.warning("%s; trying the checkpoint before it", error)
    if candidates:
        raise UserError(f"all checkpoints in {path.parent} are damaged; choose another output_dir to start a new run")
    return None


def _candidates(config: RunConfig, folder: Path, copy: RunCopy) -> list[str]:
    """Return the paths of the checkpoints to try, newest first, or the URL that ``resume`` names."""
    if config.eval and config.finetune:
        return []  # finetune names the weights to evaluate
    own = complete_checkpoints(folder)
    newer = copy.newer_checkpoints(own[0].name if own else "")
    if newer and config.auto_resume and not config.dry_run:
        copy.fetch(newer)
        own = complete_checkpoints(folder)
        if not own:
            raise UserError(f"all checkpoints in {copy.url} are damaged; choose another run_name to start a new run")
    elif newer and not (config.eval or config.dry_run):
        raise UserError(
            f"{newer[0]} belongs to an earlier run: set --auto_resume to continue it, or choose another run_name"
        )
    if own and config.auto_resume:
        return [str(path) for path in own]
    if own and not (config.eval or config.dry_run):
        raise UserError(
            f"{folder} holds {own[0].name} of an earlier run: set --auto_resume to continue it, or choose another "
            "output_dir"
        )
    if not config.resume:
        if not own and any(folder.glob("step-*")):
            raise UserError(f"all checkpoints in {folder} are damaged; choose another output_dir to start a new run")
        leftovers = [name for name in (WEIGHTS, SAVED_MARKER) if (folder.parent / name).exists()]
        if leftovers and not (config.eval or config.dry_run):
            raise UserError(
                f"{folder.parent} holds {'the model' if leftovers[0] == WEIGHTS else 'the log'} of an earlier run "
                "whose checkpoints were removed, and a new run would overwrite it: choose another output_dir"
            )
        return []
    if config.resume.startswith("s3://"):
        return [config.resume]
    named = Path(config.resume)
    if finished_model(config, named):
        return []
    checkpoints = [named] if (named / CHECKSUMS).exists() else complete_checkpoints(named / "checkpoints")
    if not checkpoints:
        raise UserError(f"'resume': {named} is neither a checkpoint nor a run folder with checkpoints")
    return [str(path) for path in checkpoints]


def finished_model(config: RunConfig, folder: Path) -> str:
    """Return the run folder ``folder`` if its finished model is to be evaluated, because it has no checkpoints."""
    has_only_model = (folder / WEIGHTS).exists() and not any(folder.glob("checkpoints/step-*"))
    return str(folder) if config.eval and has_only_model else ""


def restore(trainer: Trainer, path: Path, identity: dict[str, Any]) -> dict[int, int]:
    """Continue from a checkpoint: weights, optimizer, step, positions in the data, the open interval of the log.

    Args:
        identity: The result of :meth:`Task.identity`.

    Returns:
        ``draws_by_stream`` in the epoch of the next batch, for :meth:`Task.train_batches`.

    Raises:
        UserError: The checkpoint is of another model or global batch size, or the configuration has changed.
    """
    config, parallel = trainer.config, trainer.parallel
    state = read_state(path)
    if state["global_batch"] != trainer.samples_per_step:
        raise UserError(
            f"checkpoint {path} was made with {state['global_batch']} samples per optimizer step, not "
            f"{trainer.samples_per_step}; change batch_size, accum_iter or the number of processes so that their "
            "product is the same"
        )
    load_tensors(path, trainer.model, trainer.optimizer, trainer.ema)
    parallel.from_main(lambda: check_same_run(config, state, identity, path))
    trainer.step = state["step"]
    try:
        return _restore_position(trainer, state, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"checkpoint {path}: state.json is damaged ({type(error).__name__}: {error})") from error


def restore_weights(trainer: Trainer, path: Path, identity: dict[str, Any]) -> int:
    """Load only the weights of a checkpoint and their moving average, for an evaluation, which may have other options.

    Returns:
        The epoch of the last step of the checkpoint.

    Raises:
        UserError: The checkpoint is of another model or vocabulary.
    """
    state = read_state(path)
    check_same_vocabulary(trainer.config, state, identity, path)
    load_tensors(path, trainer.model, None, trainer.ema)
    trainer.step = state["step"]
    steps = state["config"].get("epoch_size", 0) // max(state["global_batch"], 1)
    return max(trainer.step - 1, 0) // max(steps, 1)


def _restore_position(trainer: Trainer, state: dict[str, Any], path: Path) -> dict[int, int]:
    config, parallel = trainer.config, trainer.parallel
    trainer.gradient_step.load_state(state["loss_scale"])
    layout, ranks = data_layout(trainer), state["ranks"]
    if [*state["layout"].values()] != [*layout.values()]:  # earlier versions had another name for num_streams
        if trainer.step * config.accum_iter % trainer.schedule.length.batches_per_epoch == 0:
            effect = "the coming epochs draw their samples in another order"
        else:
            effect = "this epoch's data begin anew: some of its samples come twice, and others not at all"
        log.warning("checkpoint %s: made with %s, now %s: %s", path, state["layout"], layout, effect)
        return {}
    if len(ranks) == parallel.world_size:
        trainer.interval.load_state(ranks[parallel.rank]["interval"])
    positions = [position for rank in ranks for position in rank["positions"]]
    # Rank r reads the streams r, r + world_size, ...
    trainer.positions = {p["stream"]: p for p in positions if p["stream"] % parallel.world_size == parallel.rank}
    epoch = trainer.step * config.accum_iter // trainer.schedule.length.batches_per_epoch
    return draws_in_epoch(positions, epoch)


def data_layout(trainer: Trainer) -> dict[str, int]:
    """Return the options that the positions in the data depend on."""
    config = trainer.config
    return {"num_streams": config.streams(trainer.parallel.world_size), "batch_size": config.batch_size}


def state_to_save(trainer: Trainer, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``state.json``, which :func:`restore` reads; all processes must call this.

    Returns:
        * ``task``: The name of the task.
        * ``step``: The number of finished steps.
        * ``config``: The configuration of the run.
        * ``identity``: The result of :meth:`Task.identity`.
        * ``facts``: The result of :meth:`Task.facts`, for the model card.
        * ``losses``: The names of the task's losses; other figures of an evaluation are metrics.
        * ``global_batch``: The number of samples per step.
        * ``layout``: The options that the positions in the data depend on.
        * ``loss_scale``: The state of the loss scale.
        * ``ranks``: For each rank, ``positions`` in the data and the open ``interval`` of the log.
    """
    rank_state = {"positions": list(trainer.positions.values()), "interval": trainer.interval.state()}
    return {
        "task": trainer.task.name,
        "step": trainer.step,
        "config": saved_options(trainer.config),
        "identity": identity,
        "facts": trainer.task.facts(),
        "losses": list(trainer.task.losses),
        "global_batch": trainer.samples_per_step,
        "layout": data_layout(trainer),
        "loss_scale": trainer.gradient_step.state(),
        "ranks": trainer.parallel.gather(rank_state),
    }
