"""The training loop: optimizer steps and, between them, lines of the log, checkpoints and evaluations."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fourm.data.batch_loader import BatchIterator
from fourm.train.checkpoint import CheckpointWriter, divergence_advice, tensors_to_save
from fourm.train.coordinator import Coordinator, StopRequested
from fourm.train.evaluate import Results, evaluate
from fourm.train.journal import Journal
from fourm.train.resume import state_to_save
from fourm.train.step import Trainer
from fourm.train.task import Evaluation
from fourm.utils.errors import UserError


@dataclass
class TrainingLoop:
    """Trains until the last step or until a signal; all processes make the same calls.

    Attributes:
        trainer: The model, and everything else that a step needs.
        evaluations: What is evaluated.
        identity: The result of :meth:`Task.identity`, for the checkpoints.
    """

    trainer: Trainer
    evaluations: Sequence[Evaluation]
    identity: dict[str, Any]
    coordinator: Coordinator
    journal: Journal
    writer: CheckpointWriter

    def run(self, start_batches: Callable[[], BatchIterator], end_profiled_step: Callable[[], None]) -> None:
        """Train; log, save and evaluate when it is time.

        Args:
            start_batches: Returns the batches from the current step on.
            end_profiled_step: Called after every step.
        """
        trainer, coordinator, config = self.trainer, self.coordinator, self.trainer.config
        if self._evaluation_is_due() and not trainer.parallel.from_main(lambda: self.journal.evaluated):
            self._evaluate()  # the run was stopped between this checkpoint and its evaluation
        with contextlib.closing(start_batches()) as batches:
            saved_at = time.monotonic()
            micro_batches, _ = self._fetch(batches)
            while trainer.step < trainer.total_steps and not coordinator.stop_signal:
                trainer.train_step(micro_batches)
                end_profiled_step()
                is_late = 0 < config.save_every_minutes <= (time.monotonic() - saved_at) / 60
                # The clock of the main process decides for all of them.
                micro_batches, save_is_late = self._fetch(batches, is_late and trainer.parallel.is_main)
                if trainer.step % config.log_interval == 0 or trainer.step == trainer.total_steps:
                    self._log()
                    self._check_divergence()
                save = bool(coordinator.stop_signal) or save_is_late or self._checkpoint_is_due()
                if save:
                    self.save()
                    saved_at = time.monotonic()
                if self._evaluation_is_due() and not coordinator.stop_signal:
                    self._evaluate()
                    if coordinator.stop_signal and not save:
                        self.save()

    def _fetch(self, batches: BatchIterator, save_is_late: bool = False) -> tuple[list[Any], bool]:
        """Fetch the micro-batches of the next step, if there is one; see :meth:`Coordinator.fetch`."""
        trainer = self.trainer
        number = trainer.config.accum_iter if trainer.step < trainer.total_steps else 0
        return self.coordinator.fetch(batches, number, partial(trainer.interval.host_phase, "data_wait"), save_is_late)

    def _is_due(self, every_epochs: int) -> bool:
        epochs, rest = divmod(self.trainer.step, self.trainer.steps_per_epoch)
        return bool(every_epochs) and epochs > 0 and not rest and not epochs % every_epochs

    def _checkpoint_is_due(self) -> bool:
        return self.trainer.step == self.trainer.total_steps or self._is_due(self.trainer.config.save_ckpt_freq)

    def _evaluation_is_due(self) -> bool:
        config, step = self.trainer.config, self.trainer.step
        if not self.evaluations or not config.eval_freq:
            return False
        between = step % config.eval_freq == 0 and step > 0 if config.step_eval else self._is_due(config.eval_freq)
        return between or step == self.trainer.total_steps

    def _log(self) -> None:
        trainer = self.trainer
        means = trainer.interval.means(trainer.parallel)
        eta = (trainer.total_steps - trainer.step) * trainer.samples_per_step / means.samples_per_second
        self.journal.interval(trainer.step, trainer.epoch, trainer.rates(trainer.step - 1), means, eta)

    def _check_divergence(self) -> None:
        """Raise a :class:`UserError` in all processes after too many steps whose loss or gradients were not finite."""
        streak = self.trainer.non_finite_streak.read()
        if streak is None:
            return
        first, last, own_names = streak
        names = sorted({name for rank_names in self.trainer.parallel.gather(own_names) for name in rank_names})
        cause = f"the loss of {', '.join(names)}" if names else "the gradient norm"
        raise UserError(
            f"training has diverged: in steps {first} to {last} ({last - first + 1} in a row, max_skipped_steps) "
            f"{cause} was not finite. These steps were skipped and changed no weights. "
            f"{divergence_advice(self.writer.folder)}"
        )

    def save(self) -> None:
        """Save a checkpoint of the current step."""
        trainer = self.trainer
        self._check_divergence()
        with trainer.interval.host_phase("save", paused=True):
            tensors = tensors_to_save(trainer.model, trainer.optimizer, trainer.ema)
            config: Any = trainer.model.config
            self.writer.save(trainer.step, config, tensors, state_to_save(trainer, self.identity))

    def _evaluate(self) -> None:
        """Run and report all evaluations; report nothing if the run is told to stop meanwhile."""
        trainer = self.trainer
        with trainer.interval.host_phase("evaluation", paused=True), contextlib.suppress(StopRequested):
            results = evaluate_all(trainer, self.evaluations, self.coordinator)
            self.journal.evaluation(trainer.step, trainer.epoch, results)


def evaluate_all(
    trainer: Trainer, evaluations: Sequence[Evaluation], coordinator: Coordinator
) -> dict[str, dict[str, Results]]:
    """Run all evaluations, also with the moving average of the weights if there is one.

    Returns:
        {data set: {kind: results}}

    Raises:
        StopRequested: A process was told to stop.
    """

    def run(evaluation: Evaluation) -> Results:
        return evaluate(trainer.task, trainer.model, evaluation, trainer.config, trainer.parallel, coordinator)

    results: dict[str, dict[str, Results]] = {evaluation.dataset: {} for evaluation in evaluations}
    for evaluation in evaluations:
        results[evaluation.dataset][evaluation.kind] = run(evaluation)
        if trainer.ema is not None:
            with trainer.ema.applied():
                results[evaluation.dataset][f"{evaluation.kind}_ema"] = run(evaluation)
    return results
