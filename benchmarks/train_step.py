"""Training step: selecting the kept tokens before embedding them against embedding everything first.

``python benchmarks/train_step.py`` prints JSON. Both variants share one model and take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from embed_all import embed_all_loss, saved_bytes, synthetic_batch
from torch import Tensor

from fourm.models import FM, model_config

PIXELS = ["rgb@224"]
TARGETS = ["tok_rgb@224", "tok_depth@224", "tok_normal@224", "tok_semseg@224", "tok_clip@224", "caption", "det"]
TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = model_config("fm_tiny_6e_6d_swiglu_nobias", [*PIXELS, *TARGETS], TARGETS, share_embedding=True)
    model = FM(config)
    modalities = {name: model.modality_info[name] for name in [*PIXELS, *TARGETS]}
    inputs, targets = TOKENS // len(modalities), TOKENS // len(TARGETS)
    batch = synthetic_batch(modalities, arguments.batch_size, inputs, targets)
    variants: dict[str, Callable[[], Tensor]] = {
        "select_first": lambda: model(batch, TOKENS, TOKENS)[0],
        "embed_all": lambda: embed_all_loss(model, batch, TOKENS, TOKENS)[0],
    }

    losses = {name: loss().item() for name, loss in variants.items()}
    assert abs(losses["select_first"] / losses["embed_all"] - 1) < 1e-5, losses
    memory = {name: saved_bytes(loss, model) for name, loss in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(arguments.steps + 1):
        for name, loss in variants.items():
            start = time.perf_counter()
            loss().backward()
            model.zero_grad(set_to_none=True)
            if step:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    times = {name: median(values) for name, values in seconds.items()}
    result = {
        "benchmark": "train_step",
        "batch_size": arguments.batch_size,
        "tokens": [TOKENS, TOKENS],
        "tokens_in_a_sample": sum(entry["input_mask"].shape[1] for entry in batch.values()),
        "loss": losses,
        "seconds_per_step": times,
        "speed_up": times["embed_all"] / times["select_first"],
        "saved_activation_bytes": memory,
        "memory_ratio": memory["embed_all"] / memory["select_first"],
        "torch_threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
