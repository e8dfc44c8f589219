"""A run from its configuration to its last checkpoint: build, resume, train, evaluate, save, export."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import warnings
from pathlib import Path

import torch
import yaml

from fourm.data.batch_loader import BatchIterator
from fourm.train.checkpoint import CheckpointWriter, remove_unfinished
from fourm.train.config import RunConfig, parse_args
from fourm.train.coordinator import Coordinator
from fourm.train.facts import export_with_facts
from fourm.train.finetune import load_weights
from fourm.train.journal import JOURNAL_FILES, Journal, run_logging
from fourm.train.loop import TrainingLoop, evaluate_all
from fourm.train.optimizer import build_optimizer
from fourm.train.options import saved_options
from fourm.train.parallel import Strategy
from fourm.train.plan import format_plan, plan_run
from fourm.train.profiling import profiler
from fourm.train.resume import find_checkpoint, finished_model, restore, restore_weights
from fourm.train.run_copy import RunCopy, fetch_if_remote
from fourm.train.schedules import RunLength, build_schedule, run_length
from fourm.train.signals import StopSignals
from fourm.train.step import Trainer
from fourm.train.task import Task
from fourm.utils.checkpoints import check_export
from fourm.utils.errors import UserError, sanitize
from fourm.utils.files import atomic_path, lock_folder
from fourm.utils.memory import keep_freed_memory
from fourm.utils.model_store import find_model
from fourm.utils.plugin import load_plugin

log = logging.getLogger("fourm")


def main(task: type[Task], strategy: type[Strategy], argv: list[str] | None = None) -> int:
    """Run the command line of a training script; see :func:`train`."""
    summary = (task.__doc__ or "").partition("\n")[0]
    return train(task, parse_args(task.config_class, argv, summary), strategy)


def train(task_class: type[Task], config: RunConfig, strategy: type[Strategy]) -> int:
    """Train, evaluate, plan or do a dry run, as ``config`` says.

    Args:
        task_class: The class of what is trained.
        config: The configuration, of the class ``task_class.config_class``.
        strategy: The class of how several processes share the work.

    Returns:
        The exit status: 0; 128 + the number of the signal that stopped the run, after a checkpoint; 1 if another
        process of the run has died.

    Raises:
        UserError: A configuration, file or sample cannot be used.
    """
    load_plugin(config.plugin)
    if config.plan:
        task = task_class(config)
        print(sanitize(format_plan(task, plan_run(task, task.build_model()))))
        return 0
    parallel = strategy(config)
    _set_up_process(config, parallel.device)
    with run_logging(config, parallel.is_main):
        if parallel.is_main:
            _warn_about_restarts()
        try:
            run = Run(task_class(config), parallel)
            if config.dry_run:
                status = run.dry_run()
            else:
                status = run.evaluate_only() if config.eval else run.train()
        except (OSError, RuntimeError) as error:
            if not parallel.is_peer_failure(error):
                raise
            reason = " ".join(str(error).split())[:200]
            log.error(
                "rank %d stops because another process has died (%s); start the run again to continue from its newest "
                "checkpoint",
                parallel.rank,
                reason,
            )
            return 1  # without closing the process group, which would wait for the other processes
    parallel.close()
    return status


class Run:
    """The part of a run that one process does: what it needs is built and restored, and then one of the methods called.

    Attributes:
        folder, checkpoints: The run folder, and the folder of the checkpoints in it.
        evaluations: What is evaluated.
        run_copy: The copy of the run folder in an object store.
        trainer: The model, and everything else that a step needs.
    """

    def __init__(self, task: Task, parallel: Strategy):
        config: RunConfig = task.config
        self.task, self.parallel, self.config = task, parallel, config
        self.folder = Path(config.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        length = run_length(config, parallel.world_size)
        if not config.eval:
            config.streams(parallel.world_size)  # raises its error before anything is loaded
        share = (parallel.rank, parallel.world_size) if config.dist_eval else (0, 1)
        self.evaluations = task.evaluations(*share, parallel.is_main)
        self.run_copy = RunCopy(config, config.keep_last)
        self._checkpoint = find_checkpoint(config, self.checkpoints, self.run_copy, parallel)
        self._identity = parallel.from_main(task.identity)
        self._weights = ""  # that are loaded if there is no checkpoint; empty for new ones
        if not self._checkpoint:
            self._weights = config.finetune or finished_model(config, Path(config.resume or self.folder))
        self.trainer = self._build_trainer(length)
        self._checkpoint_epoch, self._draws_by_stream = 0, dict[int, int]()
        self._restore()
        self._log_overview(length)

    def _build_trainer(self, length: RunLength) -> Trainer:
        config, task, parallel = self.config, self.task, self.parallel
        model = task.build_model()
        if config.compile:
            task.compile(model)
        torch.manual_seed(config.seed)
        parallel.materialise(model, task.parts(model), task.model_name)
        if self._weights:
            weights = fetch_if_remote(self._weights, find_model, config, parallel)
            load_weights(model, weights, task.format, task.select_weights)
        schedule = build_schedule(config, length, parallel.world_size)
        step = config.start_epoch * (length.batches_per_epoch // config.accum_iter)
        optimizer = build_optimizer(model, config, task.blocks(model), parallel)
        return Trainer(config, task, parallel, model, optimizer, schedule, step)

    def _restore(self) -> None:
        """Load the checkpoint, if there is one; of an evaluation, only the weights."""
        if self._checkpoint and self.config.eval:
            self._checkpoint_epoch = restore_weights(self.trainer, self._checkpoint, self._identity)
        elif self._checkpoint:
            self._draws_by_stream = restore(self.trainer, self._checkpoint, self._identity)
        elif self.config.eval:
            self.trainer.ema = None  # it would be the same weights again

    def _log_overview(self, length: RunLength) -> None:
        config, trainer, schedule = self.config, self.trainer, self.trainer.schedule
        self.task.describe()
        counts = self.task.count_parameters(trainer.model)
        weights = f"resumed from {self._checkpoint}" if self._checkpoint else self._weights or "new weights"
        log.info("%s; %s", ", ".join(f"{count:,} parameters of the {name}" for name, count in counts.items()), weights)
        steps = f"{length.epochs} epochs of {trainer.steps_per_epoch} steps = {trainer.total_steps} steps"
        factors = f"{self.parallel.world_size} x batch_size {config.batch_size} x accum_iter {config.accum_iter}"
        log.info("%s of %d samples (%s), from step %d", steps, trainer.samples_per_step, factors, trainer.step)
        precision = f"{config.opt} in {config.autocast_dtype} on {self.parallel.device}"
        warmup = f"lr up to {schedule.peak_lr:.3g}, warm-up {length.warmup_batches} batches"
        log.info("%s, %s; run folder %s", warmup, precision, self.folder)

    def _batches(self) -> BatchIterator:
        """Return the training batches from the current step on."""
        config, parallel = self.config, self.parallel
        loader = self.task.train_batches(
            parallel.rank,
            parallel.world_size,
            self.trainer.schedule.length.batches_per_epoch,
            self.trainer.step * config.accum_iter,
            self._draws_by_stream,
            pin_memory=config.pin_mem and parallel.device.type == "cuda",
        )
        return iter(loader)

    def dry_run(self) -> int:
        """Do one step, log its results and write nothing; return the exit status."""
        coordinator = Coordinator(self.parallel, self.config.data_timeout)
        with contextlib.closing(self._batches()) as batches:
            micro_batches, _ = coordinator.fetch(batches, self.config.accum_iter, contextlib.nullcontext, False)
            self.trainer.train_step(micro_batches)
        means = self.trainer.interval.means(self.parallel)
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in means.losses.items())
        log.info("dry run: one step, loss %.4f, gradient norm %.3g; %s", means.loss, means.grad_norm, losses)
        return 0

    def evaluate_only(self) -> int:
        """Evaluate the weights without training; return the exit status."""
        if not self.evaluations:
            raise UserError("nothing to evaluate: the data configuration declares no validation sets")
        if not self._checkpoint and not self._weights:
            raise UserError(
                f"no weights to evaluate: {self.checkpoints} holds no checkpoint; set finetune or resume to name "
                "weights"
            )
        trainer = self.trainer
        journal = Journal(self.config, trainer.step, trainer.total_steps, self.parallel.is_main)
        results = evaluate_all(trainer, self.evaluations, Coordinator(self.parallel, self.config.data_timeout))
        journal.evaluation(trainer.step, self._checkpoint_epoch, results)
        journal.close()
        return 0

    def train(self) -> int:
        """Train until the last step or until a signal; return the exit status."""
        config, trainer, parallel, run_copy = self.config, self.trainer, self.parallel, self.run_copy
        if trainer.step > trainer.total_steps or not trainer.total_steps:
            raise UserError(
                f"nothing to train: the run has {trainer.total_steps} steps and would continue after step "
                f"{trainer.step}; raise epochs or total_tokens"
            )
        parallel.from_main(self._claim_folder)
        on_saved, keep_last = run_copy.copy_checkpoint, config.keep_last
        writer = CheckpointWriter(self.checkpoints, parallel, keep_last, config.async_save, on_saved, run_copy.pending)
        journal = Journal(config, trainer.step, trainer.total_steps, parallel.is_main)
        parallel.from_main(self._write_config)
        traced_folder = self.folder if config.profile and parallel.is_main else None
        with StopSignals() as signals, profiler(traced_folder, trainer.interval) as end_profiled_step:
            coordinator = Coordinator(parallel, config.data_timeout, signals)
            loop = TrainingLoop(trainer, self.evaluations, self._identity, coordinator, journal, writer)
            loop.run(self._batches, end_profiled_step)
            writer.wait()  # still inside StopSignals: another signal must not end it half-way
            parallel.from_main(run_copy.wait)
        journal.close()
        if coordinator.stop_signal:
            log.info("stopped at step %d; the same command goes on from there", trainer.step)
            return 128 + coordinator.stop_signal
        last = self.checkpoints / f"step-{trainer.step:08d}"
        if not parallel.from_main(last.exists):
            loop.save()  # the run was resumed from the last checkpoint of another run
            writer.wait()
        parallel.from_main(lambda: self._export(last))
        log.info("finished: the model is in %s; load it with from_pretrained('%s')", self.folder, self.folder)
        return 0

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock_folder(self.folder)
        check_export(self.folder, self.task.format)  # raises its error now rather than after the training
        remove_unfinished(self.checkpoints)

    def _write_config(self) -> None:
        with atomic_path(self.folder / "config.yaml") as path:
            path.write_text(yaml.safe_dump(saved_options(self.config), sort_keys=False))
        self.run_copy.copy("config.yaml")  # raises its error now if the store cannot be written to

    def _export(self, checkpoint: Path) -> None:
        export_with_facts(checkpoint, self.folder, self.task.format)
        if self.config.model_ema:
            export_with_facts(checkpoint, self.folder / "ema", self.task.format, ema=True)
        self.run_copy.complete(checkpoint)
        ema_folder = ["ema"] if self.config.model_ema else []
        self.run_copy.copy("config.json", "model.safetensors", *ema_folder, *JOURNAL_FILES)


def _warn_about_restarts() -> None:
    """Warn if torchrun may restart processes that then find the addresses of an earlier attempt in its store."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        log.warning(
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun; otherwise the processes that it restarts may "
            "fail to connect"
        )


def _set_up_process(config: RunConfig, device: torch.device) -> None:
    if not config.show_user_warnings:
        warnings.filterwarnings("ignore", category=UserWarning)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < config.rlimit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(config.rlimit, hard), hard))
    if device.type == "cpu":
        keep_freed_memory()
