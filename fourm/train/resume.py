"""Where a run goes on: which checkpoint, and what of it still holds if the processes are others now."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fourm.data.unified_datasets import draws_in_epoch
from fourm.train.checkpoint import SAVED, load_tensors, read_state
from fourm.train.config import RunConfig
from fourm.train.loop import Trainer
from fourm.train.options import saved_options
from fourm.train.parallel import Processes
from fourm.train.run_copy import RunCopy, fetched
from fourm.train.same_run import check_same_meaning, check_same_run
from fourm.utils import model_store
from fourm.utils.checkpoints import CHECKSUMS, WEIGHTS, complete_checkpoints, verify
from fourm.utils.errors import UserError

log = logging.getLogger("fourm")


def find_checkpoint(config: RunConfig, folder: Path, copy: RunCopy, parallel: Processes) -> Path | None:
    """With ``auto_resume`` the newest intact checkpoint of this run, else that of ``resume`` (itself, or a run folder).

    Args:
        copy: of this run in a store; a checkpoint that is only there is fetched.

    Raises:
        UserError: ``resume`` names none, all are damaged, or a new run would mix with the checkpoints of an old one.
    """
    candidates = parallel.from_main(lambda: _candidates(config, folder, copy))
    for place in candidates:
        path = Path(fetched(place, model_store.find_checkpoint, config, parallel))
        try:
            # The checksums are the work of all processes.
            parallel.together(lambda path=path: verify(path, slice(parallel.rank, None, parallel.world_size)))  # type: ignore[misc]
            return path
        except UserError as error:
            if parallel.is_main:
                log.warning("%s; passed over", error)
    if candidates:
        raise UserError(f"{path.parent} has only damaged checkpoints; to start anew choose another output_dir")
    return None


def _candidates(config: RunConfig, folder: Path, copy: RunCopy) -> list[str]:
    """Newest first: paths, or what ``resume`` names in a store."""
    if config.eval and config.finetune:
        return []  # these are the weights to evaluate
    own = complete_checkpoints(folder)
    newer = copy.newer_checkpoints(own[0].name if own else "")
    if newer and config.auto_resume and not config.dry_run:
        copy.fetch(newer)
        own = complete_checkpoints(folder)
        if not own:
            raise UserError(f"{copy.url} has only damaged checkpoints; to start anew choose another run_name")
    elif newer and not (config.eval or config.dry_run):
        raise UserError(f"{newer[0]} is of an earlier run: use --auto_resume to go on with it, or another run_name")
    if own and config.auto_resume:
        return [str(path) for path in own]
    if own and not (config.eval or config.dry_run):
        raise UserError(
            f"{folder} holds {own[0].name} of an earlier run: use --auto_resume to go on with it, or another output_dir"
        )
    if not config.resume:
        if not own and any(folder.glob("step-*")):
            raise UserError(f"{folder} has only damaged checkpoints; to start anew choose another output_dir")
        left = [name for name in (WEIGHTS, SAVED) if (folder.parent / name).exists()]
        if left and not (config.eval or config.dry_run):
            raise UserError(
                f"{folder.parent} holds {'the model' if left[0] == WEIGHTS else 'the log'} of an earlier run whose checkpoints "
                "were removed: choose another output_dir to start anew, which would overwrite it"
            )
        return []
    if config.resume.startswith("s3://"):
        return [config.resume]
    named = Path(config.resume)
    if config.eval and finished_model(config, named):
        return []
    found = [named] if (named / CHECKSUMS).exists() else complete_checkpoints(named / "checkpoints")
    if not found:
        raise UserError(f"'resume': {named} is no checkpoint, and no run folder with checkpoints")
    return [str(path) for path in found]


def finished_model(config: RunConfig, folder: Path) -> Path | None:
    """For an evaluation: the run folder ``folder`` if it holds a finished model, but no checkpoint any more."""
    there = config.eval and (folder / WEIGHTS).exists() and not any(folder.glob("checkpoints/step-*"))
    return folder if there else None


def restore(trainer: Trainer, path: Path, identity: dict[str, Any]) -> dict[int, int]:
    """Continue from a checkpoint: weights, optimizer, step, positions in the data, the open interval of the log.

    Args:
        identity: :meth:`Task.identity`.

    Returns:
        Draws of every stream in the epoch of the next batch, for :meth:`Task.train_batches`.

    Raises:
        UserError: it is of another model or global batch size, or something else has changed.
    """
    config, parallel = trainer.config, trainer.parallel
    state = read_state(path)
    global_batch = config.batch_size * config.accum_iter * parallel.world_size
    if state["global_batch"] != global_batch:
        raise UserError(
            f"checkpoint {path} was made with {state['global_batch']} samples per optimizer step, not {global_batch}: "
            "choose batch_size x accum_iter x processes accordingly"
        )
    load_tensors(path, trainer.model, trainer.optimizer, trainer.ema)
    parallel.from_main(lambda: check_same_run(config, state, identity, path))
    trainer.step = state["step"]
    try:
        return _restore_position(trainer, state, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"checkpoint {path}: state.json is damaged ({type(error).__name__}: {error})") from error


def restore_weights(trainer: Trainer, path: Path, identity: dict[str, Any]) -> int:
    """Of a checkpoint only the weights and their moving average, for an evaluation with other options.

    Returns:
        The epoch of its last step.

    Raises:
        UserError: it is of another model or vocabulary.
    """
    state = read_state(path)
    check_same_meaning(trainer.config, state, identity, path)
    load_tensors(path, trainer.model, None, trainer.ema)
    trainer.step = state["step"]
    steps = state["config"].get("epoch_size", 0) // max(state["global_batch"], 1)
    return max(trainer.step - 1, 0) // max(steps, 1)


def _restore_position(trainer: Trainer, state: dict[str, Any], path: Path) -> dict[int, int]:
    config, parallel = trainer.config, trainer.parallel
    trainer.gradient_step.load_state(state["loss_scale"])
    layout, ranks = layout_of(trainer), state["ranks"]
    if [*state["layout"].values()] != [*layout.values()]:  # num_streams had another name once
        if trainer.step * config.accum_iter % trainer.schedule.length.batches_per_epoch == 0:
            kept = "the epochs to come draw their samples in another order"
        else:
            kept = "this epoch's data begin anew: some of its samples come twice, and others not at all"
        log.warning("checkpoint %s: made with %s, now %s: %s", path, state["layout"], layout, kept)
        return {}
    if len(ranks) == parallel.world_size:
        trainer.interval.load_state(ranks[parallel.rank]["interval"])
    positions = [position for rank in ranks for position in rank["positions"]]
    # Rank r reads the streams r, r + world_size, ...
    trainer.positions = {p["stream"]: p for p in positions if p["stream"] % parallel.world_size == parallel.rank}
    epoch = trainer.step * config.accum_iter // trainer.schedule.length.batches_per_epoch
    return draws_in_epoch(positions, epoch)


def layout_of(trainer: Trainer) -> dict[str, int]:
    """What the positions in the data depend on."""
    config = trainer.config
    return {"num_streams": config.streams(trainer.parallel.world_size), "batch_size": config.batch_size}


def state_of(trainer: Trainer, identity: dict[str, Any]) -> dict[str, Any]:
    """The state that :func:`restore` reads; all processes must call it."""
    config, parallel = trainer.config, trainer.parallel
    own = {"positions": list(trainer.positions.values()), "interval": trainer.interval.state()}
    return {
        "task": trainer.task.name,
        "step": trainer.step,
        "config": saved_options(config),
        "identity": identity,
        "global_batch": config.batch_size * config.accum_iter * parallel.world_size,
        "layout": layout_of(trainer),
        "loss_scale": trainer.gradient_step.state(),
        "ranks": parallel.gather(own),
    }
