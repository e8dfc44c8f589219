"""Stage 6: generate with the trained model for scenes that it has never seen, and compare with the truth.

All other modalities are generated from RGB, and pictures from words. Each measure is reported together with two
references: a guess, and the upper limit that the tokens set, which is what the tokens of the true pictures decode to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fourm.data.image_augmenter import center_crop
from fourm.data.raw_sample import OpenFiles, RawSample
from fourm.demo import scores as metrics
from fourm.demo.report import aligned
from fourm.demo.scene import TOYS
from fourm.demo.truth import KINDS, DecodedScene, guesses, read_scenes, truth
from fourm.generation import Decoded, Sampler, decode, plot
from fourm.generation.decoding import kind_of
from fourm.generation.inputs import make_batch
from fourm.generation.results import read_result
from fourm.generation.script import SHEET, GenerationOptions, run
from fourm.utils.config import build
from fourm.utils.files import atomic_path

NUM_DRAWN = 5  # number of scenes on the sheet
PROMPTS = (
    "a red cup and a yellow duck on the grass",
    "a blue car on a brick floor",
    "on gravel, a pink teddy bear on the left and a green cube on the right",
    "a wooden table and an orange beach ball on a carpet of stars",
)


@dataclass(frozen=True)
class Score:
    """A measure of the generated scenes, of the tokenized truth (None if that loses nothing), and of a guess."""

    measure: str
    unit: str
    generated: float
    tokens: float | None
    guess: float
    higher_is_better: bool

    @property
    def beats_guess(self) -> bool:
        return self.generated > self.guess if self.higher_is_better else self.generated < self.guess


def generate_all(base: Mapping[str, Any], data: Path, out: Path, count: int) -> None:
    """Generate what is missing, score all of it (``scores.json``) and draw it (``sheet.png``, ``words/sheet.png``).

    Args:
        base: Keys of :class:`GenerationOptions` for generating everything from RGB.
        data: Folder of the demo's data.
        out: Folder for results and pictures.
        count: Number of validation scenes to score.
    """
    photo, measured = _photograph(out / "photograph.png")
    jobs: dict[str, dict[str, Any]] = {
        "scenes": {"data": str(data / "val"), "num_samples": count},
        "photo": {"data": str(photo)},
        "words": {"data": list(PROMPTS), "cond_domains": "caption", "target_domains": "rgb-depth-semseg"},
    }
    for name, keys in jobs.items():
        run(build(GenerationOptions, {**base, **keys, "output_dir": str(out / name)}, "generation"))

    samples = read_scenes(data / "val")[:count]
    generated = [_by_kind(read_result(out / "scenes" / sample.key)) for sample in samples]
    size = len(generated[0]["rgb"].value)
    true = [truth(sample, size) for sample in samples]
    training = [truth(sample, size) for sample in read_scenes(data / "train", "shard-00000.tar")]
    sampler = Sampler.load(base["model"], base["tokenizers"])
    reconstructions = [reconstruct(sample, sampler) for sample in samples]
    of_generated, of_tokens, of_guesses = (
        measures(scenes, true) for scenes in (generated, reconstructions, guesses(training, count))
    )
    scores = [
        Score(name, unit, value, of_tokens.get((name, unit), (None,))[0], of_guesses[name, unit][0], higher)
        for (name, unit), (value, higher) in of_generated.items()
    ]
    # The truth of features is known from their tokens only.
    references = [{**tokens, **real} for real, tokens in zip(true, reconstructions, strict=True)]
    photo_result = _by_kind(read_result(out / "photo" / photo.stem))
    _sheet(generated[:NUM_DRAWN], references[:NUM_DRAWN], photo_result, measured, out / SHEET)
    with atomic_path(out / "scores.json") as path:
        path.write_text(json.dumps([asdict(score) for score in scores], indent=2) + "\n")


def read_scores(out: Path) -> list[Score]:
    return [Score(**score) for score in json.loads((out / "scores.json").read_text())]


def passed(scores: Sequence[Score]) -> bool:
    """Return whether the model beats the guess everywhere except for boxes, which take longer than minutes to learn."""
    return all(score.beats_guess for score in scores if score.measure != "boxes")


def measures(
    predicted: Sequence[DecodedScene], true: Sequence[DecodedScene]
) -> dict[tuple[str, str], tuple[float, bool]]:
    """Return (measure, unit) → value and whether higher is better, for the kinds of values in ``predicted``."""
    kinds = predicted[0].keys() & true[0].keys()
    p, t = ({kind: [scene[kind].value for scene in scenes] for kind in kinds} for scenes in (predicted, true))
    depth_error = float(np.mean(list(map(metrics.abs_rel, p["depth"], t["depth"]))))
    angle = float(np.mean(list(map(metrics.normal_angle, p["normal"], t["normal"]))))
    values: dict[tuple[str, str], tuple[float, bool]] = {
        ("depth", "absolute relative error"): (depth_error, False),
        ("normals", "mean angle in degrees"): (angle, False),
        ("segmentation", "mean IoU of the classes"): (metrics.mean_iou(p["semseg"], t["semseg"]), True),
    }
    if "det" in p:
        precision, recall = metrics.box_precision_recall(p["det"], t["det"])
        values["boxes", "precision at IoU 0.5"] = precision, True
        values["boxes", "recall at IoU 0.5"] = recall, True
    if "caption" in p:
        precision, recall, exact = metrics.word_precision_recall(p["caption"], t["caption"], [*TOYS])
        values["objects in captions", "precision"] = precision, True
        values["objects in captions", "recall"] = recall, True
        values["objects in captions", "exactly the right ones"] = exact, True
    return values


def reconstruct(sample: RawSample, sampler: Sampler) -> DecodedScene:
    """Tokenize and decode the pictures of a scene, and the features that a network computes from them."""
    values = sample.values(OpenFiles(), keep_pixels=False)
    sources = {
        name: sampler.tokenizers[kind_of(m)].info.modality for name, m in sampler.targets.items() if m.type == "img"
    }
    batch = make_batch(
        [{name: values[kind] for name, kind in sources.items()}], sampler.inputs, sampler.tokenizers, None
    )
    return _by_kind(decode(batch, sampler.inputs, sampler.tokenizers)[0])


def markdown(scores: Sequence[Score]) -> str:
    """Format the scores as a table."""
    head = ("", "", "generated from RGB", "tokens of the truth", "guess", "better is")
    rows = [
        (
            score.measure,
            score.unit,
            f"{score.generated:.3g}",
            "" if score.tokens is None else f"{score.tokens:.3g}",
            f"{score.guess:.3g}",
            "higher" if score.higher_is_better else "lower",
        )
        for score in scores
    ]
    return aligned(head, rows, left=(0, 1, 5))


def _by_kind(result: Mapping[str, Decoded]) -> DecodedScene:
    return {decoded.kind: decoded for decoded in result.values()}


def _photograph(path: Path) -> tuple[Path, np.ndarray]:
    """Save a photograph that ships with scikit-image; return its file, and its measured stereo depth up to scale."""
    import skimage.data

    left, _, disparity = skimage.data.stereo_motorcycle()
    if not path.exists():
        with atomic_path(path) as temporary:
            Image.fromarray(left).save(temporary, "PNG")
    disparity = np.where(np.isfinite(disparity) & (disparity > 0), disparity, np.nan)
    top, left_edge, height, width = center_crop(disparity.shape)
    return path, 1 / disparity[top : top + height, left_edge : left_edge + width]


def _sheet(
    generated: Sequence[DecodedScene],
    true: Sequence[DecodedScene],
    photo: DecodedScene,
    measured: np.ndarray,
    path: Path,
) -> None:
    """Draw two rows per scene, for the generated values and the truth; for the photograph, only depth was measured."""
    kinds = [kind for kind in KINDS if kind in generated[0]]
    rows, labels = [], []
    for scene, real in zip(generated, true, strict=True):
        rows += [{kind: values[kind] for kind in kinds} for values in (scene, real)]
        labels += ["generated", "truth"]
    rows += [{kind: photo[kind] for kind in kinds}, {"depth": Decoded("depth", measured)}]
    labels += ["generated", "measured"]
    with atomic_path(path) as temporary:
        plot(rows, "From RGB alone: unseen scenes, and a photograph of the real world", labels).savefig(temporary)
