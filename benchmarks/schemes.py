"""Compare the decoding schemes of images by quality against number of steps, on the demo's validation scenes.

``python benchmarks/schemes.py demo_run`` generates depth and segmentation from RGB with ROAR, MaskGIT and the Halton
scheme, each target by itself. It prints a table, and writes JSON with ``--out``. The absolute relative error of depth
is better if lower, the mean IoU of the classes if higher.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fourm.data.raw_sample import OpenFiles
from fourm.demo.report import aligned
from fourm.demo.scores import abs_rel, mean_iou
from fourm.demo.truth import read_scenes, truth
from fourm.generation import Sampler
from fourm.generation.schedules import IMAGE_SCHEMES
from fourm.utils.files import atomic_path

BATCH_SIZE = 25


def generate(
    sampler: Sampler, photos: Sequence[Any], kind: str, seed: int, settings: Mapping[str, Any]
) -> list[np.ndarray]:
    """Generate one target from each photo; return its value (H, W)."""
    values = []
    for start in range(0, len(photos), BATCH_SIZE):
        batch = [{"rgb": photo} for photo in photos[start : start + BATCH_SIZE]]
        for result in sampler(batch, [kind], seed=seed + start, **settings):
            values += [decoded.value for decoded in result.values() if decoded.kind == kind]
    return values


def score(kind: str, predicted: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> float:
    if kind == "depth":
        return float(np.mean([abs_rel(p, t) for p, t in zip(predicted, true, strict=True)]))
    return mean_iou(predicted, true)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder of a finished demo run")
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--schemes", nargs="+", default=[*IMAGE_SCHEMES], choices=IMAGE_SCHEMES)
    parser.add_argument("--token_schedule", default="linear", help="tokens per step: linear or cosine")
    parser.add_argument("--temperature", type=float, default=0.01, help="sampling temperature")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="scores are averaged over seeds")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    sampler = Sampler.load(arguments.demo / "training", tokenizers=arguments.demo / "tokenizers")
    samples = read_scenes(arguments.demo / "data" / "val")[: arguments.scenes]
    photos = [sample.values(OpenFiles(), keep_pixels=False)["rgb"] for sample in samples]
    scores: list[dict[str, Any]] = []
    report = {
        "benchmark": "schemes",
        "scenes": len(samples),
        "token_schedule": arguments.token_schedule,
        "temperature": arguments.temperature,
        "seeds": arguments.seeds,
        "scores": scores,
    }
    true: list[Any] = []
    for kind in ("depth", "semseg"):
        for steps in arguments.steps:
            for scheme in arguments.schemes:
                settings = {
                    "autoregression_schemes": scheme,
                    "decoding_steps": steps,
                    "temps": arguments.temperature,
                    "token_decoding_schedules": arguments.token_schedule,
                }
                start = time.process_time()
                runs = [generate(sampler, photos, kind, seed, settings) for seed in arguments.seeds]
                seconds = time.process_time() - start
                true = true or [truth(sample, len(runs[0][0])) for sample in samples]
                values = [score(kind, run, [scene[kind].value for scene in true]) for run in runs]
                scores.append(
                    {
                        "target": kind,
                        "scheme": scheme,
                        "steps": steps,
                        "score": float(np.mean(values)),
                        "by_seed": values,
                        "processor_seconds_per_image": seconds / len(photos) / len(runs),
                    }
                )
                if arguments.out:
                    with atomic_path(arguments.out) as path:
                        path.write_text(json.dumps(report, indent=2) + "\n")
    print(table(scores, arguments.schemes))


def table(scores: Sequence[Mapping[str, Any]], schemes: Sequence[str]) -> str:
    """Format the scores with a row per number of steps, and a column per target and scheme."""
    columns = [(target, scheme) for target in dict.fromkeys(s["target"] for s in scores) for scheme in schemes]
    cells = {(s["target"], s["scheme"], s["steps"]): f"{s['score']:.4f}" for s in scores}
    rows = [
        (str(steps), *(cells[target, scheme, steps] for target, scheme in columns))
        for steps in dict.fromkeys(s["steps"] for s in scores)
    ]
    return aligned(("steps", *(f"{target} {scheme}" for target, scheme in columns)), rows, left=())


if __name__ == "__main__":
    main()
