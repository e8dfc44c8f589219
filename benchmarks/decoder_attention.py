"""Compare ways to compute the masked self-attention of the decoder, in which a target sees only its own modality.

    python benchmarks/decoder_attention.py --device cuda --dtype bfloat16     # at the sizes of base
    python benchmarks/decoder_attention.py --toy

The ways are one call with an additive mask, as in the model; one call per modality with the mask of its own targets
only; FlexAttention; and one call without a mask, which computes something else and tells what the mask costs. They
alternate in one process, on the targets of a synthetic batch. It prints a JSON object with the seconds of a forward
and backward pass, and the largest difference of the outputs from those of the model's way. FlexAttention is compiled
on a GPU; on a CPU it has no backward pass, so that there only the forward pass is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from embed_all import synthetic_batch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from train_step import DOMAINS

from fourm.models import FM, model_config
from fourm.models.fm_utils import additive, attendable
from fourm.models.token_selection import Selection
from fourm.utils.errors import run_cli

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways(masked: Tensor, selection: Selection, x: Tensor) -> dict[str, Attention]:
    """Return the ways to attend from the queries to the keys and values, (B, H, M, C) each, by name.

    Args:
        masked: (B, M, M) Which targets each target must not see.
        selection: The targets. Each modality has the same number of them in every sample.
        x: A tensor of the device and type of the queries.
    """
    allowed = attendable(masked)
    mask = additive(allowed, x)
    # The slots of a modality in each sample, (B, n)
    groups = [(selection.modality == i).nonzero()[:, 1].view(len(masked), -1) for i in selection.modality[0].unique()]
    rows = [group[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]) for group in groups]
    masks = [
        mask.gather(2, g[:, None, :, None].expand(-1, -1, -1, mask.shape[3])).gather(
            3, g[:, None, None, :].expand(-1, -1, g.shape[1], -1)
        )
        for g in groups
    ]

    def per_modality(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = torch.empty_like(q)
        for row, own_mask in zip(rows, masks, strict=True):
            own = (tensor.gather(2, row) for tensor in (q, k, v))
            result = result.scatter(2, row, F.scaled_dot_product_attention(*own, attn_mask=own_mask))
        return result

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed[b, 0, query, key]

    batch_size, targets = masked.shape[:2]
    block_mask = create_block_mask(sees, batch_size, None, targets, targets, device=x.device.type)
    flex = torch.compile(flex_attention, dynamic=False) if x.is_cuda else flex_attention
    return {
        "additive_mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "per_modality": per_modality,
        "flex_attention": lambda q, k, v: flex(q, k, v, block_mask=block_mask),  # type: ignore[dict-item]
        "no_mask": F.scaled_dot_product_attention,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--targets", type=int, nargs="+", default=[126, 252], help="targets per sample")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="passes per round")
    parser.add_argument("--toy", action="store_true", help="use small sizes, to test the command")
    options = parser.parse_args()
    if options.toy:
        options.batch_size, options.targets, options.heads, options.rounds, options.steps = 2, [28], 2, 1, 1
    with torch.device("meta"):
        model = FM(model_config("fm_tiny_6e_6d_swiglu_nobias", *DOMAINS[7], encoder_depth=1, decoder_depth=1))
    for targets in options.targets:
        share = targets // len(model.decoder_embeddings)
        batch = synthetic_batch(model.modality_info, options.batch_size, 1, share)
        selection = model.select_tokens(batch, 1, share * len(model.decoder_embeddings)).decoder.to(options.device)
        shape = options.batch_size, options.heads, selection.modality.shape[1], 64
        q, k, v = (torch.randn(shape, device=options.device, dtype=getattr(torch, options.dtype)) for _ in range(3))
        variants = ways(model.target_mask(selection), selection, q)
        print(
            json.dumps({"targets": shape[2], **measure(variants, q, k, v, options.rounds, options.steps)}), flush=True
        )


def measure(
    variants: dict[str, Attention], q: Tensor, k: Tensor, v: Tensor, rounds: int, steps: int
) -> dict[str, object]:
    """Measure the seconds of a pass of each variant, alternately; the first round warms up."""
    backward = q.is_cuda
    for tensor in (q, k, v):
        tensor.requires_grad_(backward)
    times: dict[str, list[float]] = {name: [] for name in variants}
    outputs = {}
    for _ in range(rounds + 1):
        for name, attend in variants.items():
            start = time.perf_counter()
            for _ in range(steps):
                outputs[name] = attend(q, k, v)
                if backward:
                    torch.autograd.grad(outputs[name].sum(), (q, k, v))
            if q.is_cuda:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / steps)
    exact = outputs["additive_mask"]
    return {
        "benchmark": "decoder_attention",
        "device": torch.cuda.get_device_name(q.device) if q.is_cuda else "cpu",
        "dtype": str(q.dtype).removeprefix("torch."),
        "backward": backward,
        "seconds": {name: median(seconds[1:]) for name, seconds in times.items()},
        "difference": {name: (output - exact).abs().max().item() for name, output in outputs.items()},
    }


if __name__ == "__main__":
    run_cli(main)
