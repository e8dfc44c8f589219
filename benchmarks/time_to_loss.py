"""Compare AdamW and Muon: the steps and the seconds in which they train a model to the same validation loss.

    fourm demo --stages render,vocabulary,codebooks,tokenize --out demo_run
    python benchmarks/time_to_loss.py --data demo_run --out time_to_loss

Each optimizer first trains with the first seed and each of its learning rates, and then with the other seeds and the
learning rate that ended with the lowest loss. All runs have the same length and schedule, and differ in nothing but the
optimizer, the learning rate and the seed. The target is the loss with which AdamW ends, averaged over the seeds. A run
reaches it in the step in which the line through its evaluations crosses it.

The seconds are steps x cost of a step. The cost is a median over steps in which the optimizers take turns on the same
batches, in processor time and in wall-clock time. It prints JSON objects: one for each run, and one for the comparison.
The runs are ordinary training runs in folders of their own, so that an interrupted benchmark continues.
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


def shared_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return what all runs change in the configuration: the data, the length and the evaluations."""
    batch_size = load_config(PretrainConfig, options.config).batch_size
    overrides: dict[str, Any] = {
        "epochs": 1, "epoch_size": options.steps * batch_size, "step_eval": True, "eval_freq": options.eval_every,
        "fixed_eval": False, "warmup_epochs": -1, "warmup_steps": options.steps // 10, "save_ckpt_freq": 0,
    }  # fmt: skip
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
    for (before, high), (step, low) in pairwise(sorted(curve.items())):
        if low <= loss:
            return step if high <= low else before + (step - before) * min(1.0, (high - loss) / (high - low))
    return None


def step_costs(best: dict[str, Setting], options: argparse.Namespace, shared: dict[str, Any]) -> dict[str, Any]:
    """Measure seconds per step; the optimizers take turns on the same batches."""
    config = next(iter(best.values())).config(options, shared)
    runs = {
        opt: Run(
            Pretrain(dataclasses.replace(config, opt=opt, output_dir=f"{options.out}/cost", eval_freq=0)), DDP(config)
        )
        for opt in best
    }
    task = next(iter(runs.values())).task
    batches = iter(task.train_batches(0, 1, options.steps, 0, None, pin_memory=False))
    seconds: dict[str, list[tuple[float, float]]] = {opt: [] for opt in runs}
    for _ in range(options.timed_steps + 2):
        micro_batches = [next(batches) for _ in range(config.accum_iter)]
        for opt, run in runs.items():
            begin = time.process_time(), time.perf_counter()
            run.trainer.train_step(micro_batches)
            seconds[opt].append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    batches.close()
    clocks = ("cpu_seconds", "seconds")
    medians = {
        opt: dict(zip(clocks, map(median, zip(*values[2:], strict=True)), strict=True))
        for opt, values in seconds.items()
    }
    # The median of the ratios, because other work disturbs both steps of a pair alike.
    pairs = list(zip(*(values[2:] for values in seconds.values()), strict=True))
    ratios = {clock: median(muon[k] / adamw[k] for adamw, muon in pairs) for k, clock in enumerate(clocks)}
    return {"per_step": medians, "muon_per_adamw": ratios}


def main() -> None:
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
    options = parser.parse_args()
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
    # An AdamW run that ends above the mean of the runs does not reach it; each of them has this many steps to do so.
    reached = [step for step in steps["muon"] if step is not None]
    ratio = options.steps / mean(reached) if len(reached) == len(options.seeds) else None
    print(
        json.dumps(
            {
                "benchmark": "time_to_loss", "target": target, "steps": options.steps,
                "blr": {opt: setting.blr for opt, setting in best.items()},
                "final_losses": {opt: [curve[options.steps] for curve in curves[opt]] for opt in OPTIMIZERS},
                "steps_to_target": steps, "fewer_steps": ratio, "cost": costs,
                "fewer_seconds": ratio and {
                    clock: ratio / factor for clock, factor in costs["muon_per_adamw"].items()
                },
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
