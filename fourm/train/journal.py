"""The reports of a run: a progress bar or lines on the console, ``log.txt``, ``log.jsonl`` and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fourm.train.evaluate import Results
from fourm.train.metrics import IntervalMeans
from fourm.train.nonfinite import replace_non_finite
from fourm.train.options import Commands, RunOptions, saved_options
from fourm.utils.errors import SanitizingFormatter, UserError
from fourm.utils.files import atomic_path
from fourm.utils.options import option
from fourm.utils.urls import redact

log = logging.getLogger("fourm")
LOG, EVALUATIONS, WANDB_ID = "log.jsonl", "eval.jsonl", "wandb_id.txt"
JOURNAL_FILES = (LOG, WANDB_ID)
"""The files from which another machine continues the journal."""


@dataclass(frozen=True, kw_only=True)
class LogOptions(RunOptions, Commands):
    """Log"""

    log_interval: int = option("optimizer steps between two lines of the log", 10, at_least=1)
    print_all: bool = option("print the messages of all ranks", False)
    show_user_warnings: bool = option("show Python warnings of the category UserWarning", False)
    log_wandb: bool = option("log to Weights & Biases", False)
    wandb_project: str | None = option("Weights & Biases project", None)
    wandb_entity: str | None = option("Weights & Biases user or team", None)
    wandb_run_name: str = option("name of the Weights & Biases run; 'auto' = run_name", "auto")


class _Console(logging.Handler):
    """Prints lines to the console without breaking the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "in_bar", False):
            return
        with contextlib.suppress(OSError):  # the run goes on even if its terminal is closed
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """Writes ``log.txt``, and stops with a warning when it cannot be written any more."""

    def handleError(self, record: logging.LogRecord) -> None:
        log.removeHandler(self)
        log.warning("%s: %s; the run goes on without this log", self.baseFilename, sys.exc_info()[1])


@contextlib.contextmanager
def run_logging(options: LogOptions, main: bool) -> Iterator[None]:
    """Log to the console and, in the main process, to ``log.txt``; others log warnings or, with ``print_all``, all."""
    previous_level, previous_propagate = log.level, log.propagate
    log.propagate = False
    log.setLevel(logging.INFO if main or options.print_all else logging.WARNING)
    handlers: list[logging.Handler] = [_Console()]
    if main and not options.dry_run:
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(Path(options.output_dir) / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(SanitizingFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)
    try:
        yield
    finally:
        log.propagate = previous_propagate
        log.setLevel(previous_level)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class Journal:
    """Records the results of a run; only the journal of the main process writes.

    ``log.jsonl`` holds an object per line: ``step``, ``epoch``, and the means of a logging interval or, under ``eval``,
    the results of an evaluation per data set. With ``--eval``, the results are added to ``eval.jsonl`` instead, because
    ``log.jsonl`` belongs to the training.

    Args:
        step: The step from which the run continues. Later lines, of an interrupted run that got further, are dropped.
        total_steps: The number of steps of the whole run.

    Attributes:
        evaluated: Whether the journal already has the evaluation after ``step``.
    """

    def __init__(self, options: LogOptions, step: int, total_steps: int, main: bool):
        self._main, self._total = main and not options.dry_run, total_steps
        self._path = Path(options.output_dir) / (EVALUATIONS if options.eval else LOG)
        lines, damaged = read_lines(self._path)
        kept = [line for line in lines if options.eval or line["step"] <= step]
        self.evaluated = any("eval" in line for line in kept if line["step"] == step)
        self._wandb = None
        self._bar = None
        if not self._main:
            return
        with atomic_path(self._path) as path:
            path.write_text("".join(_json(line) + "\n" for line in kept))
        if damaged:
            aside = self._path.with_name(f"{self._path.name}.damaged")
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in damaged)
            log.warning("%s: %d lines are damaged; they were moved to %s", self._path, len(damaged), aside.name)
        self._file = self._path.open("a")
        if options.log_wandb:
            self._wandb = _wandb_run(options)
        if sys.stderr.isatty() and not options.eval:
            self._bar = tqdm(total=total_steps, initial=step, unit=" steps", dynamic_ncols=True)

    def interval(self, step: int, epoch: int, rates: dict[str, float], means: IntervalMeans, eta: float) -> None:
        """Report the means of a logging interval.

        Args:
            step: The last optimizer step of the interval.
            rates: The ``lr`` and ``weight_decay`` of this step.
            eta: The expected time to the end of the run, in seconds.
        """
        if not self._main:
            return
        self._write({"step": step, "epoch": epoch, **rates, **means.line(), "eta_seconds": eta})
        speed = f"{means.samples_per_second:.4g} samples/s, "
        if means.tokens_per_second:
            speed += f"{means.tokens_per_second:.4g} tokens/s, "
        speed += f"MFU {means.mfu:.1%}" if means.mfu is not None else f"{means.tflops:.3g} TFLOP/s"
        facts = f"loss {means.loss:.4f}, lr {rates['lr']:.3g}, {speed}, waiting for data {means.data_wait:.0%}, "
        facts += f"peak memory {means.peak_memory / 1e9:.3g} GB"
        in_bar = {"in_bar": self._bar is not None}
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(facts)
        log.info("step %d/%d, %s, ETA %s", step, self._total, facts, duration(eta), extra=in_bar)
        for problem, figures in (
            ("steps skipped because of their loss or gradient norm", means.skipped_steps),
            ("the loss was not finite (share of the targets)", means.not_finite),
            ("bad samples", means.bad_samples),
        ):
            if figures:
                log.warning("step %d: %s: %s", step, problem, figures)
        if means.missing:
            log.info("step %d: missing values: %s", step, _percent(means.missing), extra=in_bar)

    def evaluation(self, step: int, epoch: int, results: dict[str, dict[str, Results]]) -> None:
        """Report the results of all evaluations in one line.

        Args:
            results: {data set: {kind: results}}
        """
        if not self._main:
            return
        lines = {name: {kind: result.line() for kind, result in kinds.items()} for name, kinds in results.items()}
        self._write({"step": step, "epoch": epoch, "eval": lines})
        for name, kinds in results.items():
            for kind, result in kinds.items():
                figures = ", ".join(
                    f"{part} {value:.3f}" for part, value in {**result.losses, **result.metrics}.items()
                )
                log.info("eval %s (%s) at step %d: loss %.4f; %s", name, kind, step, result.loss, figures)
                if result.pictures:
                    self._write_pictures(step, f"{name}-{kind}", result.pictures)
                if not math.isfinite(result.loss):
                    log.warning("eval %s: the loss is not finite", name)
                if result.bad_samples:
                    log.warning("eval %s: bad samples: %s", name, result.bad_samples)
                if result.missing:
                    log.info("eval %s: missing values: %s", name, _percent(result.missing))
        if self._path.name == EVALUATIONS:
            log.info("the results were added to %s", self._path)

    def _write_pictures(self, step: int, name: str, pictures: list[Tensor]) -> None:
        """One below the other, into ``pictures`` in the run folder."""
        from torchvision.utils import save_image  # which takes long to import

        path = self._path.parent / "pictures" / f"step-{step:08d}-{name}.png"
        with atomic_path(path) as temporary:
            save_image(pictures, temporary, nrow=max(1, round(len(pictures) ** 0.5 / 2)), format="png")
        if self._wandb is not None:
            import wandb

            self._wandb.log({f"pictures/{name}": wandb.Image(str(path))}, step=step)

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(_json(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._path}: {error.strerror or error}; make room on the disk and start the run again"
            ) from error
        if self._wandb is not None:
            self._wandb.log(dict(_flatten(line)), step=line["step"])

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._main:
            self._file.close()


def _percent(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def duration(seconds: float) -> str:
    """Format a time as ``1:02:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _json(line: dict[str, Any]) -> str:
    """Format a line as JSON, with null for numbers that are not finite and their paths under the key ``null``."""
    line, paths = replace_non_finite(line)
    if paths:
        line["null"] = paths
    return json.dumps(line, allow_nan=False)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Read a ``.jsonl`` journal.

    Returns:
        The lines, and those that are damaged, such as one that a killed process did not complete.
    """
    lines, damaged, seen = [], [], set()
    content = path.read_bytes() if path.exists() else b""
    for text in content.split(b"\n"):
        try:
            line = json.loads(text)
            if type(line["step"]) is not int or (text in seen and path.name == LOG):
                raise ValueError
            lines.append(line)
            seen.add(text)
        except (ValueError, TypeError, KeyError, RecursionError):
            if text.strip():
                damaged.append(text)
    return lines, damaged


def _flatten(line: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return nested numbers under names joined by slashes, as Weights & Biases groups them."""
    numbers: list[tuple[str, float]] = []
    for key, value in line.items():
        if isinstance(value, dict):
            numbers += _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            numbers.append((prefix + key, value))
    return numbers


def _wandb_run(options: LogOptions) -> Any:
    """Start a Weights & Biases run, or continue that of the run folder."""
    import wandb

    id_file = Path(options.output_dir) / WANDB_ID
    run_id = id_file.read_bytes().strip() if id_file.exists() else b""
    if not re.fullmatch(rb"[\w-]{1,128}", run_id):
        if run_id:
            log.warning("%s holds no valid run id; starting a new Weights & Biases run", id_file)
        run_id = uuid.uuid4().hex.encode()
        with atomic_path(id_file) as path:
            path.write_bytes(run_id)
    return wandb.init(
        project=options.wandb_project,
        entity=options.wandb_entity,
        name=options.wandb_run_name,
        id=run_id.decode(),
        resume="allow",
        dir=options.output_dir,
        config=saved_options(options),
        settings=wandb.Settings(x_disable_meta=redact(sys.argv) != sys.argv),  # they hold the command line
    )
