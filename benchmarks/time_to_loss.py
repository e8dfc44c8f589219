"""Compare AdamW and Muon: the steps and the seconds in which they train a model to the same validation loss.

    fourm demo --stages render,vocabulary,tokenizers,tokenize --out demo_run
    python benchmarks/time_to_loss.py --data demo_run --out time_to_loss

Each optimizer first trains with the first seed and each of its learning rates, and then with the other seeds and the
learning rate that ended with the lowest loss. All runs have the same length and schedule, and differ in nothing but the
optimizer, the learning rate and the seed. The target is the loss with which AdamW ends, averaged over the seeds. A run
reaches it in the step in which the line through its evaluations crosses it; ``fewer_steps`` is the length of the runs
divided by the mean of these steps over the runs with Muon.

``fewer_seconds`` is this ratio divided by that of the costs of a step, which are medians over steps in which the
optimizers take turns on the same batches, in processor time and in wall-clock time. The benchmark prints JSON objects:
one for each run, and one for the comparison. The runs are ordinary training runs in folders of their own, so that an
interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

from fourm.demo.stages import Demo, DemoOptions
from fourm.train.config import load_config
from fourm.train.parallel import DDP
from fourm.train.run import Run, train
from fourm.train.tasks.pretrain import Pretrain, PretrainConfig
from fourm.utils.errors import run_cli

OPTIMIZERS = ("adamw", "muon")
WARM_UP = 2  # steps that are not timed


def shared_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return what all runs change in the configuration: the data, the length and the evaluations."""
    config = load_config(PretrainConfig, options.config)
    overrides: dict[str, Any] = {
        "epochs": 1,
        "epoch_size": options.steps * config.accum_iter * config.batch_size,
        "warmup_epochs": -1,
        "warmup_steps": options.steps * config.accum_iter // 10,
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
class Setting:
    """A run: the optimizer, its learning rate per 256 samples, and the seed."""

    opt: str
    blr: float
    seed: int

    def config(self, options: argparse.Namespace, shared: dict[str, Any]) -> PretrainConfig:
        folder = str(Path(options.out) / f"{self.opt}-{self.blr:g}-{self.seed}")
        own = dataclasses.asdict(self) | {"output_dir": folder, "muon_lr_scale": options.muon_lr_scale}
        return load_config(PretrainConfig, options.config, shared | own)

    def curve(self, options: argparse.Namespace, shared: dict[str, Any]) -> dict[int, float]:
        """Train, unless that is done already, and return the validation losses by step."""
        config = self.config(options, shared)
        folder = Path(config.output_dir)
        if not (folder / "model.safetensors").exists():
            with contextlib.redirect_stdout(sys.stderr):
                train(Pretrain, config, DDP)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        evaluations = [line for line in lines if "eval" in line]
        losses = {line["step"]: mean(kinds["train"]["loss"] for kinds in line["eval"].values()) for line in evaluations}
        print(json.dumps({"benchmark": "time_to_loss", **dataclasses.asdict(self), "losses": losses}), flush=True)
        return losses


def steps_to(loss: float, curve: dict[int, float]) -> float | None:
    """Return the step in which the line through the points of ``curve`` first is at ``loss``; None if it never is."""
    points = sorted(curve.items())
    for (before, high), (step, low) in pairwise([points[0], *points]):
        if low <= loss:
            return step - (step - before) * (loss - low) / (high - low) if high > low else step
    return None


def step_costs(best: dict[str, Setting], options: argparse.Namespace, shared: dict[str, Any]) -> dict[str, Any]:
    """Measure the seconds of a step; the optimizers take turns on the same batches."""
    runs = {}
    for opt, setting in best.items():
        config = setting.config(options, shared | {"eval_freq": 0})
        config = dataclasses.replace(config, output_dir=str(Path(options.out) / "cost"))  # where nothing is written
        with contextlib.redirect_stdout(sys.stderr):
            runs[opt] = Run(Pretrain(config), DDP(config))
    batches_per_epoch = options.steps * config.accum_iter
    batches = iter(runs["adamw"].task.train_batches(0, 1, batches_per_epoch, 0, {}, pin_memory=False))
    seconds: dict[str, list[tuple[float, float]]] = {opt: [] for opt in runs}
    with contextlib.closing(batches):
        for _ in range(WARM_UP + options.timed_steps):
            micro_batches = [next(batches) for _ in range(config.accum_iter)]
            for opt, run in runs.items():
                start = time.process_time(), time.perf_counter()
                run.trainer.train_step(micro_batches)
                seconds[opt].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    costs: dict[str, Any] = {}
    for k, clock in enumerate(("cpu_seconds", "seconds")):
        adamw, muon = ([pair[k] for pair in seconds[opt][WARM_UP:]] for opt in OPTIMIZERS)
        # The median of the ratios, because other work disturbs two steps in a row alike.
        ratio = median(b / a for a, b in zip(adamw, muon, strict=True))
        costs[clock] = {"adamw": median(adamw), "muon": median(muon), "ratio": ratio}
    return costs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="cfgs/demo/main.yaml", help="configuration of the runs")
    parser.add_argument("--data", help="folder of `fourm demo`; without it, the data that the configuration names")
    parser.add_argument("--out", default="time_to_loss", help="folder for the runs")
    parser.add_argument("--steps", type=int, default=2750, help="length of a run, which the schedule follows")
    parser.add_argument("--eval_every", type=int, default=50, help="steps between two evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--adamw_blr", type=float, nargs="+", default=[0.015, 0.03, 0.06], help="values of blr to try")
    parser.add_argument("--muon_blr", type=float, nargs="+", default=[0.015, 0.03, 0.06], help="values of blr to try")
    parser.add_argument("--muon_lr_scale", type=float, default=1.0, help="the option of this name")
    parser.add_argument("--timed_steps", type=int, default=20, help="steps of each optimizer that are timed")
    options = parser.parse_args(argv)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    shared = shared_overrides(options)
    best, curves = {}, {}
    for opt in OPTIMIZERS:
        tuning = {
            setting: setting.curve(options, shared)
            for setting in (Setting(opt, blr, options.seeds[0]) for blr in getattr(options, f"{opt}_blr"))
        }
        best[opt] = min(tuning, key=lambda setting: tuning[setting][options.steps])
        others = [dataclasses.replace(best[opt], seed=seed) for seed in options.seeds[1:]]
        curves[opt] = [tuning[best[opt]], *(setting.curve(options, shared) for setting in others)]
    target = mean(curve[options.steps] for curve in curves["adamw"])
    steps = {opt: [steps_to(target, curve) for curve in curves[opt]] for opt in OPTIMIZERS}
    costs = step_costs(best, options, shared)
    reached = [step for step in steps["muon"] if step is not None]
    ratio = options.steps / mean(reached) if len(reached) == len(options.seeds) else None
    result = {
        "benchmark": "time_to_loss",
        "target": target,
        "steps": options.steps,
        "blr": {opt: setting.blr for opt, setting in best.items()},
        "final_losses": {opt: [curve[options.steps] for curve in curves[opt]] for opt in OPTIMIZERS},
        "steps_to_target": steps,
        "fewer_steps": ratio,
        "cost_of_a_step": costs,
        "fewer_seconds": {clock: ratio and ratio / cost["ratio"] for clock, cost in costs.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_cli(main)
