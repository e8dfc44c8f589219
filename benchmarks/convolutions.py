"""Benchmark ways to compute the 3x3 convolutions of the diffusion decoder on a CPU, and their share of its time.

    OMP_NUM_THREADS=1 python benchmarks/convolutions.py
    python benchmarks/convolutions.py --toy --rounds 1

It prints a JSON object about a step of the UNet for one image: its processor time with plain and with Winograd's
convolutions, the share of each kind of layer, and the cost of transforming the weights, which decoding does once per
call. Then it prints an object per size of the convolutions. All ways and batch sizes of a size take turns in one
process, and the results are compared with a convolution in float64. ``plain`` is that of PyTorch, also with inputs that
are ``channels_last``, with weights that are ``prepacked`` for oneDNN, and in ``bfloat16``. ``matrix_product`` has as
many multiplications, on inputs that have been unfolded before. ``winograd`` is what decoding computes, with weights
that have been transformed before: in parts of at most 16 MB, and plainly on small maps. ``winograd_at_once`` transforms
all images of a batch together, at every size. Times are milliseconds of processor time per image, and ratios are those
to ``plain`` with the same batch; both are the median, minimum and maximum over the rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from contextvars import Context
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_step import alternate

from fourm.utils.errors import run_cli
from fourm.utils.memory import keep_freed_memory
from fourm.vq.unet import PatchedUNet
from fourm.vq.winograd import Conv3x3, _convolve, _transform_weight, _transformed, fast_convolutions

SIZES = [(256, 56), (512, 28), (512, 14), (512, 7)]
"""Channels, and the height and width of the maps, of the four levels of the published UNet for 224 pixels."""
TOY_SIZES = [(32, 16), (32, 7)]
LATENT = 32
ERRORS = {"bfloat16": 2e-2}
"""How much a result may differ from the exact one, relative to the largest number, if it is more than 2e-5."""


def spread(values: list[float]) -> list[float]:
    return [median(values), min(values), max(values)]


def ways(conv: Conv3x3, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the ways to convolve x, (B, C, H, W) → (B, D, H, W), by name, for use in ``fast_convolutions``."""
    convolve = partial(F.conv2d, padding=1)
    weight, bias = conv.weight, conv.bias
    pairs = [1, 1], [1, 1], [1, 1]  # padding, stride and dilation
    prepacked = torch.ops.mkldnn._reorder_convolution_weight(weight, *pairs, 1, list(x.shape))
    columns, rows = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1), weight.flatten(1).T
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight)]
    halves = [tensor.bfloat16() for tensor in (x, weight, bias)]
    transformed = _transform_weight(weight)

    def matrix_product() -> Tensor:
        y = torch.addmm(bias, columns, rows)
        return y.view(len(x), *x.shape[2:], len(weight)).permute(0, 3, 1, 2)

    return {
        "plain": lambda: convolve(x, weight, bias),
        "channels_last": lambda: convolve(*last, bias),
        "prepacked": lambda: torch.ops.mkldnn._convolution_pointwise(x, prepacked, bias, *pairs, 1, "none", [], ""),
        "bfloat16": lambda: convolve(*halves),
        "matrix_product": matrix_product,
        "winograd": lambda: conv(x),
        "winograd_at_once": lambda: _convolve(x, transformed, bias),
    }


def measure_size(options: argparse.Namespace, channels: int, side: int) -> dict[str, Any]:
    """Measure the convolutions of one size."""
    conv, x = Conv3x3(channels, channels), torch.randn(max(options.batch_size), channels, side, side)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    variants = {(name, n): run for n in options.batch_size for name, run in ways(conv, x[:n]).items()}
    errors: dict[str, float] = Counter()
    with fast_convolutions(conv):
        for (name, n), run in variants.items():
            errors[name] = max(errors[name], ((run() - exact[:n]).abs().max() / exact.abs().max()).item())
        for name, error in errors.items():
            assert error < ERRORS.get(name, 2e-5), f"{name} differs by {error}"
        times = alternate(variants, options.alternation)
    gflop = 2 * conv.weight.numel() * side**2 / 1e9
    result: dict[str, Any] = {"channels": channels, "side": side, "gflop_of_an_image": gflop, "error": errors}
    for name in errors:
        result[name] = {}
        for n in options.batch_size:
            seconds, plain = times[name, n]["cpu_seconds"], times["plain", n]["cpu_seconds"]
            result[name][n] = {
                "milliseconds_per_image": spread([1000 * s / n for s in seconds]),
                "gflops": gflop * n / median(seconds),
                "ratio": spread([a / b for a, b in zip(seconds, plain, strict=True)]),
            }
    return result


def measure_step(options: argparse.Namespace, size: int, width: int) -> dict[str, Any]:
    """Measure the layers of a step of the UNet on one image of ``size`` pixels."""
    unet = PatchedUNet(3, LATENT, width).eval()
    inputs = torch.randn(1, 3, size, size), torch.tensor([500]), torch.randn(1, LATENT, size // 16, size // 16)
    started: list[float] = []
    spent: dict[str, Counter[str]] = {"plain": Counter(), "winograd": Counter()}
    clock: Counter[str] = Counter()

    def stop(layer: nn.Module, *_: Any) -> None:
        clock[type(layer).__name__] += time.process_time() - started.pop()  # type: ignore[assignment]

    def run(name: str) -> Tensor:
        nonlocal clock
        clock = spent[name]
        # An empty context is one without fast convolutions.
        return Context().run(unet, *inputs) if name == "plain" else unet(*inputs)

    with fast_convolutions(unet):
        assert torch.allclose(run("plain"), run("winograd"), atol=1e-3)
        start = time.process_time()
        transformed = [_transform_weight(conv.weight) for conv in _transformed.get() or ()]
        transforming = time.process_time() - start
        for layer in [unet, *(module for module in unet.modules() if not list(module.children()))]:
            layer.register_forward_pre_hook(lambda *_: started.append(time.process_time()))
            layer.register_forward_hook(stop)
        times = alternate({name: partial(run, name) for name in spent}, options.alternation)
    for clock in spent.values():
        whole = clock.pop(type(unet).__name__)
        clock["other"] = whole - sum(clock.values())
        for name in clock:
            clock[name] /= whole
    plain, fast = (times[name]["cpu_seconds"] for name in spent)
    return {
        "seconds": {"plain": spread(plain), "winograd": spread(fast)},
        "ratio": spread([a / b for a, b in zip(fast, plain, strict=True)]),
        "share": spent,
        "transforming": {"seconds": transforming, "bytes": sum(w.numel() * w.element_size() for w in transformed)},
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", nargs="+", type=int, default=[1, 4, 8], help="images per batch")
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds of each way")
    parser.add_argument("--repeats", type=int, default=1, help="runs per round")
    parser.add_argument(
        "--free", action="store_true", help="return freed memory to the system, unlike the commands that decode"
    )
    parser.add_argument("--toy", action="store_true", help="use small sizes, to test the command")
    options = parser.parse_args()
    options.alternation = argparse.Namespace(rounds=options.rounds, steps=options.repeats, device="cpu")
    if not options.free:
        keep_freed_memory()
    torch.manual_seed(0)
    common = {
        "benchmark": "convolutions",
        "free": options.free,
        "torch_threads": torch.get_num_threads(),
    }
    step = measure_step(options, *((64, 32) if options.toy else (224, 256)))
    print(json.dumps(common | {"case": "unet_step"} | step), flush=True)
    for channels, side in TOY_SIZES if options.toy else SIZES:
        row = measure_size(options, channels, side)
        print(json.dumps(common | {"case": "convolution"} | row), flush=True)


if __name__ == "__main__":
    run_cli(main)
