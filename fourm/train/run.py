"""A run from its configuration to its last checkpoint: build, resume, train, evaluate, save."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from fourm.data.batch_loader import BatchIterator
from fourm.train.checkpoint import CheckpointWriter, advice, remove_unfinished, tensors_to_save
from fourm.train.config import RunConfig, parse_args
from fourm.train.device import keep_freed_memory
from fourm.train.evaluate import Results, evaluate
from fourm.train.finetune import load_weights
from fourm.train.journal import FILES, Journal, logging_of
from fourm.train.loop import Trainer
from fourm.train.optimizer import build_optimizer
from fourm.train.options import saved_options
from fourm.train.parallel import Strategy
from fourm.train.plan import describe, plan_run
from fourm.train.profiling import profiler
from fourm.train.resume import find_checkpoint, finished_model, restore, restore_weights, state_of
from fourm.train.run_copy import RunCopy, fetched
from fourm.train.schedules import build_schedule, run_length
from fourm.train.signals import StopSignals
from fourm.train.task import Evaluation, Task
from fourm.train.waiting import Stopped, Waiting
from fourm.utils.checkpoints import check_export, export_model
from fourm.utils.errors import UserError, printable
from fourm.utils.files import atomic_path, lock_folder
from fourm.utils.model_store import find_model
from fourm.utils.plugin import load_plugin

log = logging.getLogger("fourm")
_DISK = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "choose another output_dir",
    errno.EACCES: "allow it, or choose another output_dir", errno.EPERM: "allow it, or choose another output_dir",
    errno.ENOTDIR: "choose another output_dir", errno.ENOENT: "choose another output_dir", errno.EEXIST: "choose another output_dir",
    errno.EISDIR: "move it away", errno.EIO: "look at the disk", errno.ENAMETOOLONG: "choose a shorter output_dir",
}  # fmt: skip


def main(task: type[Task], strategy: type[Strategy], argv: list[str] | None = None) -> int:
    """The command line of a training script; see :func:`train`."""
    return train(task, parse_args(task.config_class, argv, task.__doc__ or ""), strategy)


def train(task_class: type[Task], config: RunConfig, strategy: type[Strategy]) -> int:
    """Train, evaluate or try out, as ``config`` says.

    Args:
        task_class: What is trained.
        config: Of the class ``task_class.config_class``.
        strategy: How several processes share the work.

    Returns:
        The exit status: 0; 128 + the number of the signal that stopped the run, after a checkpoint; 1 if another process of
        the run has died.

    Raises:
        UserError: a configuration, file or sample that cannot work.
    """
    load_plugin(config.plugin)
    if config.plan:
        task = task_class(config)
        print(printable(describe(task, plan_run(task, task.build_model()))))
        return 0
    parallel = strategy(config)
    _set_up_process(config)
    if parallel.device.type == "cpu":
        keep_freed_memory()
    with _no_traceback_of_the_disk(config), logging_of(config, parallel.is_main):
        try:
            if parallel.is_main:
                _warn_of_restarts()
            run = Run(task_class(config), parallel)
            if config.dry_run:
                status = run.try_out()
            else:
                status = run.evaluate_only() if config.eval else run.train()
        except (OSError, RuntimeError) as error:
            if not parallel.is_loss_of_contact(error):
                raise
            reason = " ".join(str(error).split())[:200]
            log.error("rank %d stops because another process has died (%s); start the run again to continue from its newest "
                      "checkpoint", parallel.rank, reason)  # fmt: skip
            return 1  # without closing, which would wait for the others
    parallel.close()
    return status


@contextlib.contextmanager
def _no_traceback_of_the_disk(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = error.filename or config.output_dir
        raise UserError(f"{where}: {os.strerror(error.errno)}; {_DISK[error.errno]}, and start again") from error


class Run:
    """One process's part of a run."""

    def __init__(self, task: Task, parallel: Strategy):
        self.task, self.parallel = task, parallel
        self.config: RunConfig = task.config
        config = self.config
        self.folder = Path(config.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.length = run_length(config, parallel.world_size)
        if not config.eval:
            config.streams(parallel.world_size)  # a wrong number is an error before anything is loaded
        self.total_steps = self.length.total_batches // config.accum_iter
        self.steps_per_epoch = self.length.batches_per_epoch // config.accum_iter
        share = (parallel.rank, parallel.world_size) if config.dist_eval else (0, 1)
        self.evaluations = task.evaluations(*share, parallel.is_main)
        self.copy_in_store = RunCopy(config, config.keep_last)
        checkpoint = find_checkpoint(config, self.checkpoints, self.copy_in_store, parallel)
        self._identity = parallel.from_main(task.identity)
        weights = config.finetune if not checkpoint else ""
        if not checkpoint and not weights and (finished := finished_model(config, Path(config.resume or self.folder))):
            weights = str(finished)
        self.trainer = self._build_trainer(weights)
        self._epoch_before, self._draws = 0, None
        if checkpoint and config.eval:
            self._epoch_before = restore_weights(self.trainer, checkpoint, self._identity)
        elif checkpoint:
            self._draws = restore(self.trainer, checkpoint, self._identity)
        elif config.eval:
            self.trainer.ema = None  # which would be these weights again
        self._has_weights = bool(checkpoint or weights)
        self._waiting = Waiting(parallel, config.data_timeout)
        self._describe(f"resumed from {checkpoint}" if checkpoint else weights or "new weights")

    def _build_trainer(self, weights: str) -> Trainer:
        config, task, parallel = self.config, self.task, self.parallel
        model = task.build_model()
        if config.compile:
            for block in task.blocks(model):
                block.compile()
        torch.manual_seed(config.seed)
        parallel.place(model, task.parts(model), task.model_name)
        if weights:
            load_weights(model, fetched(weights, find_model, config, parallel), task.format, task.select_weights)
        schedule = build_schedule(config, self.length, parallel.world_size)
        step = config.start_epoch * self.steps_per_epoch
        return Trainer(config, task, parallel, model, build_optimizer(model, config), schedule, step)

    def _describe(self, weights: str) -> None:
        """Log what is going to happen."""
        config, length, schedule = self.config, self.length, self.trainer.schedule
        self.task.describe()
        counts = self.task.count_parameters(self.trainer.model)
        log.info("%s; %s", ", ".join(f"{count:,} parameters of the {name}" for name, count in counts.items()), weights)
        log.info(
            "%d epochs of %d steps = %d steps of %d samples (%d x batch_size %d x accum_iter %d), from step %d",
            length.epochs, self.steps_per_epoch, self.total_steps,
            self.parallel.world_size * config.batch_size * config.accum_iter, self.parallel.world_size,
            config.batch_size, config.accum_iter, self.trainer.step,
        )  # fmt: skip
        log.info(
            "lr up to %.3g, warm-up %d batches, %s in %s on %s; run folder %s", schedule.peak_lr, length.warmup_batches,
            config.opt, config.autocast_dtype, self.parallel.device, self.folder,
        )  # fmt: skip

    def try_out(self) -> int:
        """One step, whose results are shown and forgotten."""
        with contextlib.closing(self._batches()) as batches:
            self.trainer.train_step(self._fetch(batches, late=False)[0])
        means = self.trainer.interval.means(self.parallel)
        log.info("dry run: one step, loss %.4f, gradient norm %.3g; %s", means.loss, means.grad_norm,
                 ", ".join(f"{name} {loss:.3f}" for name, loss in means.losses.items()))  # fmt: skip
        return 0

    def evaluate_only(self) -> int:
        if not self.evaluations:
            raise UserError("nothing to evaluate: the data configuration declares no validation sets")
        if not self._has_weights:
            raise UserError(f"no weights to evaluate: {self.checkpoints} has no checkpoint; set finetune or resume")
        journal = Journal(self.config, self.trainer.step, self.total_steps, self.parallel.is_main)
        self._evaluate(journal)
        journal.close()
        return 0

    def train(self) -> int:
        """Train up to the end, or until a signal."""
        config, trainer, parallel = self.config, self.trainer, self.parallel
        if trainer.step > self.total_steps or not self.total_steps:
            raise UserError(
                f"nothing to train: the run has {self.total_steps} steps and begins with step {trainer.step}"
            )
        parallel.from_main(self._take_folder)
        self._saved_step = -1
        copy = self.copy_in_store
        self._writer = CheckpointWriter(
            self.checkpoints, parallel, config.keep_last, config.async_save, copy.copy_checkpoint, copy.in_use
        )
        journal = Journal(config, trainer.step, self.total_steps, parallel.is_main)
        parallel.from_main(self._write_config)
        traced = self.folder if config.profile and parallel.is_main else None
        with StopSignals() as signals, profiler(traced) as step_is_done, contextlib.ExitStack() as stack:
            self._waiting = waiting = Waiting(parallel, config.data_timeout, signals)
            if self._evaluation_is_due() and not parallel.from_main(lambda: journal.evaluated):
                self._evaluate(journal)  # the run was stopped between a checkpoint and its evaluation
                self._saved_step = trainer.step
            batches = stack.enter_context(contextlib.closing(self._batches()))
            saved_at = time.monotonic()
            fetched, late = self._fetch(batches, late=False)
            while trainer.step < self.total_steps and not waiting.stop:
                trainer.train_step(fetched)
                with trainer.interval.host_phase("profile", paused=True) if traced else contextlib.nullcontext():
                    step_is_done()
                late = 0 < config.save_every_minutes <= (time.monotonic() - saved_at) / 60 and parallel.is_main
                fetched, late = self._fetch(batches, late)
                if trainer.step % config.log_interval == 0 or trainer.step == self.total_steps:
                    self._log(journal)
                    self._check_lost_steps()
                if waiting.stop or late or self._checkpoint_is_due():
                    self._save()
                    saved_at = time.monotonic()
                if self._evaluation_is_due() and not waiting.stop:
                    self._evaluate(journal)
                    if waiting.stop and self._saved_step != trainer.step:
                        self._save()
            self._writer.wait()  # a further signal must not end it half-way
            parallel.from_main(copy.wait)
        journal.close()
        if waiting.stop:
            log.info("stopped at step %d; the same command goes on from there", trainer.step)
            return 128 + waiting.stop
        last = self.checkpoints / f"step-{trainer.step:08d}"
        if not parallel.from_main(last.exists):
            self._save()  # resumed from the last checkpoint of another run
            self._writer.wait()
        parallel.from_main(lambda: self._export(last))
        log.info("finished: the model is in %s, for from_pretrained('%s')", self.folder, self.folder)
        return 0

    def _take_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock_folder(self.folder)
        check_export(self.folder, self.task.format)  # rather than when the model is there
        remove_unfinished(self.checkpoints)

    def _write_config(self) -> None:
        with atomic_path(self.folder / "config.yaml") as path:
            path.write_text(yaml.safe_dump(saved_options(self.config), sort_keys=False))
        self.copy_in_store.copy("config.yaml")  # a store that cannot be written to is found out now

    def _batches(self) -> BatchIterator:
        config, parallel = self.config, self.parallel
        loader = self.task.train_batches(
            parallel.rank, parallel.world_size, self.length.batches_per_epoch, self.trainer.step * config.accum_iter,
            self._draws, pin_memory=config.pin_mem and parallel.device.type == "cuda",
        )  # fmt: skip
        return iter(loader)

    def _fetch(self, batches: BatchIterator, late: bool) -> tuple[list[Any], bool]:
        """The micro-batches of the next step, if there is one; see :meth:`Waiting.fetch`."""
        number = self.config.accum_iter if self.trainer.step < self.total_steps else 0
        return self._waiting.fetch(batches, number, partial(self.trainer.interval.host_phase, "data_wait"), late)

    def _check_lost_steps(self) -> None:
        """Raise a :class:`UserError` in all processes after too many steps whose loss or gradients were not finite."""
        lost = self.trainer.lost.read()
        if lost is None:
            return
        first, last, _ = lost
        names = sorted({name for share in self.parallel.gather(lost[2]) for name in share})
        what = f"the loss was not finite, of {', '.join(names)}" if names else "the gradient norm was not finite"
        raise UserError(
            f"training has diverged: in steps {first} to {last} ({last - first + 1} in a row, max_skipped_steps) {what}. They "
            f"were skipped and changed no weights. {advice(self.checkpoints)}"
        )

    @property
    def _epoch(self) -> int:
        """The epoch of the step done last."""
        if self.config.eval:
            return self._epoch_before
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
        done = (trainer.step - 1) * self.config.accum_iter
        per_step = self.config.batch_size * self.config.accum_iter * self.parallel.world_size
        rates = {"lr": trainer.schedule.lr(done), "weight_decay": trainer.schedule.weight_decay(done)}
        eta = (self.total_steps - trainer.step) * per_step / means.samples_per_second
        journal.interval(trainer.step, self._epoch, rates, means, eta)

    def _save(self) -> None:
        """A checkpoint of the step done last; all processes must call this."""
        trainer = self.trainer
        self._check_lost_steps()
        self._saved_step = trainer.step
        with trainer.interval.host_phase("save", paused=True):
            tensors = tensors_to_save(trainer.model, trainer.optimizer, trainer.ema)
            config: Any = trainer.model.config
            self._writer.save(trainer.step, config, tensors, state_of(trainer, self._identity))

    def _export(self, checkpoint: Path) -> None:
        export_model(checkpoint, self.folder, self.task.format)
        if self.config.model_ema:
            export_model(checkpoint, self.folder / "ema", self.task.format, ema=True)
        self.copy_in_store.complete(checkpoint)
        self.copy_in_store.copy("config.json", "model.safetensors", *(["ema"] if self.config.model_ema else []), *FILES)

    def _evaluate(self, journal: Journal) -> None:
        """Evaluate and report; nothing is reported if the run was told to stop meanwhile."""
        trainer = self.trainer
        with trainer.interval.host_phase("evaluation", paused=True), contextlib.suppress(Stopped):
            results: dict[str, dict[str, Any]] = {evaluation.dataset: {} for evaluation in self.evaluations}
            for evaluation in self.evaluations:
                results[evaluation.dataset][evaluation.kind] = self._evaluated(evaluation)
                if trainer.ema is not None:
                    with trainer.ema.in_place():
                        results[evaluation.dataset][f"{evaluation.kind}_ema"] = self._evaluated(evaluation)
            journal.evaluation(trainer.step, self._epoch, results)

    def _evaluated(self, evaluation: Evaluation) -> Results:
        return evaluate(self.task, self.trainer.model, evaluation, self.config, self.parallel, self._waiting)


def _warn_of_restarts() -> None:
    """torchrun's processes meet at a store in which those of an earlier attempt have left their addresses."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        log.warning(
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun: otherwise processes that it starts again may fail to meet"
        )


def _set_up_process(config: RunConfig) -> None:
    if not config.show_user_warnings:
        warnings.filterwarnings("ignore", category=UserWarning)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < config.rlimit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(config.rlimit, hard), hard))
