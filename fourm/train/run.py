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
from fourm.data.data_config import DataConfig
from fourm.data.modality_info import own_declarations
from fourm.data.options import read_data
from fourm.data.unified_datasets import Batch, build_train_loader
from fourm.models import FM, count_parameters, model_config
from fourm.models.hub import check_export
from fourm.models.model_store import find_model
from fourm.models.sharded import export_model
from fourm.train.checkpoint import CheckpointWriter, advice, remove_unfinished, tensors_to_save
from fourm.train.config import TrainConfig, num_streams, run_length, to_dict
from fourm.train.device import keep_freed_memory
from fourm.train.evaluate import Evaluation, build_evaluations, evaluate
from fourm.train.finetune import load_weights
from fourm.train.journal import FILES, Journal, logging_of
from fourm.train.loop import Trainer
from fourm.train.optimizer import build_optimizer
from fourm.train.parallel import Strategy
from fourm.train.plan import describe, plan_run
from fourm.train.profiling import profiler
from fourm.train.remote import RemoteRun, here
from fourm.train.resume import find_checkpoint, finished_model, restore, restore_weights, state_of
from fourm.train.same_run import identity_of
from fourm.train.schedules import build_schedule
from fourm.train.signals import StopSignals
from fourm.train.waiting import Stopped, Waiting
from fourm.utils.errors import UserError, printable
from fourm.utils.files import atomic_path, lock_folder
from fourm.utils.plugin import load_plugin
from fourm.utils.tokenizer import load_text_tokenizer
from fourm.utils.transfer import shown

log = logging.getLogger("fourm")
_DISK = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "choose another output_dir",
    errno.EACCES: "allow it, or choose another output_dir", errno.EPERM: "allow it, or choose another output_dir",
    errno.ENOTDIR: "choose another output_dir", errno.ENOENT: "choose another output_dir", errno.EEXIST: "choose another output_dir",
    errno.EISDIR: "move it away", errno.EIO: "look at the disk", errno.ENAMETOOLONG: "choose a shorter output_dir",
}  # fmt: skip


def train(config: TrainConfig, strategy: type[Strategy]) -> int:
    """Train, evaluate or try out, as ``config`` says.

    Args:
        strategy: how several processes share the work.

    Returns:
        The exit status: 0; 128 + the number of the signal that stopped the run, after a checkpoint; 1 if another process of
        the run has died.

    Raises:
        UserError: a configuration, file or sample that cannot work.
    """
    load_plugin(config.plugin)
    if config.plan:
        data = load_data(config)
        text_tokenizer = load_text_tokenizer(config.text_tokenizer_path)
        print(printable(describe(config, plan_run(config, data, build_model(config, data), text_tokenizer))))
        return 0
    parallel = strategy(config)
    _set_up_process(config)
    if parallel.device.type == "cpu":
        keep_freed_memory()
    with _no_traceback_of_the_disk(config), logging_of(config, parallel.is_main):
        try:
            if parallel.is_main:
                _warn_of_restarts()
            run = Run(config, parallel)
            if config.dry_run:
                status = run.try_out()
            else:
                status = run.evaluate_only() if config.eval else run.train()
        except (OSError, RuntimeError) as error:
            if not parallel.is_loss_of_contact(error):
                raise
            reason = " ".join(str(error).split())[:200]
            log.error("rank %d ends, for another process has: %s; start again to go on from the newest checkpoint",
                      parallel.rank, reason)  # fmt: skip
            return 1  # without closing, which would wait for the others
    parallel.close()
    return status


@contextlib.contextmanager
def _no_traceback_of_the_disk(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = error.filename or config.output_dir
        raise UserError(f"{where}: {os.strerror(error.errno)}; {_DISK[error.errno]}, and start again") from error


class Run:
    """One process's part of a run."""

    def __init__(self, config: TrainConfig, parallel: Strategy):
        self.config, self.parallel = config, parallel
        self.folder = Path(config.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.data = load_data(config)
        self.length = run_length(config, parallel.world_size)
        if not config.eval:
            num_streams(config, parallel.world_size)  # wrong ones are found out before anything is loaded
        self.total_steps = self.length.total_batches // config.accum_iter
        self.steps_per_epoch = self.length.batches_per_epoch // config.accum_iter
        self.text_tokenizer = load_text_tokenizer(config.text_tokenizer_path)
        self.evaluations = build_evaluations(config, self.data, self.text_tokenizer, parallel)
        self.copy_in_store = RemoteRun(config)
        checkpoint = find_checkpoint(config, self.checkpoints, self.copy_in_store, parallel)
        self._identity = parallel.from_main(lambda: identity_of(self.data, self.text_tokenizer))
        weights = config.finetune if not checkpoint else ""
        if not checkpoint and not weights and (finished := finished_model(config, Path(config.resume or self.folder))):
            weights = str(finished)
        self.trainer = self._build_trainer(weights)
        self._epoch_before, self.draws = 0, None
        if checkpoint and config.eval:
            self._epoch_before = restore_weights(self.trainer, checkpoint, self._identity)
        elif checkpoint:
            self.draws = restore(self.trainer, checkpoint, self._identity)
        elif config.eval:
            self.trainer.ema = None  # which would be these weights again
        self._has_weights = bool(checkpoint or weights)
        self._waiting = Waiting(parallel, config.data_timeout)
        self._describe(f"resumed from {checkpoint}" if checkpoint else weights or "new weights")

    def _build_trainer(self, weights: str) -> Trainer:
        config, data, world_size = self.config, self.data, self.parallel.world_size
        model = build_model(config, data)
        if config.compile:
            model.compile_blocks()
        torch.manual_seed(config.seed)
        self.parallel.place(model)
        if weights:
            load_weights(model, here(weights, find_model, config, self.parallel))
        sets = data.train.values()
        return Trainer(
            config, self.parallel, model, build_optimizer(model, config), build_schedule(config, self.length, world_size),
            num_input_tokens=max(dataset.input_tokens_range[1] for dataset in sets),
            num_target_tokens=max(dataset.target_tokens_range[1] for dataset in sets),
            step=config.start_epoch * self.steps_per_epoch,
        )  # fmt: skip

    def _describe(self, weights: str) -> None:
        """Tell what is going to happen."""
        config, length, schedule = self.config, self.length, self.trainer.schedule
        for name, dataset in self.data.train.items():
            log.info("data set %s, weight %g: %s", name, self.data.weights[name], shown(dataset.data_path))
            log.info("  inputs %s of %d-%d tokens", ", ".join(dataset.in_domains), *dataset.input_tokens_range)
            log.info("  targets %s of %d-%d tokens", ", ".join(dataset.out_domains), *dataset.target_tokens_range)
        counts = count_parameters(self.trainer.model)
        log.info("model %s: %s parameters of the trunk, %s of the embeddings; %s",
                 config.model, f"{counts['trunk']:,}", f"{counts['embeddings']:,}", weights)  # fmt: skip
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
        line = self.trainer.interval.means(self.parallel)
        log.info("dry run: one step, loss %.4f, gradient norm %.3g; %s", line["loss"], line["grad_norm"],
                 ", ".join(f"{name} {loss:.3f}" for name, loss in line["losses"].items()))  # fmt: skip
        return 0

    def evaluate_only(self) -> int:
        if not self.evaluations:
            raise UserError(f"{self.data.path}: nothing to evaluate; declare validation sets under 'val'")
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
        self._writer = CheckpointWriter(
            self.checkpoints, parallel, config.keep_last, config.async_save, self.copy_in_store.copy_checkpoint
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
        journal.close()
        if waiting.stop:
            log.info("stopped at step %d; the same command goes on from there", trainer.step)
            return 128 + waiting.stop
        last = self.checkpoints / f"step-{trainer.step:08d}"
        if not parallel.from_main(last.exists):
            self._save()  # resumed from the last checkpoint of another run
            self._writer.wait()
        parallel.from_main(lambda: self._export(last))
        log.info("finished: FM.from_pretrained('%s')", self.folder)
        return 0

    def _take_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock_folder(self.folder)
        check_export(self.folder)  # rather than when the model is there
        remove_unfinished(self.checkpoints)

    def _write_config(self) -> None:
        with atomic_path(self.folder / "config.yaml") as path:
            path.write_text(yaml.safe_dump(to_dict(self.config), sort_keys=False))
        self.copy_in_store.copy("config.yaml")  # a store that cannot be written to is found out now

    def _batches(self) -> BatchIterator:
        config, parallel = self.config, self.parallel
        return iter(
            build_train_loader(
                self.data, self.text_tokenizer, batch_size=config.batch_size,
                batches_per_epoch=self.length.batches_per_epoch, num_workers=config.num_workers, rank=parallel.rank,
                world_size=parallel.world_size, seed=config.seed, start_batch=self.trainer.step * config.accum_iter,
                positions=self.draws, num_streams=num_streams(config, parallel.world_size),
                pin_memory=config.pin_mem and parallel.device.type == "cuda", raw_pixels=True,
            )
        )  # fmt: skip

    def _fetch(self, batches: BatchIterator, late: bool) -> tuple[list[Batch], bool]:
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
        last = self.trainer.step == self.total_steps and self.config.eval_freq > 0
        return bool(self.evaluations) and (last or self._is_due(self.config.eval_freq))

    def _checkpoint_is_due(self) -> bool:
        return self.trainer.step == self.total_steps or self._is_due(self.config.save_ckpt_freq)

    def _log(self, journal: Journal) -> None:
        trainer = self.trainer
        means = trainer.interval.means(self.parallel)
        done = (trainer.step - 1) * self.config.accum_iter
        per_step = self.config.batch_size * self.config.accum_iter * self.parallel.world_size
        rates = {"lr": trainer.schedule.lr(done), "weight_decay": trainer.schedule.weight_decay(done)}
        eta = (self.total_steps - trainer.step) * per_step / means["samples_per_second"]
        journal.interval({"step": trainer.step, "epoch": self._epoch, **rates, **means, "eta_seconds": eta})

    def _save(self) -> None:
        """A checkpoint of the step done last; all processes must call this."""
        trainer = self.trainer
        self._check_lost_steps()
        self._saved_step = trainer.step
        with trainer.interval.host_phase("save", paused=True):
            tensors = tensors_to_save(trainer.model, trainer.optimizer, trainer.ema)
            self._writer.save(trainer.step, trainer.model.config, tensors, state_of(trainer, self._identity))

    def _export(self, checkpoint: Path) -> None:
        export_model(checkpoint, self.folder)
        if self.config.model_ema:
            export_model(checkpoint, self.folder / "ema", ema=True)
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

    def _evaluated(self, evaluation: Evaluation) -> dict[str, Any]:
        return evaluate(self.trainer.model, evaluation, self.config, self.parallel, self._waiting)


def build_model(config: TrainConfig, data: DataConfig) -> FM:
    """The model of the run, with the modalities of its training sets, on the meta device: without memory for weights."""
    options = {
        "num_register_tokens": config.num_register_tokens,
        "use_act_checkpoint": config.use_act_checkpoint and config.act_checkpoint_every,
        "image_size": config.input_size,
        "patch_size": config.patch_size,
        "share_embedding": True,
    }
    for key in ("domains_in", "domains_out", "modalities"):
        if key in config.model_kwargs:
            raise UserError(f"'model_kwargs': '{key}' follows from the data configuration; leave it out")
    with torch.device("meta"):
        return FM(
            model_config(
                config.model, data.in_domains, data.out_domains, modalities=_declarations(data),
                **options | config.model_kwargs,
            )
        )  # fmt: skip


def _warn_of_restarts() -> None:
    """torchrun's processes meet at a store in which those of an earlier attempt have left their addresses."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        log.warning(
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun: processes that it starts again may fail to meet without"
        )


def _declarations(data: DataConfig) -> dict[str, dict[str, Any]]:
    """What a model must know of its modalities beside the built-in table: the data YAML's block, and what a program added."""
    own = own_declarations(data.modalities)
    return {**own, **{name: own.get(name, {}) | dict(fields or {}) for name, fields in data.declarations.items()}}


def _set_up_process(config: TrainConfig) -> None:
    if not config.show_user_warnings:
        warnings.filterwarnings("ignore", category=UserWarning)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < config.rlimit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(config.rlimit, hard), hard))


def load_data(config: TrainConfig) -> DataConfig:
    """The data configuration that ``config`` names."""
    return read_data(config, max_bad_fraction=config.max_bad_fraction)
