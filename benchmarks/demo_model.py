"""Measure how many of the objects that captions name appear in what a model generates from them.

    python benchmarks/demo_model.py --train_judge judge_scenes/data/train --judge judge.safetensors \
        --data demo_run/data/val
    python benchmarks/demo_model.py --judge judge.safetensors --data demo_run/data/val --out demo_model

The first command trains the judge, a small network that sees which toys a picture shows, on true renders of other
scenes (``fourm demo --stages render --train_scenes 5000 --seed 7 --out judge_scenes``), and measures it on those of
``--data``. The second generates from the captions of ``--data``. It prints a table and writes ``OUT/scores.json`` and
``OUT/sheet.png``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fourm.data.raw_sample import RawSample
from fourm.demo.generated import reconstruct
from fourm.demo.judge import SIZE, Judge, JudgeOptions, Score, score_scenes, train_judge
from fourm.demo.report import aligned
from fourm.demo.scene import TOYS
from fourm.demo.scores import named_objects, precision_recall
from fourm.demo.truth import DecodedScene, read_scenes, truth
from fourm.generation import Decoded, Sampler
from fourm.generation.options import DEMO_MODEL
from fourm.generation.sampler import Result
from fourm.utils.errors import run_cli
from fourm.utils.files import atomic_path

JUDGED = ("det", "semseg", "rgb")


def train(scenes: Path, file: Path, epochs: int) -> None:
    """Train the judge on the scenes of a split."""
    true = [truth(scene, SIZE) for scene in read_scenes(scenes, kinds=("rgb", "semseg"))]
    rgb, semseg = (np.stack([scene[kind].value for scene in true]) for kind in ("rgb", "semseg"))
    began = time.process_time()

    def report(epoch: int, loss: float) -> None:
        seconds = round(time.process_time() - began, 1)
        print(json.dumps({"epoch": epoch, "loss": loss, "cpu_seconds": seconds}), flush=True)

    train_judge(rgb, semseg, JudgeOptions(epochs=epochs), report).save(file)


def generate(
    sampler: Sampler, captions: Sequence[str], targets: Sequence[str], batch_size: int, seed: int
) -> list[Result]:
    """Generate from captions; caption i has the seed ``seed + i``."""
    results: list[Result] = []
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        results += sampler(batch, targets, seed=seed + start)
        print(f"{len(results)} of {len(captions)} captions", flush=True)
    return results


def judge_model(
    sampler: Sampler, judge: Judge, samples: Sequence[RawSample], results: Sequence[Result], captions: Sequence[str]
) -> list[Score]:
    """Score what was generated, true renders, what the tokens of the truth decode to, and a guess."""
    named = [named_objects(caption, TOYS) for caption in captions]
    renders: list[DecodedScene] = [{"rgb": truth(sample, SIZE)["rgb"]} for sample in samples]
    tokens: list[Mapping[str, Decoded]] = []
    for sample in samples:
        scene = reconstruct(sample, sampler)
        tokens.append({kind: scene[kind] for kind in ("rgb", "semseg") if kind in scene})
    scores = score_scenes([_by_kind(result) for result in results], named, "generated", judge)
    scores += score_scenes(renders, named, "true renders", judge)
    scores += score_scenes(tokens, named, "tokens of the truth", judge)
    guess = Score("guess", "another caption", *precision_recall([*named[1:], *named[:1]], named))
    return sorted(scores, key=lambda score: ("RGB", "segmentation", "boxes").index(score.modality)) + [guess]


def _by_kind(result: Result) -> dict[str, Decoded]:
    return {value.kind: value for value in result.values()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", type=Path, required=True, help="weights of the judge")
    parser.add_argument("--data", type=Path, required=True, help="scenes that neither model was trained on")
    parser.add_argument("--train_judge", type=Path, help="only train the judge, on these scenes, and measure it")
    parser.add_argument("--epochs", type=int, default=JudgeOptions.epochs, help="epochs of the judge's training")
    parser.add_argument("--model", default=str(DEMO_MODEL), help="run folder or folder with a model")
    parser.add_argument("--tokenizers", help="folder of the tokenizers, unless the model has a generation.yaml")
    parser.add_argument("--captions", type=int, default=200, help="number of captions")
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo_model"), help="folder of scores.json and sheet.png")
    parser.add_argument("--sheet", type=int, default=6, help="number of captions on the sheet")
    options = parser.parse_args(argv)
    if options.train_judge:
        train(options.train_judge, options.judge, options.epochs)
    judge = Judge.load(options.judge)
    samples = read_scenes(options.data)[: options.captions]
    captions = [truth(sample, SIZE)["caption"].value for sample in samples]
    if options.train_judge:
        named = [named_objects(caption, TOYS) for caption in captions]
        renders = [{"rgb": truth(sample, SIZE)["rgb"]} for sample in samples]
        print(json.dumps(asdict(score_scenes(renders, named, "true renders", judge)[0])))
        return
    sampler = Sampler.load(options.model, options.tokenizers)
    chain = sampler.remaining_targets(["caption"])
    last = max(index for index, name in enumerate(chain) if _kind(name) in JUDGED)
    began = time.monotonic(), time.process_time()
    results = generate(sampler, captions, chain[: last + 1], options.batch_size, options.seed)
    seconds, cpu_seconds = time.monotonic() - began[0], time.process_time() - began[1]
    scores = judge_model(sampler, judge, samples, results, captions)
    drawn = results[: options.sheet]
    if chain[last + 1 :]:
        drawn = sampler(drawn, chain[last + 1 :], seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.out / "sheet.png") as path:
        sampler.plot(drawn).savefig(path)
    content = {
        "model": str(options.model),
        "captions": len(captions),
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "scores": [asdict(score) for score in scores],
    }
    with atomic_path(options.out / "scores.json") as path:
        path.write_text(json.dumps(content, indent=2) + "\n")
    head = ("objects in", "source", "precision", "recall")
    rows = [(score.modality, score.source, f"{score.precision:.3f}", f"{score.recall:.3f}") for score in scores]
    print(aligned(head, rows, left=(0, 1)))
    print(f"{options.out / 'scores.json'}\n{options.out / 'sheet.png'}")


def _kind(name: str) -> str:
    return name.split("@")[0].removeprefix("tok_")


if __name__ == "__main__":
    run_cli(main)
