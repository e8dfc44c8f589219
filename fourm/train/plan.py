"""``--plan``: what a run needs on a given number of GPUs, worked out without data, weights or a GPU.

The model is built on the meta device. Operations come from :mod:`fourm.models.flops`, activations from
:mod:`fourm.models.activations`; how many tokens of which modality a batch has is the mean over budgets drawn as masking
draws them. Bytes per GPU, with P parameters (a tied one once) of which B in the largest block, W GPUs that share the model
(``fsdp_shard_size``, or all), and c = 2 bytes in 16 bits, else 4:

=============  =====================================  ==========================  ====================
strategy       parameters                             gradients                   optimizer (AdamW)
=============  =====================================  ==========================  ====================
DDP            4 P, and c per weight of a linear map  4 P                         8 P
FSDP, ZeRO-2   4 P/W + c P                            4 P/W + (4 + c) B           8 P/W
FSDP, ZeRO-3   4 P/W + c (embeddings + 2 B)           4 P/W + (4 + c) B           8 P/W
=============  =====================================  ==========================  ====================

(DDP's c: autocast's copies. FSDP gathers in c bytes: with ZeRO-3 the embeddings, a block and the next one; a block's
gradients wait to be reduced; with ``accum_iter`` the whole gradient waits, in the bytes of ``fsdp_reduce_dtype``.) A
moving average of the weights adds 4 P to the parameters, under FSDP 4 P/W. Not in it: what the allocator cannot use, communication buffers, CUDA itself.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from torch import nn

from fourm.data.data_config import DataConfig
from fourm.data.unified_datasets import build_masking
from fourm.models import FM, StepFlops, count_parameters
from fourm.models.activations import activation_bytes
from fourm.train.config import TrainConfig, run_length
from fourm.train.device import GPUS
from fourm.utils.errors import UserError, did_you_mean

_DRAWS = 400
STRATEGIES = ("DDP", "FSDP, ZeRO-2", "FSDP, ZeRO-3")
Tokens = dict[str, float]


def plan_run(config: TrainConfig, data: DataConfig, model: FM, text_tokenizer: Any) -> dict[str, Any]:
    """The figures of a run on ``plan_world_size`` GPUs of the kind ``plan_gpu``.

    Args:
        model: may be on the meta device.

    Returns:
        ``parameters`` (``trunk``, ``embeddings``), ``samples`` and ``tokens`` of an optimizer step, ``steps``,
        ``total_tokens``, ``flops`` of a step on one GPU and ``total_flops`` of the run, ``seconds_per_step`` and ``days``
        at ``plan_mfu``, and ``memory``: {strategy: {part: bytes on each GPU}}.

    Raises:
        UserError: an unknown GPU, or settings that do not fit together.
    """
    if config.plan_gpu not in GPUS:
        near = did_you_mean(config.plan_gpu, GPUS)
        raise UserError(f"'plan_gpu': unknown '{config.plan_gpu}'{near}; there are {', '.join(GPUS)}")
    world_size = config.plan_world_size
    length = run_length(config, world_size)
    steps = length.total_batches // config.accum_iter
    sets = data.train.values()
    slots = (max(d.input_tokens_range[1] for d in sets), max(d.target_tokens_range[1] for d in sets))
    inputs, targets = mean_budgets(data, text_tokenizer, config.batch_size)
    flops = StepFlops(model)(config.batch_size, *slots, inputs, targets) * config.accum_iter
    half = config.autocast_dtype != "float32"
    activations = sum(activation_bytes(model, config.batch_size, *slots, targets, half).values())
    seconds = flops / (config.plan_mfu * GPUS[config.plan_gpu].tflops * 1e12)
    samples = config.batch_size * config.accum_iter * world_size
    return {
        "parameters": count_parameters(model),
        "samples": samples,
        "tokens": samples * config.tokens_per_sample,
        "steps": steps,
        "total_tokens": steps * samples * config.tokens_per_sample,
        "flops": flops,
        "total_flops": flops * world_size * steps,
        "seconds_per_step": seconds,
        "days": seconds * steps / 86400,
        "memory": {
            strategy: state_bytes(model, strategy, world_size, config, half) | {"activations": activations}
            for strategy in STRATEGIES
        },
    }


def mean_budgets(data: DataConfig, text_tokenizer: Any, batch_size: int) -> tuple[Tokens, Tokens]:
    """Input and target tokens per modality in an average batch; texts shorter than their budget are not considered."""
    totals: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    weight_of_all = sum(data.weights.values())
    rng = np.random.default_rng(0)
    for name, dataset in data.train.items():
        masking = build_masking(dataset, text_tokenizer)
        share = batch_size * data.weights[name] / weight_of_all / _DRAWS
        for _ in range(_DRAWS):
            budgets = masking.draw_budgets(rng)
            for total, drawn in zip(totals, (budgets.input, budgets.target), strict=True):
                for modality, count in drawn.items():
                    total[modality] += count * share  # type: ignore[assignment]
    inputs, targets = totals
    return (
        {modality: inputs[modality] for modality in data.in_domains},
        {modality: targets[modality] for modality in data.out_domains},
    )


def state_bytes(model: FM, strategy: str, world_size: int, config: TrainConfig, half: bool) -> dict[str, float]:
    """Bytes of parameters, gradients and optimizer on each GPU; see the table above."""
    counts = count_parameters(model)
    total = counts["trunk"] + counts["embeddings"]
    moments = {"adamw": 2, "sgd": int(config.momentum > 0)}[config.opt]
    c, average = 2 if half else 4, 4 * total * config.model_ema
    if strategy == "DDP":
        weights = {id(part.weight): part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear)}
        copies = c * sum(weights.values()) if half else 0
        return {"parameters": 4 * total + copies + average, "gradients": 4 * total, "optimizer": 4 * moments * total}
    block = max(sum(p.numel() for p in b.parameters()) for b in (*model.encoder, *model.decoder))
    gathered = total if strategy == "FSDP, ZeRO-2" else min(counts["embeddings"] + 2 * block, total)
    sharers = config.fsdp_shard_size or world_size
    if world_size % sharers:
        raise UserError(f"'fsdp_shard_size' {sharers} does not divide 'plan_world_size' {world_size}")
    shard, reduced = 4 * total / sharers, 2 if config.fsdp_reduce_dtype == "bfloat16" else 4
    waiting = reduced * total if config.accum_iter > 1 else (4 + c) * block
    return {
        "parameters": shard + c * gathered + average / sharers,
        "gradients": shard + waiting,
        "optimizer": moments * shard,
    }


def describe(config: TrainConfig, plan: dict[str, Any]) -> str:
    """The plan for people to read."""
    gpu, world_size = GPUS[config.plan_gpu], config.plan_world_size
    recompute = "recomputed" if config.use_act_checkpoint else "kept"
    parameters, seconds, steps = plan["parameters"], plan["seconds_per_step"], plan["steps"]
    rows = [
        ("run", f"{config.run_name} on {world_size} x {config.plan_gpu}, {config.dtype}"),
        ("model", f"{config.model}: {_si(parameters['trunk'])} parameters of the trunk, "
                  f"{_si(parameters['embeddings'])} of the embeddings"),
        ("step", f"{plan['samples']:,} samples ({world_size} x batch_size {config.batch_size} x accum_iter "
                 f"{config.accum_iter}), {_si(plan['tokens'])} tokens, {_si(plan['flops'])}FLOP on each GPU"),
        ("length", f"{steps:,} steps, {_si(plan['total_tokens'])} tokens, {_si(plan['total_flops'])}FLOP"),
        ("time", f"{plan['days']:.3g} days at {config.plan_mfu:.0%} of {gpu.tflops:g} TFLOP/s: {seconds:.3g} s a step, "
                 f"{plan['samples'] / seconds:,.0f} samples/s"),
    ]  # fmt: skip
    lines = [f"{name:<13}{text}" for name, text in rows]
    lines += ["", f"{'GB on a GPU':<13}" + "".join(f"{name:>16}" for name in STRATEGIES)]
    for part in ("parameters", "gradients", "optimizer", "activations"):
        figures = "".join(f"{plan['memory'][name][part] / 1e9:>16.1f}" for name in STRATEGIES)
        lines.append(f"{part:<13}{figures}{f'  ({recompute})' if part == 'activations' else ''}")
    totals = [sum(plan["memory"][name].values()) / 1e9 for name in STRATEGIES]
    lines.append(f"{'together':<13}" + "".join(f"{total:>16.1f}" for total in totals))
    fits = ["yes" if total < 0.95 * gpu.memory else "no" for total in totals]
    lines.append(f"{f'fits {gpu.memory:g} GB':<13}" + "".join(f"{word:>16}" for word in fits))
    return "\n".join(lines)


def _si(value: float) -> str:
    """``2.8 G``"""
    for power, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "
