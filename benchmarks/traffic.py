"""Count what a training step on a GPU computes and moves: operations of matrix products, bytes, and kernels.

    python benchmarks/traffic.py                                                 # base, batch 128, 7 modalities
    python benchmarks/traffic.py --kinds compiled --model large --batch_size 64

A GPU spends a step on matrix products, which its arithmetic limits, and on everything else, which the bandwidth of its
memory limits. Both can be counted without one. The benchmark runs steps with 2 and with 4 samples on the CPU, under
autocast to bfloat16, and computes the counts for ``--batch_size`` by a line through both, which is exact because no
slot is padding. An eager operation reads all its inputs and writes all its outputs. In a compiled step, Inductor says
what the kernels that it fuses read and write; it fuses for a CPU, nearly as for a GPU.

It prints a JSON object for each kind of step: ``plain``, the baseline of ``train_step.py``; ``eager`` and ``compiled``;
and both with a residual stream in bfloat16. ``gigabytes`` and ``kernels`` are by group of operations, the latter those
of the larger step, and ``largest`` has the gigabytes of single operations. ``milliseconds`` is the time in which a GPU
of ``--peak_tflops`` and ``--bandwidth`` would compute all products at its peak and then move the bytes of everything
else, and ``mfu`` is the share of the products in it. No GPU reaches either, so both are bounds.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import closing
from typing import Any
from unittest.mock import patch

import torch
import train_step
from torch import Tensor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fourm.utils.errors import run_cli

KINDS = {  # kind of step → whether it is compiled, and the precision of the residual stream
    "plain": (False, "float32"),
    "eager": (False, "float32"),
    "eager_bfloat16": (False, "bfloat16"),
    "compiled": (True, "float32"),
    "compiled_bfloat16": (True, "bfloat16"),
}
SAMPLES = 2, 4  # of the two steps that are counted
FUSED = "fused"  # the kernels of Inductor
NOTHING = {  # operations that neither read nor write
    "detach", "view", "_unsafe_view", "lift_fresh", "_local_scalar_dense",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip
LOOKUPS = "embedding", "index_select", "gather"  # read as much as they write


def group(name: str) -> str:
    """Return the group of an operation."""
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return "products"
    if name.startswith("_scaled_dot_product"):
        return "attention"
    if name in ("_fused_adamw_", "_foreach_norm", "addcmul_", "addcdiv_", "lerp_"):
        return "optimizer"
    return name if name == FUSED else "other"


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor in memory, where a broadcast dimension has a single entry."""
    lengths = [1 if stride == 0 else length for length, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return torch.Size(lengths).numel() * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Counts the bytes, the operations of matrix products, and the calls of each PyTorch operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def clear(self) -> None:
        for counter in (self.bytes, self.flops, self.calls):
            counter.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in NOTHING:
            return result
        given, made = (
            [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)] for values in ((args, kwargs), result)
        )
        if name in LOOKUPS:
            given = made
        if name in ("copy_", "zero_", "fill_") or "out" in kwargs:
            made = []  # is one of the arguments, and not read
        self.bytes[name] += sum(map(size, given + made))
        self.calls[name] += 1
        if group(name) == "products":
            self.flops[name] += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return result

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # otherwise torch.compile would do nothing within this mode

    def compile(self, graph: Any, inputs: Any) -> Any:
        """Compile a graph with Inductor, so that each of its calls counts; a backend of ``torch.compile``."""
        return compile_fx(graph, inputs, inner_compile=self._compile)

    def _compile(self, graph: Any, inputs: Any, **options: Any) -> Any:
        moved: list[int] = []
        compile_to_module = GraphLowering.compile_to_module

        def recorded(lowering: GraphLowering) -> Any:
            module = compile_to_module(lowering)
            # This mode counts the others when they are called.
            nodes = [node for node in lowering.scheduler.nodes if not isinstance(node, ExternKernelSchedulerNode)]
            moved.extend(node.get_read_write_buffers_sizes() for node in nodes)
            return module

        with patch.object(GraphLowering, "compile_to_module", recorded):
            compiled: Any = compile_fx_inner(graph, inputs, **options)
        run = compiled.current_callable

        def counted(arguments: list[Any]) -> Any:
            self.bytes[FUSED] += sum(moved)
            self.calls[FUSED] += len(moved)
            return run(arguments)

        compiled.current_callable = counted
        return compiled


def count(options: argparse.Namespace, kind: str, samples: int) -> Traffic:
    """Count a step with ``samples`` samples."""
    compiled, residual_dtype = KINDS[kind]
    options = argparse.Namespace(**vars(options) | {"compile": compiled})
    setting = train_step.Setting(train_step.full_name(options.model), options.modalities, samples, residual_dtype, 0.0)
    config = train_step.build_config(options, setting.model, samples)
    traffic = Traffic()
    with closing(train_step.build_parallel(options, config)) as parallel:
        trainer = train_step.build_trainer(options, parallel, setting)
        batch = train_step.synthetic(trainer.model, samples, options.tokens, setting.padding)
        if compiled:
            torch.compiler.reset()
            trainer.task.compile(trainer.model, backend=traffic.compile)
        plain_step, _ = train_step.baseline(trainer, batch)
        step = plain_step if kind == "plain" else lambda: trainer.train_step([batch])
        step()  # compiles, and allocates the states of the optimizer
        traffic.clear()
        with traffic:
            step()
    return traffic


def extrapolated(few: Counter[str], many: Counter[str], batch_size: int) -> Counter[str]:
    """Return the counts of ``batch_size`` samples, on the line through those of :data:`SAMPLES`."""
    position = (batch_size - SAMPLES[0]) / (SAMPLES[1] - SAMPLES[0])
    return Counter({name: round(few[name] + position * (many[name] - few[name])) for name in many})


def grouped(counts: Counter[str]) -> Counter[str]:
    """Add up the counts of each group."""
    total: Counter[str] = Counter()
    for name, value in counts.items():
        total[group(name)] += value
    return total


def measure(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Count a kind of step."""
    few, many = (count(options, kind, samples) for samples in SAMPLES)
    moved = extrapolated(few.bytes, many.bytes, options.batch_size)
    flops = extrapolated(few.flops, many.flops, options.batch_size).total()
    by_group = grouped(moved)
    products = flops / (options.peak_tflops * 1e12)
    seconds = products + (moved.total() - by_group["products"]) / (options.bandwidth * 1e12)
    return {
        "benchmark": "traffic",
        "kind": kind,
        "model": options.model,
        "modalities": options.modalities,
        "batch_size": options.batch_size,
        "tflop": flops / 1e12,
        "gigabytes": {name: value / 1e9 for name, value in by_group.most_common()},
        "kernels": dict(grouped(many.calls).most_common()),
        "largest": {name: value / 1e9 for name, value in moved.most_common(12)},
        "milliseconds": seconds * 1e3,
        "mfu": products / seconds,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="size (tiny … xlarge), or name of a model")
    parser.add_argument("--modalities", type=int, choices=train_step.DOMAINS, default=7)
    parser.add_argument("--batch_size", type=int, default=128, help="samples per process")
    parser.add_argument("--tokens", type=int, default=128, help="token budget of the encoder and of the decoder")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--peak_tflops", type=float, default=989, help="of the GPU in bfloat16 (default: an H100)")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="of its memory, in TB/s (default: an H100)")
    parser.add_argument("--toy", action="store_true", help="use a model of one narrow block, to test the command")
    parser.set_defaults(device="cpu", dtype="bfloat16", act_checkpoint=False, opt="adamw", fsdp=False)
    options = parser.parse_args(argv)
    torch.compiler.config.force_disable_caches = True  # a graph from a cache does not say what it moves
    for kind in options.kinds:
        print(json.dumps(measure(options, kind)), flush=True)


if __name__ == "__main__":
    run_cli(main)
