"""Stage 6: what the trained model generates for scenes that it has never seen, beside the truth.

From RGB everything else; from words pictures. Beside each measure stands what guessing gives, and what the tokens can
show at best: those of the true pictures, decoded.
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
from fourm.demo import scores
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

SHOWN = 5  # scenes on the sheet
PROMPTS = (
    "a red cup and a yellow duck on the grass",
    "a blue car on a brick floor",
    "on gravel, a pink teddy bear on the left and a green cube on the right",
    "a wooden table and an orange beach ball on a carpet of stars",
)


@dataclass(frozen=True)
class Score:
    """A measure of the generated scenes, of what the tokens can show at best (None: all of it), and of guesses."""

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
    """Generate what is missing, measure all of it (``scores.json``) and draw it (``sheet.png``, ``words/sheet.png``).

    Args:
        base: keys of :class:`GenerationOptions`, of RGB → everything.
        data: the demo's data.
        out: folder for results and pictures.
        count: validation scenes that are measured.
    """
    photo, measured = _photograph(out / "photograph.png")
    given: dict[str, dict[str, Any]] = {
        "scenes": {"data": str(data / "val"), "num_samples": count},
        "photo": {"data": str(photo)},
        "words": {"data": list(PROMPTS), "cond_domains": "caption", "target_domains": "rgb-depth-semseg"},
    }
    for name, keys in given.items():
        run(build(GenerationOptions, {**base, **keys, "output_dir": str(out / name)}, "generation"))

    samples = read_scenes(data / "val")[:count]
    generated = [_by_kind(read_result(out / "scenes" / sample.key)) for sample in samples]
    size = len(generated[0]["rgb"].value)
    true = [truth(sample, size) for sample in samples]
    training = [truth(sample, size) for sample in read_scenes(data / "train", "shard-00000.tar")]
    sampler = Sampler.load(base["model"], base["tokenizers"])
    shown = [reconstructed(sample, sampler) for sample in samples]
    parts = [measures(scenes, true) for scenes in (generated, shown, guesses(training, count))]
    found = [
        Score(name, unit, value, parts[1].get((name, unit), (None,))[0], parts[2][name, unit][0], higher)
        for (name, unit), (value, higher) in parts[0].items()
    ]
    # Of features there is no other truth than what the tokens tell.
    known = [{**tokens, **real} for real, tokens in zip(true, shown, strict=True)]
    _sheet(generated[:SHOWN], known[:SHOWN], _by_kind(read_result(out / "photo" / photo.stem)), measured, out / SHEET)
    with atomic_path(out / "scores.json") as path:
        path.write_text(json.dumps([asdict(score) for score in found], indent=2) + "\n")


def read_scores(out: Path) -> list[Score]:
    return [Score(**score) for score in json.loads((out / "scores.json").read_text())]


def passed(found: Sequence[Score]) -> bool:
    """Whether the model reads the picture; boxes take more than minutes to learn."""
    return all(score.beats_guess for score in found if score.measure != "boxes")


def measures(
    predicted: Sequence[DecodedScene], true: Sequence[DecodedScene]
) -> dict[tuple[str, str], tuple[float, bool]]:
    """(measure, unit) → value and whether higher is better, for the kinds that ``predicted`` has."""
    kinds = predicted[0].keys() & true[0].keys()
    p, t = ({kind: [scene[kind].value for scene in scenes] for kind in kinds} for scenes in (predicted, true))
    found: dict[tuple[str, str], tuple[float, bool]] = {
        ("depth", "absolute relative error"): (
            float(np.mean(list(map(scores.abs_rel, p["depth"], t["depth"])))),
            False,
        ),
        ("normals", "mean angle in degrees"): (
            float(np.mean(list(map(scores.normal_angle, p["normal"], t["normal"])))),
            False,
        ),
        ("segmentation", "mean IoU of the classes"): (scores.mean_iou(p["semseg"], t["semseg"]), True),
    }
    if "det" in p:
        precision, recall = scores.box_precision_recall(p["det"], t["det"])
        found["boxes", "precision at IoU 0.5"] = precision, True
        found["boxes", "recall at IoU 0.5"] = recall, True
    if "caption" in p:
        precision, recall, exact = scores.word_precision_recall(p["caption"], t["caption"], [*TOYS])
        found["objects in captions", "precision"] = precision, True
        found["objects in captions", "recall"] = recall, True
        found["objects in captions", "exactly the right ones"] = exact, True
    return found


def reconstructed(sample: RawSample, sampler: Sampler) -> DecodedScene:
    """The pictures of a scene after they have been tokens, and what a network sees in them as tokens tell it."""
    values = sample.values(OpenFiles(), keep_pixels=False)
    sources = {
        name: sampler.tokenizers[kind_of(m)].info.modality for name, m in sampler.targets.items() if m.type == "img"
    }
    batch = make_batch(
        [{name: values[kind] for name, kind in sources.items()}], sampler.inputs, sampler.tokenizers, None
    )
    return _by_kind(decode(batch, sampler.inputs, sampler.tokenizers)[0])


def markdown(found: Sequence[Score]) -> str:
    """The scores as a table."""
    head = ("", "", "generated from RGB", "tokens of the truth", "guess", "better is")
    rows = [
        (
            score.measure, score.unit, f"{score.generated:.3g}", "" if score.tokens is None else f"{score.tokens:.3g}",
            f"{score.guess:.3g}", "higher" if score.higher_is_better else "lower",
        )
        for score in found
    ]  # fmt: skip
    return aligned(head, rows, left=(0, 1, 5))


def _by_kind(result: Mapping[str, Decoded]) -> DecodedScene:
    return {decoded.kind: decoded for decoded in result.values()}


def _photograph(path: Path) -> tuple[Path, np.ndarray]:
    """A real picture that ships with scikit-image, as a file, and its depth up to scale by a stereo measurement."""
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
    """Two rows per scene, what was generated and the truth; of the photograph only depth was measured."""
    kinds = [kind for kind in KINDS if kind in generated[0]]
    rows, labels = [], []
    for scene, real in zip(generated, true, strict=True):
        rows += [{kind: values[kind] for kind in kinds} for values in (scene, real)]
        labels += ["generated", "truth"]
    rows += [{kind: photo[kind] for kind in kinds}, {"depth": Decoded("depth", measured)}]
    labels += ["generated", "measured"]
    with atomic_path(path) as temporary:
        plot(rows, "From RGB alone: unseen scenes, and a photograph of the real world", labels).savefig(temporary)
