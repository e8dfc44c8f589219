"""Measure how well tokenizers reconstruct scenes of the demo; each measure is that of the demo's report.

    python benchmarks/demo_tokenizers.py --tokenizers fourm/demo/trained --data demo_run/data
    python benchmarks/demo_tokenizers.py --tokenizers fourm/demo/trained --data demo_run/data --codebooks
    python benchmarks/demo_tokenizers.py --tokenizers fourm/demo/trained --data demo_run/data --split train --scenes 800

With ``--codebooks``, a codebook with as many ids is fitted to the training scenes for each tokenizer, and measured too.
It prints one JSON line per tokenizer: the measure, the share of the ids that are used, and their perplexity.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourm.data.modality_info import Modality
from fourm.data.raw_sample import OpenFiles, RawSample
from fourm.demo import scores
from fourm.demo.scene import CLASSES
from fourm.demo.truth import read_scenes, truth
from fourm.generation.decoding import decode_modality
from fourm.generation.inputs import read_pixels
from fourm.utils.errors import run_cli
from fourm.vq import ImageTokenizer, load_tokenizer
from fourm.vq.crops import tokenizer_transform
from fourm.vq.fit_codebook import FitOptions, fit_codebook
from fourm.vq.metrics import code_counts, codebook_metrics


def psnr(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of values in [0, 1]."""
    return float(-10 * np.log10(np.square(predicted - true).mean()))


def measure(kind: str, predicted: list[np.ndarray], true: list[np.ndarray]) -> dict[str, float]:
    if kind == "semseg":
        return {"mean_iou": scores.mean_iou(predicted, true)}
    if kind == "depth":
        return {"abs_rel": float(np.mean(list(map(scores.abs_rel, predicted, true))))}
    if kind == "normal":
        return {"angle": float(np.mean(list(map(scores.normal_angle, predicted, true))))}
    scale = 255 if kind == "rgb" else 1
    return {"psnr": float(np.mean([psnr(p / scale, t / scale) for p, t in zip(predicted, true, strict=True)]))}


@torch.inference_mode()
def evaluate(tokenizer: ImageTokenizer, kind: str, scenes: Sequence[RawSample]) -> dict[str, Any]:
    """Tokenize the centre crop of each scene, decode it, and compare."""
    info = tokenizer.info
    transform = tokenizer_transform(kind, info.transform_options)
    modality = Modality(
        f"tok_{kind}", "img", vocab_size=info.vocab_size, input_size=info.input_size, patch_size=info.patch_size
    )
    predicted, true, counts = [], [], torch.zeros(1, info.vocab_size, dtype=torch.float64)
    for scene in scenes:
        values = scene.values(OpenFiles(), keep_pixels=False)
        pixels = read_pixels(values[kind], transform, info.input_size)
        ids = tokenizer.tokenize(pixels.view(1, -1, *pixels.shape[-2:]))
        counts += code_counts(ids, 1, info.vocab_size)
        ids = ids.flatten()
        predicted.append(decode_modality(ids, torch.zeros_like(ids).bool(), modality, {kind: tokenizer}, None).value)
        true.append(truth(scene, info.input_size)[kind].value)
    usage = codebook_metrics(counts)
    return {"ids": info.vocab_size, **measure(kind, predicted, true), **{key: float(v) for key, v in usage.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", type=Path, required=True, help="folder with a folder per modality")
    parser.add_argument("--data", type=Path, required=True, help="folder of the demo's data")
    parser.add_argument("--codebooks", action="store_true", help="also fit and measure codebooks of the same size")
    parser.add_argument("--split", choices=["train", "val"], default="val", help="the scenes that are measured")
    parser.add_argument("--scenes", type=int, default=100, help="number of scenes")
    options = parser.parse_args()
    scenes = read_scenes(options.data / options.split)[: options.scenes]
    for folder in sorted(path.parent for path in options.tokenizers.glob("*/config.json")):
        kind, tokenizer = folder.name, load_tokenizer(folder)
        print(json.dumps({"modality": kind, "kind": "learned", **evaluate(tokenizer, kind, scenes)}), flush=True)
        if options.codebooks:
            info = tokenizer.info
            with tempfile.TemporaryDirectory() as temporary:
                codebook, _ = fit_codebook(
                    FitOptions(
                        modality=kind,
                        data_root=str(options.data / "train"),
                        output=f"{temporary}/codebook",
                        vocab_size=info.vocab_size,
                        patch_size=info.patch_size,
                        input_size=info.input_size,
                        one_hot_classes=len(CLASSES) if kind == "semseg" else None,
                        num_images=1000,
                        num_crops=1,
                        num_patches=20_000,
                        num_workers=1,
                    )
                )
            print(json.dumps({"modality": kind, "kind": "codebook", **evaluate(codebook, kind, scenes)}), flush=True)


if __name__ == "__main__":
    run_cli(main)
