"""Measure how much faster tokenizers decode a batch together than image by image, as generation did before.

    python benchmarks/decode_batch.py fourm/demo/trained/*
    python benchmarks/decode_batch.py --divae

It prints a JSON object per tokenizer: seconds of processor time per image in batches of ``--batch_size`` and one by
one, their ratio (median, minimum and maximum of the rounds, in which both take turns), and the largest difference of a
pixel.
``--divae`` adds a DiVAE of toy size with random weights, which decodes in ``--steps`` steps.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from fourm.generation.decoding import Detokenizer
from fourm.utils.errors import run_cli
from fourm.vq import ImageTokenizer, load_tokenizer
from fourm.vq.divae import DiVAE

TOY = {"image_size": 32, "patch_size": 8, "n_channels": 3, "codebook_size": 64, "latent_dim": 8}
TOY_NETWORKS = {"enc_type": "vit/B_1-Wi_32-H_2", "dec_type": "unet_patched/Wi_32"}


def measure(tokenizer: ImageTokenizer, options: argparse.Namespace) -> dict[str, object]:
    """Decode random ids in both ways."""
    places = (tokenizer.info.input_size // tokenizer.patch_size) ** 2 * tokenizer.num_codebooks
    ids = torch.randint(tokenizer.vocab_size, (options.images, places), generator=torch.Generator().manual_seed(0))
    ways = {name: Detokenizer(options.steps, batch_size=size) for name, size in options.ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    pictures: dict[str, Tensor] = {}
    for _ in range(options.rounds + 1):  # the first round warms up
        for name, way in ways.items():
            start = time.process_time()
            pictures[name] = way.decode(tokenizer, ids)
            seconds[name].append((time.process_time() - start) / options.images)
    ratios = [single / batch for single, batch in zip(seconds["single"][1:], seconds["batch"][1:], strict=True)]
    return {
        "batch": median(seconds["batch"][1:]),
        "single": median(seconds["single"][1:]),
        "ratio": [median(ratios), min(ratios), max(ratios)],
        "difference": (pictures["batch"] - pictures["single"]).abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="*", type=Path, help="folders of tokenizers")
    parser.add_argument("--divae", action="store_true", help="measure a DiVAE of toy size, too")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps of decoding by diffusion")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.ways = {"single": 1, "batch": options.batch_size}
    torch.manual_seed(0)
    for place in options.tokenizers:
        print(json.dumps({"tokenizer": place.name, **measure(load_tokenizer(place), options)}), flush=True)
    if options.divae:
        print(json.dumps({"tokenizer": "divae", **measure(DiVAE(**TOY, **TOY_NETWORKS).eval(), options)}), flush=True)


if __name__ == "__main__":
    run_cli(main)
