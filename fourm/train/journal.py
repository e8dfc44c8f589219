"""Where a run reports: a progress bar or lines on the console, ``log.txt``, ``log.jsonl`` and Weights & Biases."""

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
from fourm.train.nonfinite import without_not_finite
from fourm.train.options import Commands, RunOptions, saved_options
from fourm.utils.errors import PrintableFormatter, UserError
from fourm.utils.files import atomic_path
from fourm.utils.options import option
from fourm.utils.urls import without_secrets

log = logging.getLogger("fourm")
FILES = LOG, WANDB_ID = "log.jsonl", "wandb_id.txt"  # with which another machine continues the record


@dataclass(frozen=True, kw_only=True)
class LogOptions(RunOptions, Commands):
    """Log"""

    log_interval: int = option("optimizer steps between two log lines", 10, at_least=1)
    print_all: bool = option("let every rank print", False)
    show_user_warnings: bool = option("show Python warnings of the UserWarning kind", False)
    log_wandb: bool = option("log to Weights & Biases", False)
    wandb_project: str | None = option("project name", None)
    wandb_entity: str | None = option("user or team", None)
    wandb_run_name: str = option("'auto' = run_name", "auto")


class _Console(logging.Handler):
    """Lines that do not break the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "in_bar", False):
            return
        with contextlib.suppress(OSError):  # a terminal that was closed is no reason to end
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """``log.txt``, which ends with a warning if it cannot be written any more."""

    def handleError(self, record: logging.LogRecord) -> None:
        log.removeHandler(self)
        log.warning("%s: %s; it goes on without", self.baseFilename, sys.exc_info()[1])


@contextlib.contextmanager
def logging_of(options: LogOptions, main: bool) -> Iterator[None]:
    """Within it the main process writes to the console and to ``log.txt``; others only warnings, unless ``print_all``."""
    before = log.level, log.propagate
    log.propagate = False
    log.setLevel(logging.INFO if main or options.print_all else logging.WARNING)
    handlers: list[logging.Handler] = [_Console()]
    if main and not options.dry_run:
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(Path(options.output_dir) / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)
    try:
        yield
    finally:
        log.propagate = before[1]
        log.setLevel(before[0])
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class Journal:
    """The record of a run; only the main process has one that writes.

    ``log.jsonl`` holds an object per line: ``step``, ``epoch``, and the means of a logging interval or, under ``eval``,
    the results of an evaluation per data set.

    Args:
        step: at which the run goes on. Later lines, of an interrupted run that got further, are dropped.
        total_steps: of the whole run.
    """

    def __init__(self, options: LogOptions, step: int, total_steps: int, main: bool):
        self._main, self._total = main and not options.dry_run, total_steps
        self._path = Path(options.output_dir) / ("eval.jsonl" if options.eval else LOG)
        lines, damaged = _lines(self._path)
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
            log.warning("%s: %d lines are damaged; moved to %s", self._path, len(damaged), aside.name)
        self._file = self._path.open("a")
        if options.log_wandb:
            self._wandb = _wandb_run(options)
        if sys.stderr.isatty() and not options.eval:
            self._bar = tqdm(total=total_steps, initial=step, unit=" steps", dynamic_ncols=True)

    def interval(self, step: int, epoch: int, rates: dict[str, float], means: IntervalMeans, eta: float) -> None:
        """Report the means of a logging interval.

        Args:
            step: The optimizer step that ends it.
            rates: ``lr`` and ``weight_decay`` of this step.
            eta: Seconds to the end of the run.
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
        for what, found in (
            ("steps skipped for their loss or gradient norm", means.skipped_steps),
            ("the loss was not finite (share of the targets)", means.not_finite),
            ("bad samples", means.bad_samples),
        ):
            if found:
                log.warning("step %d: %s: %s", step, what, found)
        if means.missing:
            log.info("step %d: missing values: %s", step, _percent(means.missing), extra=in_bar)

    def evaluation(self, step: int, epoch: int, results: dict[str, dict[str, Results]]) -> None:
        """Report what an evaluation found, {data set: {kind: results}}: one line, all of it or nothing."""
        if not self._main:
            return
        lines = {name: {kind: found.line() for kind, found in kinds.items()} for name, kinds in results.items()}
        self._write({"step": step, "epoch": epoch, "eval": lines})
        for name, kind, found in ((name, *item) for name, kinds in results.items() for item in kinds.items()):
            parts = ", ".join(f"{part} {value:.3f}" for part, value in {**found.losses, **found.metrics}.items())
            log.info("eval %s (%s) at step %d: loss %.4f; %s", name, kind, step, found.loss, parts)
            if found.pictures:
                self._write_pictures(step, f"{name}-{kind}", found.pictures)
            if not math.isfinite(found.loss):
                log.warning("eval %s: the loss is not finite", name)
            if found.bad_samples:
                log.warning("eval %s: bad samples: %s", name, found.bad_samples)
            if found.missing:
                log.info("eval %s: missing values: %s", name, _percent(found.missing))

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
            raise UserError(f"{self._path}: {error.strerror or error}; make room there and start again") from error
        if self._wandb is not None:
            self._wandb.log(dict(_flat(line)), step=line["step"])

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
    """``1:02:03``"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _json(line: dict[str, Any]) -> str:
    """An object of JSON, which has no numbers that are not finite: null stands there, and ``null`` names the places."""
    line, places = without_not_finite(line)
    return json.dumps(line | ({"null": places} if places else {}), allow_nan=False)


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The lines of an earlier process, and those that are no lines of a log, as when it was killed within the last one."""
    lines, damaged, seen = [], [], set()
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text)
            if type(line["step"]) is not int or (text in seen and path.name == LOG):
                raise ValueError
            lines.append(line)
            seen.add(text)
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += [text] if text.strip() else []
    return lines, damaged


def _flat(line: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Nested numbers under names joined by slashes, as Weights & Biases groups them."""
    numbers: list[tuple[str, float]] = []
    for key, value in line.items():
        if isinstance(value, dict):
            numbers += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            numbers.append((prefix + key, value))
    return numbers


def _wandb_run(options: LogOptions) -> Any:
    """A Weights & Biases run that a resumed process takes up again."""
    import wandb

    identity = Path(options.output_dir) / WANDB_ID
    name = identity.read_bytes().strip() if identity.exists() else b""
    if not re.fullmatch(rb"[\w-]{1,128}", name):
        if name:
            log.warning("%s holds no name of a run; Weights & Biases gets a new one", identity)
        name = uuid.uuid4().hex.encode()
        with atomic_path(identity) as path:
            path.write_bytes(name)
    return wandb.init(
        project=options.wandb_project, entity=options.wandb_entity, name=options.wandb_run_name, id=name.decode(),
        resume="allow", dir=options.output_dir, config=saved_options(options),
        settings=wandb.Settings(x_disable_meta=without_secrets(sys.argv) != sys.argv),  # it would keep the command line
    )  # fmt: skip
