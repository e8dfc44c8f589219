"""Checkpoints without a run."""

from __future__ import annotations

from pathlib import Path

from fourm.models import FM
from fourm.train.checkpoint import CheckpointWriter, tensors_to_save
from fourm.train.ema import EMA
from fourm.train.optimizer import build_optimizer
from fourm.train.parallel import DDP
from fourm.train.tasks.pretrain import PretrainConfig


def write_checkpoint(folder: Path, step: int, model: FM, ema: EMA | None = None, keep_last: int = 0) -> Path:
    config = PretrainConfig(epochs=1, device="cpu")
    writer = CheckpointWriter(folder, DDP(config), keep_last, background=False)
    writer.save(step, model.config, tensors_to_save(model, build_optimizer(model, config), ema), {"step": step})
    return folder / f"step-{step:08d}"
