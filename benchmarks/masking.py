"""Measure the samples per second of masking on one core.

    OMP_NUM_THREADS=1 python benchmarks/masking.py

Each sample has RGB, five token maps, a caption and ten boxes; the budgets are 128/128 tokens. It prints JSON. No two
samples share a caption or boxes. Word frequencies follow Zipf's law over 10 000 words.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import numpy as np

from fourm.data.masking import UnifiedMasking
from fourm.data.modality_info import MODALITY_INFO
from fourm.utils.tokenizer import load_text_tokenizer
from fourm.utils.tokenizer.special_tokens import COCO_CLASSES

MODALITIES = (
    "rgb@224",
    "tok_rgb@224",
    "tok_depth@224",
    "tok_normal@224",
    "tok_semseg@224",
    "tok_clip@224",
    "caption",
    "det",
)
PIXELS = np.zeros((3, 224, 224), np.float32)


def sample(rng: np.random.Generator, vocabulary: list[str], boxes: int, words: int) -> dict[str, Any]:
    """Make a random sample in the form in which the transforms pass it to masking."""
    tokens = [name for name in MODALITIES if name.startswith("tok_")]
    corners = rng.integers(0, 1000, (boxes, 4))
    text = [
        f"v0={a} v1={b} v2={c} v3={d} {COCO_CLASSES[rng.integers(len(COCO_CLASSES))]}"
        for a, b, c, d in corners.tolist()
    ]
    return {
        "rgb@224": PIXELS,
        **{name: rng.integers(0, MODALITY_INFO[name].vocab_size, 196) for name in tokens},
        "caption": " ".join(vocabulary[int(len(vocabulary) ** u) - 1] for u in rng.random(words)) + ".",
        "det": " ".join(text),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000, help="number of samples per round")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds, of which the median counts")
    parser.add_argument("--boxes", type=int, default=10)
    parser.add_argument("--words", type=int, default=15, help="number of words in a caption")
    parser.add_argument(
        "--text_tokenizer_path", default="fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json"
    )
    options = parser.parse_args()
    # cfgs/default/4m/alphas_mixture/main/mix_mod7_all2all_rgb2all_a0.5.yaml
    info = {
        name: {**MODALITY_INFO[name], "input_alphas": (0.0, 0.5), "target_alphas": (0.5, 0.5)} for name in MODALITIES
    }
    info["rgb@224"] |= {"input_alphas": (1000.0, 0.5), "target_alphas": (0.0, 0.0)}
    masking = UnifiedMasking(info, options.text_tokenizer_path, 128, 128)
    vocabulary = sorted(filter(str.isalpha, load_text_tokenizer(options.text_tokenizer_path).get_vocab()))[:10_000]
    rng = np.random.default_rng(0)
    rng.shuffle(vocabulary)
    seconds: dict[str, list[float]] = {"wall": [], "cpu": [], "budgets": []}
    for _ in range(options.rounds):
        samples = [sample(rng, vocabulary, options.boxes, options.words) for _ in range(options.samples)]
        wall, cpu = time.perf_counter(), time.process_time()
        for item in samples:
            masking(item, rng)
        seconds["wall"].append(time.perf_counter() - wall)
        seconds["cpu"].append(time.process_time() - cpu)
        start = time.perf_counter()
        for _ in samples:
            masking.draw_budgets(rng)
        seconds["budgets"].append(time.perf_counter() - start)
    result = {
        "benchmark": "masking",
        **{key: getattr(options, key) for key in ("samples", "rounds", "boxes", "words")},
        "modalities": MODALITIES,
        "tokens": [128, 128],
        "samples_per_s": round(options.samples / median(seconds["wall"])),
        "samples_per_cpu_s": round(options.samples / median(seconds["cpu"])),
        "budgets_share": round(median(seconds["budgets"]) / median(seconds["wall"]), 3),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
