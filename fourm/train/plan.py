"""``--plan``: memory and time that a run needs on a given number of GPUs, computed without data, weights or a GPU.

The model is built on the meta device, and the task tells the cost of a step (:meth:`Task.step_cost`). Bytes per GPU,
for P parameters (tied ones counted once), of which B are in the largest block and E outside of the blocks, W GPUs that
share a copy of the model (``fsdp_shard_size``, or all), and c = 2 bytes in 16 bits, otherwise 4:

=============  =====================================  ==========================  ====================
strategy       parameters                             gradients                   optimizer (AdamW)
=============  =====================================  ==========================  ====================
DDP            4 P, and c per weight of a linear map  4 P                         8 P
FSDP, ZeRO-2   4 P/W + c P                            4 P/W + (4 + c) B           8 P/W
FSDP, ZeRO-3   4 P/W + c (E + 2 B)                    4 P/W + (4 + c) B           8 P/W
=============  =====================================  ==========================  ====================

Under DDP, c counts the copies that autocast makes. FSDP gathers parameters in c bytes; with ZeRO-3 these are the ones
outside of the blocks, a block and the next one. The gradients of a block wait to be reduced; with ``accum_iter`` the
whole gradient waits, in the bytes of ``fsdp_reduce_dtype``. A moving average of the weights adds 4 P to the parameters,
under FSDP 4 P/W. Muon keeps 4 bytes instead of 8 for the matrices of the blocks. Fragmentation of the allocator,
communication buffers and CUDA itself are not included.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fourm.train.config import RunConfig
from fourm.train.device import GPUS
from fourm.train.muon import block_matrices
from fourm.train.schedules import run_length
from fourm.train.task import Task
from fourm.utils.errors import UserError, did_you_mean

STRATEGIES = ("DDP", "FSDP, ZeRO-2", "FSDP, ZeRO-3")


@dataclass(frozen=True)
class Plan:
    """The figures of a run.

    Attributes:
        parameters: The numbers of parameters of :meth:`Task.count_parameters`.
        samples, tokens: The numbers per optimizer step.
        steps, total_tokens: The numbers of the whole run.
        flops: The operations of a step on one GPU.
        total_flops: The operations of the whole run on all GPUs.
        seconds_per_step, days: The times at ``plan_mfu``.
        memory: {strategy: {part: bytes on each GPU}}
    """

    parameters: dict[str, int]
    samples: int
    tokens: int
    steps: int
    total_tokens: int
    flops: float
    total_flops: float
    seconds_per_step: float
    days: float
    memory: dict[str, dict[str, float]]


def plan_run(task: Task, model: nn.Module) -> Plan:
    """Compute the figures of a run on ``plan_world_size`` GPUs of the type ``plan_gpu``.

    Args:
        model: The model, which may be on the meta device.

    Raises:
        UserError: The GPU is unknown, or settings do not fit together.
    """
    config: RunConfig = task.config
    if config.plan_gpu not in GPUS:
        near = did_you_mean(config.plan_gpu, GPUS)
        raise UserError(f"'plan_gpu': unknown '{config.plan_gpu}'{near}; the known GPUs are {', '.join(GPUS)}")
    world_size = config.plan_world_size
    steps = run_length(config, world_size).total_batches // config.accum_iter
    cost = task.step_cost(model)
    flops = cost.flops * config.accum_iter
    seconds = flops / (config.plan_mfu * GPUS[config.plan_gpu].tflops * 1e12)
    samples = config.batch_size * config.accum_iter * world_size
    return Plan(
        parameters=task.count_parameters(model),
        samples=samples,
        tokens=samples * config.tokens_per_sample,
        steps=steps,
        total_tokens=steps * samples * config.tokens_per_sample,
        flops=flops,
        total_flops=flops * world_size * steps,
        seconds_per_step=seconds,
        days=seconds * steps / 86400,
        memory={
            strategy: state_bytes(task, model, strategy, world_size) | {"activations": cost.activations}
            for strategy in STRATEGIES
        },
    )


def state_bytes(task: Task, model: nn.Module, strategy: str, world_size: int) -> dict[str, float]:
    """Return the bytes of parameters, gradients and optimizer on each GPU; see the table above."""
    config: RunConfig = task.config
    half = config.autocast_dtype != "float32"
    counts = task.count_parameters(model)
    total = sum(counts.values())
    states = {
        "adamw": 2 * total,
        "sgd": int(config.momentum > 0) * total,
        "muon": 2 * total - sum(matrix.numel() for matrix in block_matrices(task.blocks(model))),
    }[config.opt]
    c = 2 if half else 4
    average = 4 * total if config.model_ema else 0
    if strategy == "DDP":
        weights = {id(part.weight): part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear)}
        copies = c * sum(weights.values()) if half else 0
        return {"parameters": 4 * total + copies + average, "gradients": 4 * total, "optimizer": 4 * states}
    block = max((sum(p.numel() for p in block.parameters()) for block in task.blocks(model)), default=0)
    outside = list(counts.values())[-1]
    gathered = total if strategy == "FSDP, ZeRO-2" else min(outside + 2 * block, total)
    sharers = config.fsdp_shard_size or world_size
    if world_size % sharers:
        raise UserError(f"'fsdp_shard_size' {sharers} does not divide 'plan_world_size' {world_size}")
    shard, reduced = 4 * total / sharers, 2 if config.fsdp_reduce_dtype == "bfloat16" else 4
    waiting = reduced * total if config.accum_iter > 1 else (4 + c) * block
    return {
        "parameters": shard + c * gathered + average / sharers,
        "gradients": shard + waiting,
        "optimizer": 4 * states / sharers,
    }


def format_plan(task: Task, plan: Plan) -> str:
    """Format the plan as a text."""
    config: RunConfig = task.config
    gpu, world_size = GPUS[config.plan_gpu], config.plan_world_size
    recompute = "recomputed" if config.use_act_checkpoint else "kept"
    groups = ", ".join(f"{_with_si_prefix(count)} parameters of the {name}" for name, count in plan.parameters.items())
    tokens = f", {_with_si_prefix(plan.tokens)} tokens" if plan.tokens else ""
    total_tokens = f" {_with_si_prefix(plan.total_tokens)} tokens," if plan.tokens else ""
    rows = [
        ("run", f"{config.run_name} on {world_size} x {config.plan_gpu}, {config.dtype}"),
        ("model", groups),
        (
            "step",
            f"{plan.samples:,} samples ({world_size} x batch_size {config.batch_size} x accum_iter "
            f"{config.accum_iter}){tokens}, {_with_si_prefix(plan.flops)}FLOP on each GPU",
        ),
        ("length", f"{plan.steps:,} steps,{total_tokens} {_with_si_prefix(plan.total_flops)}FLOP"),
        (
            "time",
            f"{plan.days:.3g} days at {config.plan_mfu:.0%} of {gpu.tflops:g} TFLOP/s: {plan.seconds_per_step:.3g} s "
            f"a step, {plan.samples / plan.seconds_per_step:,.0f} samples/s"
            if plan.flops
            else "not known",
        ),
    ]
    lines = [f"{name:<13}{text}" for name, text in rows]
    lines += ["", f"{'GB on a GPU':<13}" + "".join(f"{name:>16}" for name in STRATEGIES)]
    for part in ("parameters", "gradients", "optimizer", "activations"):
        figures = "".join(f"{plan.memory[name][part] / 1e9:>16.1f}" for name in STRATEGIES)
        lines.append(f"{part:<13}{figures}{f'  ({recompute})' if part == 'activations' else ''}")
    totals = [sum(plan.memory[name].values()) / 1e9 for name in STRATEGIES]
    lines.append(f"{'together':<13}" + "".join(f"{total:>16.1f}" for total in totals))
    fits = ["yes" if total < 0.95 * gpu.memory else "no" for total in totals]
    lines.append(f"{f'fits {gpu.memory:g} GB':<13}" + "".join(f"{word:>16}" for word in fits))
    return "\n".join(lines)


def _with_si_prefix(value: float) -> str:
    """Format a number with an SI prefix, as in ``2.8 G``."""
    for power, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "
