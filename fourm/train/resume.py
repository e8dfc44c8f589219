"""Where a run goes on: which checkpoint, and what of it still holds if the processes are others now."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fourm.data.unified_datasets import draws_in_epoch
from fourm.train.checkpoint import STATE, complete_checkpoints, load_checkpoint, read_state
from fourm.train.config import TrainConfig
from fourm.train.loop import Trainer
from fourm.utils.errors import UserError

log = logging.getLogger("fourm")


def find_checkpoint(config: TrainConfig, folder: Path) -> Path | None:
    """With ``auto_resume`` the newest checkpoint of this run, else the one that ``resume`` names (itself, or a run folder).

    Raises:
        UserError: ``resume`` names none, or a new run would mix with the checkpoints of an old one in ``folder``.
    """
    if config.eval and config.finetune:
        return None  # these are the weights to evaluate
    own = complete_checkpoints(folder)
    if own and config.auto_resume:
        return own[0]
    if own and not (config.eval or config.dry_run):
        raise UserError(
            f"{folder} holds {own[0].name} of an earlier run: use --auto_resume to go on with it, or another output_dir"
        )
    if not config.resume:
        return None
    named = Path(config.resume)
    found = [named] if (named / STATE).exists() else complete_checkpoints(named / "checkpoints")
    if not found:
        raise UserError(f"'resume': {named} is no checkpoint, and no run folder with checkpoints")
    return found[0]


def restore(trainer: Trainer, path: Path) -> dict[int, int]:
    """Continue from a checkpoint: weights, optimizer, step, positions in the data, the open interval of the log.

    Returns:
        Draws of every stream in the epoch of the next batch, for ``build_train_loader``.

    Raises:
        UserError: it is damaged, or of another model or global batch size.
    """
    config, parallel = trainer.config, trainer.parallel
    state = read_state(path)
    global_batch = config.batch_size * config.accum_iter * parallel.world_size
    if state["global_batch"] != global_batch:
        raise UserError(
            f"checkpoint {path} was made with {state['global_batch']} samples per optimizer step, not {global_batch}: "
            "choose batch_size x accum_iter x processes accordingly"
        )
    load_checkpoint(path, trainer.model, trainer.optimizer)
    trainer.step = state["step"]
    trainer.gradient_step.load_state(state["loss_scale"])
    layout = layout_of(trainer)
    if state["layout"] != layout:
        log.warning("checkpoint %s: made with %s, now %s: this epoch's data begin anew", path, state["layout"], layout)
        return {}
    ranks = state["ranks"]
    own = ranks[parallel.rank]
    trainer.interval.load_state(own["interval"])
    trainer.positions = {position["stream"]: position for position in own["positions"]}
    epoch = trainer.step * config.accum_iter // trainer.schedule.length.batches_per_epoch
    return draws_in_epoch((position for rank in ranks for position in rank["positions"]), epoch)


def layout_of(trainer: Trainer) -> dict[str, int]:
    """What the positions in the data depend on."""
    config = trainer.config
    workers = max(1, config.num_workers)
    return {"processes": trainer.parallel.world_size, "num_workers": workers, "batch_size": config.batch_size}


def state_of(trainer: Trainer) -> dict[str, Any]:
    """The state that :func:`restore` reads; all processes must call it."""
    config, parallel = trainer.config, trainer.parallel
    own = {"positions": list(trainer.positions.values()), "interval": trainer.interval.state()}
    return {
        "global_batch": config.batch_size * config.accum_iter * parallel.world_size,
        "layout": layout_of(trainer),
        "loss_scale": trainer.gradient_step.state(),
        "ranks": parallel.gather(own),
    }
