"""A run from its configuration to its last checkpoint: build, resume, train, evaluate, save, export."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from fourm.data.batch_loader import BatchIterator
from fourm.train.checkpoint import CheckpointWriter, divergence_advice, remove_unfinished, tensors_to_save
from fourm.train.config import RunConfig, parse_args
from fourm.train.coordinator import Coordinator, StopRequested
from fourm.train.device import keep_freed_memory
from fourm.train.evaluate import Results, evaluate
from fourm.train.facts import export_with_facts
from fourm.train.finetune import load_weights
from fourm.train.journal import JOURNAL_FILES, Journal, run_logging
from fourm.train.loop import Trainer
from fourm.train.optimizer import build_optimizer
from fourm.train.options import saved_options
from fourm.train.parallel import Strategy
from fourm.train.plan import format_plan, plan_run
from fourm.train.profiling import profiler
from fourm.train.resume import find_checkpoint, finished_model, restore, restore_weights, state_to_save
from fourm.train.run_copy import RunCopy, fetch_if_remote
from fourm.train.schedules import build_schedule, run_length
from fourm.train.signals import StopSignals
from fourm.train.task import Evaluation, Task
from fourm.utils.checkpoints import check_export
from fourm.utils.errors import UserError, sanitize
from fourm.utils.files import atomic_path, lock_folder
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
    """The part of a run that one process does.

    Attributes:
        folder, checkpoints: The run folder, and the folder of the checkpoints in it.
        length: The length of the run and its phases in micro-batches.
        total_steps, steps_per_epoch: The same in optimizer steps.
        evaluations: What is evaluated.
        run_copy: The copy of the run folder in an object store.
        trainer: The model, and everything else that a step needs.
    """

    def __init__(self, task: Task, parallel: Strategy):
        config: RunConfig = task.config
        self.task, self.parallel, self.config = task, parallel, config
        self.folder = Path(config.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.length = run_length(config, parallel.world_size)
        self.total_steps = self.length.total_batches // config.accum_iter
        self.steps_per_epoch = self.length.batches_per_epoch // config.accum_iter
        if not config.eval:
            config.streams(parallel.world_size)  # raises its error before anything is loaded
        share = (parallel.rank, parallel.world_size) if config.dist_eval else (0, 1)
        self.evaluations = task.evaluations(*share, parallel.is_main)
        self.run_copy = RunCopy(config, config.keep_last)
        self._coordinator = Coordinator(parallel, config.data_timeout)
        checkpoint = find_checkpoint(config, self.checkpoints, self.run_copy, parallel)
        self._identity = parallel.from_main(task.identity)
        weights = ""
        if not checkpoint:
            weights = config.finetune or finished_model(config, Path(config.resume or self.folder))
        self._has_weights = bool(checkpoint or weights)
        self.trainer = self._build_trainer(weights)
        self._checkpoint_epoch, self._draws_by_stream = 0, dict[int, int]()
        if checkpoint and config.eval:
            self._checkpoint_epoch = restore_weights(self.trainer, checkpoint, self._identity)
        elif checkpoint:
            self._draws_by_stream = restore(self.trainer, checkpoint, self._identity)
        elif config.eval:
            self.trainer.ema = None  # it would be the same weights again
        self._log_overview(f"resumed from {checkpoint}" if checkpoint else weights or "new weights")

    def _build_trainer(self, weights: str) -> Trainer:
        config, task, parallel = self.config, self.task, self.parallel
        model = task.build_model()
        if config.compile:
            for block in task.blocks(model):
                block.compile()
        torch.manual_seed(config.seed)
        parallel.materialise(model, task.parts(model), task.model_name)
        if weights:
            load_weights(
                model, fetch_if_remote(weights, find_model, config, parallel), task.format, task.select_weights
            )
        schedule = build_schedule(config, self.length, parallel.world_size)
        step = config.start_epoch * self.steps_per_epoch
        optimizer = build_optimizer(model, config, task.blocks(model), parallel)
        return Trainer(config, task, parallel, model, optimizer, schedule, step)

    def _log_overview(self, weights: str) -> None:
        config, length, schedule = self.config, self.length, self.trainer.schedule
        self.task.describe()
        counts = self.task.count_parameters(self.trainer.model)
        log.info("%s; %s", ", ".join(f"{count:,} parameters of the {name}" for name, count in counts.items()), weights)
        log.info(
            "%d epochs of %d steps = %d steps of %d samples (%d x batch_size %d x accum_iter %d), from step %d",
            length.epochs,
            self.steps_per_epoch,
            self.total_steps,
            self.parallel.world_size * config.batch_size * config.accum_iter,
            self.parallel.world_size,
            config.batch_size,
            config.accum_iter,
            self.trainer.step,
        )
        log.info(
            "lr up to %.3g, warm-up %d batches, %s in %s on %s; run folder %s",
            schedule.peak_lr,
            length.warmup_batches,
            config.opt,
            config.autocast_dtype,
            self.parallel.device,
            self.folder,
        )

    def dry_run(self) -> int:
        """Do one step, log its results and write nothing; return the exit status."""
        with contextlib.closing(self._batches()) as batches:
            self.trainer.train_step(self._fetch(batches)[0])
        means = self.trainer.interval.means(self.parallel)
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in means.losses.items())
        log.info("dry run: one step, loss %.4f, gradient norm %.3g; %s", means.loss, means.grad_norm, losses)
        return 0

    def evaluate_only(self) -> int:
        """Evaluate the weights without training; return the exit status."""
        if not self.evaluations:
            raise UserError("nothing to evaluate: the data configuration declares no validation sets")
        if not self._has_weights:
            raise UserError(
                f"no weights to evaluate: {self.checkpoints} holds no checkpoint; set finetune or resume to name "
                "weights"
            )
        journal = Journal(self.config, self.trainer.step, self.total_steps, self.parallel.is_main)
        self._evaluate(journal)
        journal.close()
        return 0

    def train(self) -> int:
        """Train until the last step or until a signal; return the exit status."""
        config, trainer, parallel = self.config, self.trainer, self.parallel
        if trainer.step > self.total_steps or not self.total_steps:
            raise UserError(
                f"nothing to train: the run has {self.total_steps} steps and would continue after step "
                f"{trainer.step}; raise epochs or total_tokens"
            )
        parallel.from_main(self._claim_folder)
        self._writer = CheckpointWriter(
            self.checkpoints,
            parallel,
            config.keep_last,
            config.async_save,
            self.run_copy.copy_checkpoint,
            self.run_copy.pending,
        )
        journal = Journal(config, trainer.step, self.total_steps, parallel.is_main)
        parallel.from_main(self._write_config)
        traced_folder = self.folder if config.profile and parallel.is_main else None
        with StopSignals() as signals, profiler(traced_folder, trainer.interval) as end_profiled_step:
            self._coordinator = Coordinator(parallel, config.data_timeout, signals)
            self._train_steps(journal, end_profiled_step)
            self._writer.wait()  # still inside StopSignals: another signal must not end it half-way
            parallel.from_main(self.run_copy.wait)
        journal.close()
        if self._coordinator.stop_signal:
            log.info("stopped at step %d; the same command goes on from there", trainer.step)
            return 128 + self._coordinator.stop_signal
        self._finish()
        return 0

    def _train_steps(self, journal: Journal, end_profiled_step: Callable[[], None]) -> None:
        """Train until the last step or until a signal; log, save and evaluate when it is time."""
        config, trainer, coordinator = self.config, self.trainer, self._coordinator
        if self._evaluation_is_due() and not self.parallel.from_main(lambda: journal.evaluated):
            self._evaluate(journal)  # the run was stopped between this checkpoint and its evaluation
        with contextlib.closing(self._batches()) as batches:
            saved_at = time.monotonic()
            micro_batches, _ = self._fetch(batches)
            while trainer.step < self.total_steps and not coordinator.stop_signal:
                trainer.train_step(micro_batches)
                end_profiled_step()
                overdue = 0 < config.save_every_minutes <= (time.monotonic() - saved_at) / 60
                micro_batches, overdue = self._fetch(batches, overdue and self.parallel.is_main)
                if trainer.step % config.log_interval == 0 or trainer.step == self.total_steps:
                    self._log(journal)
                    self._check_divergence()
                save = bool(coordinator.stop_signal) or overdue or self._checkpoint_is_due()
                if save:
                    self._save()
                    saved_at = time.monotonic()
                if self._evaluation_is_due() and not coordinator.stop_signal:
                    self._evaluate(journal)
                    if coordinator.stop_signal and not save:
                        self._save()

    def _finish(self) -> None:
        """Export the model of the last checkpoint."""
        last = self.checkpoints / f"step-{self.trainer.step:08d}"
        if not self.parallel.from_main(last.exists):
            self._save()  # the run was resumed from the last checkpoint of another run
            self._writer.wait()
        self.parallel.from_main(lambda: self._export(last))
        log.info("finished: the model is in %s; load it with from_pretrained('%s')", self.folder, self.folder)

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock_folder(self.folder)
        check_export(self.folder, self.task.format)  # raises its error now rather than after the training
        remove_unfinished(self.checkpoints)

    def _write_config(self) -> None:
        with atomic_path(self.folder / "config.yaml") as path:
            path.write_text(yaml.safe_dump(saved_options(self.config), sort_keys=False))
        self.run_copy.copy("config.yaml")  # raises its error now if the store cannot be written to

    def _batches(self) -> BatchIterator:
        config, parallel = self.config, self.parallel
        loader = self.task.train_batches(
            parallel.rank,
            parallel.world_size,
            self.length.batches_per_epoch,
            self.trainer.step * config.accum_iter,
            self._draws_by_stream,
            pin_memory=config.pin_mem and parallel.device.type == "cuda",
        )
        return iter(loader)

    def _fetch(self, batches: BatchIterator, save_is_due: bool = False) -> tuple[list[Any], bool]:
        """Fetch the micro-batches of the next step, if there is one; see :meth:`Coordinator.fetch`."""
        number = self.config.accum_iter if self.trainer.step < self.total_steps else 0
        phase = partial(self.trainer.interval.host_phase, "data_wait")
        return self._coordinator.fetch(batches, number, phase, save_is_due)

    def _check_divergence(self) -> None:
        """Raise a :class:`UserError` in all processes after too many steps whose loss or gradients were not finite."""
        streak = self.trainer.non_finite_streak.read()
        if streak is None:
            return
        first, last, own_names = streak
        names = sorted({name for rank_names in self.parallel.gather(own_names) for name in rank_names})
        cause = f"the loss of {', '.join(names)}" if names else "the gradient norm"
        raise UserError(
            f"training has diverged: in steps {first} to {last} ({last - first + 1} in a row, max_skipped_steps) "
            f"{cause} was not finite. These steps were skipped and changed no weights. "
            f"{divergence_advice(self.checkpoints)}"
        )

    @property
    def _epoch(self) -> int:
        """The epoch of the last step."""
        if self.config.eval:
            return self._checkpoint_epoch
        return max(self.trainer.step - 1, 0) // self.steps_per_epoch

    def _is_due(self, every_epochs: int) -> bool:
        epochs, rest = divmod(self.trainer.step, self.steps_per_epoch)
        return bool(every_epochs) and epochs > 0 and not rest and not epochs % every_epochs

    def _evaluation_is_due(self) -> bool:
        frequency, step = self.config.eval_freq, self.trainer.step
        if not self.evaluations or not frequency:
            return False
        between = step % frequency == 0 and step > 0 if self.config.step_eval else self._is_due(frequency)
        return between or step == self.total_steps

    def _checkpoint_is_due(self) -> bool:
        return self.trainer.step == self.total_steps or self._is_due(self.config.save_ckpt_freq)

    def _log(self, journal: Journal) -> None:
        trainer = self.trainer
        means = trainer.interval.means(self.parallel)
        first_batch = (trainer.step - 1) * self.config.accum_iter
        samples_per_step = self.config.batch_size * self.config.accum_iter * self.parallel.world_size
        rates = {"lr": trainer.schedule.lr(first_batch), "weight_decay": trainer.schedule.weight_decay(first_batch)}
        eta = (self.total_steps - trainer.step) * samples_per_step / means.samples_per_second
        journal.interval(trainer.step, self._epoch, rates, means, eta)

    def _save(self) -> None:
        """Save a checkpoint of the current step; all processes must call this."""
        trainer = self.trainer
        self._check_divergence()
        with trainer.interval.host_phase("save", paused=True):
            tensors = tensors_to_save(trainer.model, trainer.optimizer, trainer.ema)
            config: Any = trainer.model.config
            self._writer.save(trainer.step, config, tensors, state_to_save(trainer, self._identity))

    def _export(self, checkpoint: Path) -> None:
        export_with_facts(checkpoint, self.folder, self.task.format)
        if self.config.model_ema:
            export_with_facts(checkpoint, self.folder / "ema", self.task.format, ema=True)
        self.run_copy.complete(checkpoint)
        ema_folder = ["ema"] if self.config.model_ema else []
        self.run_copy.copy("config.json", "model.safetensors", *ema_folder, *JOURNAL_FILES)

    def _evaluate(self, journal: Journal) -> None:
        """Run and report all evaluations; report nothing if the run is told to stop meanwhile."""
        trainer = self.trainer
        with trainer.interval.host_phase("evaluation", paused=True), contextlib.suppress(StopRequested):
            results: dict[str, dict[str, Any]] = {evaluation.dataset: {} for evaluation in self.evaluations}
            for evaluation in self.evaluations:
                results[evaluation.dataset][evaluation.kind] = self._evaluate_one(evaluation)
                if trainer.ema is not None:
                    with trainer.ema.applied():
                        results[evaluation.dataset][f"{evaluation.kind}_ema"] = self._evaluate_one(evaluation)
            journal.evaluation(trainer.step, self._epoch, results)

    def _evaluate_one(self, evaluation: Evaluation) -> Results:
        return evaluate(self.task, self.trainer.model, evaluation, self.config, self.parallel, self._coordinator)


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
