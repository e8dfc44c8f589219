"""Compare ways to train: the steps and the seconds in which each reaches the validation loss of a base.

    fourm demo --stages render,vocabulary,tokenizers,tokenize --out demo_run
    python benchmarks/time_to_loss.py --data demo_run --out time_to_loss
    python benchmarks/time_to_loss.py --data demo_run --out time_to_loss --base demo \\
        --variants batches:batch_warmup_steps=20 stable:scheduler=wsd,cooldown_steps=20

The base and each variant are a name and the options that they change: the base those of the configuration, and a
variant those of the base. A key with a dot is an entry of a dictionary. If several values are separated by ``|``, each
is tried with the first seed, for one key after the other, and the one with the lowest loss at the end is kept. By
default, Muon is compared with AdamW.

All runs have the same length and, unless a variant has another schedule, a learning rate that warms up for a tenth of
it and then follows a cosine. Runs with the same seed have the same batches and validation targets and, as far as the
shapes agree, the same initial weights. The loss of a run that keeps a moving average of its weights is that of the
average.

A variant is compared with the base seed by seed. ``difference`` is that of the losses at the end, and is negative if
the variant is better. ``fewer_steps`` is the length of the runs divided by the step in which the line through the
evaluations of the variant crosses the last loss of the base; if the variant ends with a higher loss, it is the step in
which the base reaches this loss, divided by the length, and is below 1.

``fewer_seconds`` is this ratio divided by that of the mean costs of a step, in processor time and in wall-clock time.
They are means because a step may cost more at one time than at another, as in a batch-size warm-up: the steps that are
timed are spread evenly over the length of a run. In each of them, the base and the variants take turns on the same
batch. Of steps with the same number of updates, the median of the ratios counts, so that other work on the machine
hardly changes the result.

The benchmark prints JSON objects: one for each run, and one for each comparison. The runs are ordinary training runs in
folders of their own, so that an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import yaml

from fourm.demo.stages import Demo, DemoOptions
from fourm.train.config import load_config
from fourm.train.options import saved_options
from fourm.train.parallel import DDP
from fourm.train.run import Run, train
from fourm.train.tasks.pretrain import Pretrain, PretrainConfig
from fourm.utils.errors import UserError, run_cli

BASE = "adamw:opt=adamw,blr=0.012|0.006|0.024"
VARIANTS = ["muon:opt=muon,muon_lr_scale=2.5|1|5|10|20,blr=0.012|0.006|0.024|0.048"]
WARM_UP = 2  # steps that are not timed, before the first one with its number of updates
Curve = dict[int, float]  # validation losses by step


def shared_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return what all runs change in the configuration: the data, the length and the evaluations."""
    config = load_config(PretrainConfig, options.config)
    overrides: dict[str, Any] = {
        "epochs": 1,
        "epoch_size": options.steps * config.accum_iter * config.batch_size,
        "warmup_epochs": -1,
        "warmup_steps": options.steps * config.accum_iter // 10,
        "scheduler": "cosine",
        **dict.fromkeys(("cooldown_epochs", "cooldown_steps", "cooldown_tokens"), -1),
        "batch_warmup_steps": 0,
        "step_eval": True,
        "eval_freq": options.eval_every,
        "fixed_eval": False,
        "save_ckpt_freq": 0,
    }
    if options.data:
        folder = Path(options.data).resolve()
        given = json.loads((folder / "demo.json").read_text())["options"]
        demo = Demo(DemoOptions(out=str(folder), **given | {"config": options.config}))
        data_config = Path(options.out) / "data.yaml"
        data_config.write_text(yaml.safe_dump(demo.data_config, sort_keys=False))
        overrides |= {"data_config": str(data_config), "text_tokenizer_path": str(demo.vocabulary)}
    return overrides


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to train: the options that it changes, each with the values to try."""

    name: str
    values: Mapping[str, list[Any]]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read ``name`` or ``name:key=value,key=value|value``, where values are written as in YAML.

        Raises:
            UserError: The text is written in another way.
        """
        name, _, pairs = text.partition(":")
        values = {}
        for pair in pairs.split(",") if pairs else []:
            key, equals, tried = pair.partition("=")
            if not key or not equals:
                raise UserError(f"{text!r}: write a variant as name:key=value,key=value, and alternatives as key=a|b")
            values[key] = [yaml.safe_load(value) for value in tried.split("|")]
        if not name.isidentifier():
            raise UserError(f"{text!r}: the name of a variant consists of letters, digits and underscores")
        return cls(name, values)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run: the name of its variant, the values of its options, and the seed."""

    name: str
    overrides: dict[str, Any]
    seed: int

    @property
    def folder(self) -> Path:
        values = [f"{key}={value}".replace("/", "_") for key, value in sorted(self.overrides.items())]
        return Path(self.name, ",".join(values) or "unchanged", f"seed-{self.seed}")

    def config(self, options: argparse.Namespace, shared: dict[str, Any]) -> PretrainConfig:
        own: dict[str, Any] = {"output_dir": str(options.out / self.folder), "seed": self.seed}
        for key, value in self.overrides.items():
            name, dot, entry = key.partition(".")
            if dot:
                given = own.get(name) or getattr(load_config(PretrainConfig, options.config, shared), name)
                value = given | {entry: value}
            own[name] = value
        return load_config(PretrainConfig, options.config, shared | own)

    def curve(self, options: argparse.Namespace, shared: dict[str, Any]) -> Curve:
        """Train, unless that is done already, and return the validation losses by step.

        Raises:
            UserError: What was done already is a run with other options.
        """
        config = self.config(options, shared)
        folder = Path(config.output_dir)
        if not (folder / "model.safetensors").exists():
            with contextlib.redirect_stdout(sys.stderr):
                status = train(Pretrain, config, DDP)
            if status:  # a signal has stopped the run, and the next start continues it
                sys.exit(status)
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        own = yaml.safe_load(yaml.safe_dump(saved_options(config)))
        fixed = [field.name for field in dataclasses.fields(config) if field.metadata.get("fixed")]
        different = [key for key in fixed if saved.get(key) != own[key]]
        if different:
            raise UserError(f"{folder} is a run with another {', '.join(different)}: choose another --out")
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        evaluations = [line for line in lines if "eval" in line]
        kind = "train_ema" if config.model_ema else "train"
        losses = {line["step"]: mean(kinds[kind]["loss"] for kinds in line["eval"].values()) for line in evaluations}
        print(json.dumps({"benchmark": "time_to_loss", **dataclasses.asdict(self), "losses": losses}), flush=True)
        return losses


def final_loss(curve: Curve) -> float:
    return curve[max(curve)]


def tune(variant: Variant, base: dict[str, Any], seed: int, curve: Callable[[Setting], Curve]) -> Setting:
    """Return the run of a variant whose values ended with the lowest loss; ``base`` is what the base changes."""
    overrides = base | {key: values[0] for key, values in variant.values.items()}
    for key, values in variant.values.items():
        settings = [Setting(variant.name, overrides | {key: value}, seed) for value in values]
        if len(settings) > 1:
            overrides = min(settings, key=lambda setting: final_loss(curve(setting))).overrides
    return Setting(variant.name, overrides, seed)


def steps_to(loss: float, curve: Curve) -> float | None:
    """Return the step in which the line through the points of ``curve`` first is at ``loss``; None if it never is."""
    points = sorted(curve.items())
    for (before, high), (step, low) in pairwise([points[0], *points]):
        if low <= loss:
            return step - (step - before) * (loss - low) / (high - low) if high > low else step
    return None


def fewer_steps(base: Curve, variant: Curve) -> float:
    """Return the ratio of the steps of the base to those of the variant at the higher one of their last losses."""
    if final_loss(variant) <= final_loss(base):
        reached = steps_to(final_loss(base), variant)
        assert reached is not None
        return max(base) / reached
    reached = steps_to(final_loss(variant), base)
    assert reached is not None
    return reached / max(variant)


def step_costs(
    settings: Sequence[Setting], options: argparse.Namespace, shared: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Measure the mean seconds of a step of each variant and of the base, which is the first of ``settings``."""
    runs = {}
    for setting in settings:
        config = setting.config(options, shared | {"eval_freq": 0})
        config = dataclasses.replace(config, output_dir=str(options.out / "cost"))  # where nothing is written
        with contextlib.redirect_stdout(sys.stderr):
            runs[setting.name] = Run(Pretrain(config), DDP(config))
    base, *others = runs
    config = runs[base].config
    batches = iter(runs[base].task.train_batches(0, 1, options.steps * config.accum_iter, 0, {}, pin_memory=False))
    steps = [(2 * k + 1) * options.steps // (2 * options.timed_steps) for k in range(options.timed_steps)]
    updates = {name: [run.task.updates(step) for step in steps] for name, run in runs.items()}
    kinds = [*zip(*updates.values(), strict=True)]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    with contextlib.closing(batches):
        for number, step in enumerate(steps):
            for untimed in range(0 if kinds[number] in kinds[:number] else WARM_UP, -1, -1):
                micro_batches = [next(batches) for _ in range(config.accum_iter)]
                for name, run in runs.items():
                    run.trainer.step = step  # which decides how many updates the step makes
                    start = time.process_time(), time.perf_counter()
                    run.trainer.train_step(micro_batches)
                    if not untimed:
                        seconds[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    costs: dict[str, dict[str, Any]] = {name: {} for name in others}
    for name in others:
        of_pair = [*zip(updates[base], updates[name], strict=True)]
        for k, clock in enumerate(("cpu_seconds", "seconds")):
            ours, theirs = ([pair[k] for pair in seconds[key]] for key in (base, name))
            costs[name][clock] = dict(zip((base, name, "ratio"), mean_costs(of_pair, ours, theirs), strict=True))
    return costs


def mean_costs(kinds: Sequence[Any], ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean costs of our and their steps, and the ratio of the second to the first.

    Args:
        kinds: The kind of each step; steps of a kind should cost the same.
        ours, theirs: The cost of each step, which were measured one after the other.
    """
    of_kinds = defaultdict(list)
    for kind, *pair in zip(kinds, ours, theirs, strict=True):
        of_kinds[kind].append(pair)
    our_sum = their_sum = 0.0
    for pairs in of_kinds.values():
        our_cost = len(pairs) * median(our for our, _ in pairs)
        our_sum += our_cost
        # The median of the ratios, because other work disturbs two steps in a row alike.
        their_sum += our_cost * median(their / our for our, their in pairs)
    return our_sum / len(kinds), their_sum / len(kinds), their_sum / our_sum


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="cfgs/demo/main.yaml", help="configuration of the runs")
    parser.add_argument("--data", help="folder of `fourm demo`; without it, the data that the configuration names")
    parser.add_argument("--out", type=Path, default="time_to_loss", help="folder for the runs")
    parser.add_argument("--steps", type=int, default=60, help="length of a run, which the schedule follows")
    parser.add_argument("--eval_every", type=int, default=15, help="steps between two evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base", default=BASE, help="what the others are compared with (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="what is compared (default: %(default)s)")
    parser.add_argument("--timed_steps", type=int, default=20, help="steps of each that are timed, over its length")
    options = parser.parse_args(argv)
    base, *variants = (Variant.parse(text) for text in (options.base, *options.variants))
    if len({variant.name for variant in (base, *variants)}) <= len(variants):
        raise UserError("--base and --variants: two have the same name; give each a name of its own")
    options.out.mkdir(parents=True, exist_ok=True)
    shared = shared_overrides(options)
    done: dict[Path, Curve] = {}

    def curve(setting: Setting) -> Curve:
        if setting.folder not in done:
            done[setting.folder] = setting.curve(options, shared)
        return done[setting.folder]

    best = [tune(base, {}, options.seeds[0], curve)]
    best += [tune(variant, best[0].overrides, options.seeds[0], curve) for variant in variants]
    curves = {way.name: [curve(dataclasses.replace(way, seed=seed)) for seed in options.seeds] for way in best}
    final = {name: [final_loss(curve) for curve in of_seeds] for name, of_seeds in curves.items()}
    for name, cost in step_costs(best, options, shared).items():
        differences = [loss - reference for reference, loss in zip(final[base.name], final[name], strict=True)]
        ratios = [fewer_steps(*pair) for pair in zip(curves[base.name], curves[name], strict=True)]
        result = {
            "benchmark": "time_to_loss",
            "steps": options.steps,
            "overrides": {way.name: way.overrides for way in best if way.name in (base.name, name)},
            "final_losses": {key: final[key] for key in (base.name, name)},
            "difference": {"mean": mean(differences), "stdev": stdev(differences) if len(differences) > 1 else None},
            "fewer_steps": mean(ratios),
            "fewer_steps_by_seed": ratios,
            "cost_of_a_step": cost,
            "fewer_seconds": {clock: mean(ratios) / cost[clock]["ratio"] for clock in cost},
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run_cli(main)
