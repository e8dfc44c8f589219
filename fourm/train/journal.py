"""Where a run reports: a progress bar or lines on the console, ``log.txt``, ``log.jsonl`` and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fourm.train.config import TrainConfig, to_dict
from fourm.utils.errors import MissingDependency
from fourm.utils.files import atomic_path

log = logging.getLogger("fourm")
FILES = LOG, WANDB_ID = "log.jsonl", "wandb_id.txt"  # with which another machine continues the record


class _Console(logging.Handler):
    """Lines that do not break the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "in_bar", False):
            return
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def logging_of(config: TrainConfig, main: bool) -> Iterator[None]:
    """Within it the main process writes to the console and to ``log.txt``; others only warnings, unless ``print_all``."""
    before = log.level, log.propagate
    log.propagate = False
    log.setLevel(logging.INFO if main or config.print_all else logging.WARNING)
    handlers: list[logging.Handler] = [_Console()]
    if main and not config.dry_run:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(Path(config.output_dir) / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
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

    def __init__(self, config: TrainConfig, step: int, total_steps: int, main: bool):
        self._main, self._total = main and not config.dry_run, total_steps
        self._path = Path(config.output_dir) / ("eval.jsonl" if config.eval else LOG)
        kept = [line for line in _lines(self._path) if config.eval or line["step"] <= step]
        self.evaluated = any("eval" in line for line in kept if line["step"] == step)
        self._wandb = None
        self._bar = None
        if not self._main:
            return
        with atomic_path(self._path) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a")
        if config.log_wandb:
            self._wandb = _wandb_run(config)
        if sys.stderr.isatty() and not config.eval:
            self._bar = tqdm(total=total_steps, initial=step, unit=" steps", dynamic_ncols=True)

    def interval(self, line: dict[str, Any]) -> None:
        """Report the means of a logging interval."""
        if not self._main:
            return
        self._write(line)
        speed = f"{line['samples_per_second']:.4g} samples/s, {line['tokens_per_second']:.4g} tokens/s"
        speed += f", MFU {line['mfu']:.1%}" if "mfu" in line else f", {line['tflops']:.3g} TFLOP/s"
        facts = f"loss {line['loss']:.4f}, lr {line['lr']:.3g}, {speed}, waiting for data {line['data_wait']:.0%}, "
        facts += f"peak memory {line['peak_memory'] / 1e9:.3g} GB"
        if self._bar is not None:
            self._bar.update(line["step"] - self._bar.n)
            self._bar.set_postfix_str(facts)
        log.info(
            "step %d/%d, %s, ETA %s", line["step"], self._total, facts, duration(line["eta_seconds"]),
            extra={"in_bar": self._bar is not None},
        )  # fmt: skip
        for key, what in (("skipped_steps", "steps skipped: gradient norm"), ("bad_samples", "bad samples")):
            if line[key]:
                log.warning("step %d: %s: %s", line["step"], what, line[key])
        if line["missing"]:
            log.info(
                "step %d: missing values: %s", line["step"], _percent(line["missing"]), extra={"in_bar": self._bar is not None}
            )  # fmt: skip

    def evaluation(self, step: int, epoch: int, results: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Report what an evaluation found, {data set: {kind of budgets: result}}: one line, all of it or nothing."""
        if not self._main:
            return
        self._write({"step": step, "epoch": epoch, "eval": results})
        for name, kind, result in ((name, *item) for name, kinds in results.items() for item in kinds.items()):
            parts = ", ".join(f"{modality} {loss:.3f}" for modality, loss in result["per_modality"].items())
            log.info("eval %s (%s budgets) at step %d: loss %.4f; %s", name, kind, step, result["loss"], parts)
            if result["bad_samples"]:
                log.warning("eval %s: bad samples: %s", name, result["bad_samples"])
            if result["missing"]:
                log.info("eval %s: missing values: %s", name, _percent(result["missing"]))

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
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


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier process; it may have been killed within the last one."""
    lines = path.read_text().splitlines() if path.exists() else []
    with contextlib.suppress(IndexError, json.JSONDecodeError):
        json.loads(lines[-1])
        return [json.loads(line) for line in lines]
    return [json.loads(line) for line in lines[:-1]]


def _flat(line: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Nested numbers under names joined by slashes, as Weights & Biases groups them."""
    numbers: list[tuple[str, float]] = []
    for key, value in line.items():
        if isinstance(value, dict):
            numbers += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            numbers.append((prefix + key, value))
    return numbers


def _wandb_run(config: TrainConfig) -> Any:
    """A Weights & Biases run that a resumed process takes up again."""
    try:
        import wandb
    except ImportError as error:
        raise MissingDependency("wandb", "'log_wandb'") from error
    identity = Path(config.output_dir) / WANDB_ID
    if not identity.exists():
        with atomic_path(identity) as path:
            path.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=config.wandb_project, entity=config.wandb_entity, name=config.wandb_run_name, id=identity.read_text(),
        resume="allow", dir=config.output_dir, config=to_dict(config),
    )  # fmt: skip
