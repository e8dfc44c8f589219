"""Benchmark the training step: samples/s, TFLOP/s, MFU and memory over a matrix of settings, compared with a baseline.

    python benchmarks/train_step.py                                       # a step at width 384, and its speed-up
    python benchmarks/train_step.py --model tiny small base large --modalities 7 21 --batch_size 1 --no_baseline --fit
    python benchmarks/train_step.py --padding 0.1 --without packing recomputed_products
    python benchmarks/train_step.py --model base --batch_size 128 --device cuda --dtype bfloat16 --compile
    torchrun --nproc_per_node=8 benchmarks/train_step.py --model base --batch_size 128 --device cuda \
        --dtype bfloat16 --compile

It prints a JSON object per setting. It measures ``Trainer.train_step`` itself on one synthetic batch. The baseline
alternates with it in the same process, on the same model: it embeds all tokens before it selects any, computes
attention as softmax(QK^T)V, selects each modality's targets by a boolean index, reads the losses one by one, and uses
an AdamW that is not fused. ``--without`` also measures the step with single optimizations switched off. Besides the
wall-clock time it reports the CPU time of all threads (``cpu_seconds``), which other work disturbs less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from ablations import SWITCHES, effective
from embed_all import embed_all_loss, saved_bytes, synthetic_batch

from fourm.data.modality_transforms import RGBTransform
from fourm.data.unified_datasets import Batch
from fourm.models import FM, MODEL_NAMES, count_parameters, model_config
from fourm.train.config import load_config
from fourm.train.device import autocast, peak_tflops
from fourm.train.fsdp import FSDP
from fourm.train.optimizer import build_optimizer
from fourm.train.parallel import DDP
from fourm.train.schedules import build_schedule, run_length
from fourm.train.step import Trainer
from fourm.train.task import Task
from fourm.train.tasks.pretrain import Pretrain, PretrainConfig, normalise
from fourm.utils.errors import UserError, run_cli
from fourm.utils.memory import keep_freed_memory

PIXELS = "rgb@224"
TARGETS = [
    "tok_rgb@224",
    "tok_depth@224",
    "tok_normal@224",
    "tok_semseg@224",
    "tok_clip@224",
    "caption",
    "det",
    "tok_canny_edge@224",
    "tok_sam_edge@224",
    "tok_dinov2@224",
    "tok_imagebind@224",
    "metadata",
    "color_palette",
    "tok_dinov2_global",
    "tok_imagebind_global",
    "human_poses",
    "sam_instance",
]
DOMAINS = {  # inputs and targets; 7 and 21 are the published mixtures
    7: ([PIXELS, *TARGETS[:7]], TARGETS[:7]),
    14: ([PIXELS, *TARGETS[:13]], TARGETS[:13]),
    21: ([PIXELS, "t5_caption", *TARGETS], TARGETS),
}


TOY = {"dim": 48, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2}


class Setting(NamedTuple):
    """What a line of the output is about."""

    model: str
    modalities: int
    batch_size: int
    residual_dtype: str
    padding: float


def full_name(model: str) -> str:
    """Expand the size of a model to its name: ``tiny`` → ``fm_tiny_6e_6d_swiglu_nobias``."""
    return next((n for n in MODEL_NAMES if n.startswith(f"fm_{model}_") and n.endswith("d_swiglu_nobias")), model)


def build_config(
    options: argparse.Namespace, model_name: str, batch_size: int, residual_dtype: str = "float32"
) -> PretrainConfig:
    return load_config(
        PretrainConfig,
        None,
        {
            "model": model_name,
            "batch_size": batch_size,
            "epochs": 1,
            "num_input_tokens": options.tokens,
            "num_target_tokens": options.tokens,
            "device": options.device,
            "dtype": options.dtype,
            "blr": 1e-6,
            "use_act_checkpoint": options.act_checkpoint,
            "peak_tflops": options.peak_tflops,
            "opt": options.opt,
            "momentum": 0.0,
            "compile": options.compile,
            "residual_dtype": residual_dtype,
        },
    )


def build_parallel(options: argparse.Namespace, config: PretrainConfig) -> DDP:
    """Return the parallel strategy; with ``--fsdp`` even a single process shards, to run that code on a single GPU."""
    parallel = FSDP(config) if options.fsdp else DDP(config)
    if isinstance(parallel, FSDP) and not parallel.distributed:
        backend = "cpu:gloo,cuda:nccl" if parallel.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        parallel.distributed, parallel._mesh = True, parallel._build_mesh(1)
    return parallel


class Synthetic(Pretrain):
    """Pretraining without data."""

    def __init__(self, config: PretrainConfig, modalities: int):
        Task.__init__(self, config)
        self.losses = list(DOMAINS[modalities][1])
        self.slots = config.num_input_tokens, config.num_target_tokens
        self._flops = None


def build_trainer(options: argparse.Namespace, parallel: DDP, setting: Setting) -> Trainer:
    config = build_config(options, setting.model, setting.batch_size, setting.residual_dtype)
    task = Synthetic(config, setting.modalities)
    torch.manual_seed(0)
    more = {"share_embedding": True, "use_act_checkpoint": options.act_checkpoint, **(TOY if options.toy else {})}
    with torch.device("meta"):
        model = FM(model_config(setting.model, *DOMAINS[setting.modalities], **more))
    model.residual_dtype = getattr(torch, config.residual_dtype)
    parallel.materialise(model, task.parts(model))
    if options.compile:
        task.compile(model, backend="aot_eager" if options.toy else "inductor")
    length = run_length(config, parallel.world_size)
    schedule = build_schedule(config, length, parallel.world_size)
    optimizer = build_optimizer(model, config, task.blocks(model), parallel)
    return Trainer(config, task, parallel, model, optimizer, schedule)


def synthetic(model: FM, batch_size: int, tokens: int, padding: float) -> Batch:
    """Make a batch in which the modalities of a sample have the same number of tokens; the pictures are in 8 bits.

    Each sample lacks every modality with probability ``padding``, and is padded with as many slots.
    """
    shares = tokens // len(model.encoder_embeddings), tokens // len(model.decoder_embeddings)
    modalities = {name: model.modality_info[name] for name in model.encoder_embeddings}
    mod_dict = synthetic_batch(modalities, batch_size, *shares)
    generator = torch.Generator().manual_seed(0)
    for entry in mod_dict.values():
        for mask in (entry["input_mask"], entry["target_mask"]):
            mask[torch.rand(batch_size, generator=generator) < padding] = True
    mod_dict[PIXELS]["tensor"] = torch.randint(0, 256, mod_dict[PIXELS]["tensor"].shape, dtype=torch.uint8)
    position = {"stream": 0, "epoch": 0, "draws": 0, "skipped": {}, "missing": {}}
    return Batch(mod_dict, position, {PIXELS: RGBTransform(raw=True).scaling})


def trainer_loss(trainer: Trainer, batch: Batch) -> torch.Tensor:
    with autocast(trainer.config, trainer.parallel.device):
        inputs = trainer.task.prepare(trainer.model, batch, trainer.parallel.device)
        return trainer.task.loss(trainer.model, inputs).total


def baseline(trainer: Trainer, batch: Batch) -> tuple[Callable[[], float], Callable[[], torch.Tensor]]:
    """Return a training step in its simplest form, and its loss alone."""
    model, config, device = trainer.model, trainer.config, trainer.parallel.device
    pixels = {"tensor": normalise(batch.mod_dict[PIXELS]["tensor"], *batch.scaling[PIXELS])}
    on_host = batch.mod_dict | {PIXELS: batch.mod_dict[PIXELS] | pixels}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=False)

    def forward() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mod_dict = {name: {k: v.to(device) for k, v in entry.items()} for name, entry in on_host.items()}
        with autocast(config, device):
            return embed_all_loss(model, mod_dict, config.num_input_tokens, config.num_target_tokens)

    def step() -> float:
        loss, losses = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for modality_loss in losses.values():
            modality_loss.item()
        return loss.item()

    return step, lambda: forward()[0]


def switched_off(name: str, model: FM, function: Callable[[], Any]) -> Callable[[], Any]:
    """Return ``function`` without the optimization."""

    def without() -> Any:
        with SWITCHES[name](model):
            return function()

    return without


def write_trace(path: Path, trainer: Trainer, batch: Batch) -> None:
    """Write a Chrome trace of one step of the main process."""
    with torch.profiler.profile() as profile:
        trainer.train_step([batch])
    if trainer.parallel.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))


def alternate(variants: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Measure the seconds per step of each variant, alternately; the first round warms up."""
    times: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "cpu_seconds": []} for name in variants}
    for round_ in range(options.rounds + 1):
        for name, step in variants.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(options.steps):
                step()
            if options.device.startswith("cuda"):
                torch.cuda.synchronize()
            if round_:
                times[name]["seconds"].append((time.perf_counter() - start) / options.steps)
                times[name]["cpu_seconds"].append((time.process_time() - start_cpu) / options.steps)
    return times


def step_memory(step: Callable[[], Any], forward: Callable[[], torch.Tensor], trainer: Trainer) -> int:
    """Return the temporary memory of a step in bytes: on a GPU its peak, on the CPU the saved activations."""
    device = trainer.parallel.device
    if device.type != "cuda":
        return saved_bytes(forward, trainer.model)
    step()  # allocates what stays, such as the states of the optimizer
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def measure(options: argparse.Namespace, parallel: DDP, setting: Setting, trace: Path | None) -> dict[str, Any]:
    """Measure one setting."""
    trainer = build_trainer(options, parallel, setting)
    model, config = trainer.model, trainer.config
    batch = synthetic(model, setting.batch_size, options.tokens, setting.padding)
    ours = batch.pin_memory() if parallel.device.type == "cuda" else batch
    variants: dict[str, Callable[[], Any]] = {"ours": lambda: trainer.train_step([ours])}
    losses: dict[str, Callable[[], torch.Tensor]] = {"ours": lambda: trainer_loss(trainer, batch)}
    if options.baseline and not parallel.distributed:
        variants["baseline"], losses["baseline"] = baseline(trainer, batch)
    for name in effective(setting.padding) if options.without == [] else options.without or []:
        variants[name] = switched_off(name, model, variants["ours"])
        losses[name] = switched_off(name, model, losses["ours"])
    result: dict[str, Any] = compare(trainer, variants, losses) if len(variants) > 1 else {}
    times = alternate(variants, options)
    trainer.interval.means(parallel)
    for _ in range(options.steps):
        variants["ours"]()
    means = trainer.interval.means(parallel)
    if trace:
        write_trace(trace, trainer, ours)
    flops = trainer.task.prepare(model, batch, parallel.device).flops
    strategy = "fsdp" if options.fsdp else "ddp" if parallel.distributed else "single"
    seconds = median(times["ours"]["seconds"])
    tflops = flops / seconds / 1e12
    if peak := peak_tflops(config, parallel.device):
        result["mfu"] = tflops / peak
    for name, comparison in result.get("compared", {}).items():
        comparison |= compared(times["ours"], times[name])
    return {
        **setting._asdict(),
        "tokens": options.tokens,
        "compile": options.compile,
        "strategy": strategy,
        "world_size": parallel.world_size,
        "device": describe_device(parallel.device),
        "dtype": config.autocast_dtype,
        "torch_threads": torch.get_num_threads(),
        "parameters": count_parameters(model),
        "seconds_per_step": seconds,
        "cpu_seconds_per_step": median(times["ours"]["cpu_seconds"]),
        "samples_per_second": setting.batch_size * parallel.world_size / seconds,
        "flops_per_step": flops,
        "tflops": tflops,
        "peak_memory": means.peak_memory,
        "seconds_in_phases": means.seconds,
        **result,
    }


def compare(
    trainer: Trainer, variants: dict[str, Callable[[], Any]], losses: dict[str, Callable[[], torch.Tensor]]
) -> dict[str, Any]:
    """Compare the losses, which must be equal, and the memory of all variants."""
    values = {name: loss().item() for name, loss in losses.items()}
    tolerance = 1e-5 if trainer.config.autocast_dtype == "float32" else 0.02
    assert all(abs(value / values["ours"] - 1) < tolerance for value in values.values()), values
    memory = {name: step_memory(variants[name], losses[name], trainer) for name in variants}
    ratios = {name: {"memory_ratio": memory[name] / memory["ours"]} for name in variants if name != "ours"}
    return {"loss": values, "step_memory": memory, "compared": ratios}


def compared(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, float]:
    """Return how long steps of a variant took, and the median of the ratios to our steps that they took turns with."""
    result = {}
    for clock in ("seconds", "cpu_seconds"):
        ratios = [other / own for other, own in zip(theirs[clock], ours[clock], strict=True)]
        result[f"{clock}_per_step"] = median(theirs[clock])
        result[f"speed_up_in_{clock}"] = median(ratios)
        result[f"range_in_{clock}"] = [min(ratios), max(ratios)]
    return result


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def fitted(rows: list[dict[str, Any]], clock: str) -> dict[str, float]:
    """Fit the exponents of the step time as a function of several sizes, by least squares of the logarithms."""
    exponents = {}
    for name, size in {
        "parameters of the trunk": lambda row: row["parameters"]["trunk"],
        "flops per step": lambda row: row["flops_per_step"],
        "modalities": lambda row: row["modalities"],
    }.items():
        # Compare only rows that agree in the other settings.
        groups: dict[Any, list[tuple[float, float]]] = {}
        for row in rows:
            other = row["model"] if name == "modalities" else row["modalities"]
            groups.setdefault((other, row["batch_size"]), []).append((np.log(size(row)), np.log(row[clock])))
        centred = [np.array(points) - np.mean(points, axis=0) for points in groups.values()]
        x, y = np.concatenate(centred).T
        if x.any():
            exponents[name] = float(x @ y / (x @ x))
    return exponents


def settings(options: argparse.Namespace) -> list[Setting]:
    models = map(full_name, options.model)
    matrix = itertools.product(models, options.modalities, options.batch_size, options.residual_dtype, options.padding)
    return [Setting(*values) for values in matrix]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny"], help="sizes (tiny … xlarge), or names of models")
    parser.add_argument("--modalities", nargs="+", type=int, choices=DOMAINS, default=[7])
    parser.add_argument("--batch_size", nargs="+", type=int, default=[8], help="samples per process")
    parser.add_argument("--tokens", type=int, default=128, help="token budget of the encoder and of the decoder")
    parser.add_argument(
        "--padding", nargs="+", type=float, default=[0.0], help="share of the slots that samples leave empty, at random"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--residual_dtype", nargs="+", default=["float32"], help="precision of the residual stream")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fsdp", action="store_true", help="shard the model, even in a single process")
    parser.add_argument("--toy", action="store_true", help="use a model of one narrow block, to test the command")
    parser.add_argument("--act_checkpoint", action="store_true")
    parser.add_argument("--peak_tflops", type=float, help="peak of the GPU for the MFU, if its name is unknown")
    parser.add_argument(
        "--opt", choices=["adamw", "muon", "sgd"], default="adamw", help="plain sgd takes half of the memory"
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds of each variant")
    parser.add_argument("--steps", type=int, default=1, help="steps per round; use 10 on a GPU")
    parser.add_argument("--free", action="store_true", help="return freed memory to the system, unlike in training")
    parser.add_argument("--no_baseline", dest="baseline", action="store_false", help="do not measure the baseline")
    parser.add_argument(
        "--without",
        nargs="*",
        choices=SWITCHES,
        help="also measure the step without each of these; without names, without each that has an effect",
    )
    parser.add_argument("--trace", type=Path, help="write a Chrome trace of a step of the last setting to this file")
    parser.add_argument("--fit", action="store_true", help="print the exponents of time as a function of size")
    options = parser.parse_args()
    if options.without is not None and (options.compile or options.fsdp):
        raise UserError("--without replaces functions of an eager, unsharded model: leave out --compile and --fsdp")
    if options.device == "cpu" and not options.free:
        keep_freed_memory()
    # Use one process group for all settings, because a second one would rendezvous at the stale addresses of the first.
    parallel = build_parallel(options, build_config(options, full_name(options.model[0]), options.batch_size[0]))
    rows: list[dict[str, Any]] = []
    matrix = settings(options)
    for setting in matrix:
        rows.append(measure(options, parallel, setting, options.trace if setting == matrix[-1] else None))
        if parallel.is_main:
            print(json.dumps({"benchmark": "train_step", **rows[-1]}), flush=True)
    parallel.close()
    if options.fit and parallel.is_main:
        clock = "cpu_seconds_per_step" if options.device == "cpu" else "seconds_per_step"
        print(json.dumps({f"exponents of {clock}": fitted(rows, clock)}))


if __name__ == "__main__":
    run_cli(main)
