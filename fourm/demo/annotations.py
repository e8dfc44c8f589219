"""Derive annotations from a rendered view: normals, class ids, edges, boxes, caption, colours and metadata.

All are pure functions of a :class:`~fourm.demo.simulator.View`, so that every modality is exact and all of them agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fourm.demo.camera import Camera
from fourm.demo.scene import CLASSES, GROUNDS, TOYS, Placement
from fourm.demo.simulator import View

MIN_SIDE = 0.05  # minimum side of a box, as a fraction of the picture's side
MIN_AREA = 0.004  # minimum visible area of a partly hidden toy, as a fraction of the picture
OCCLUSION_STEP = 0.03  # minimum depth difference in metres between neighbouring pixels at an occlusion edge


@dataclass(frozen=True)
class VisibleToy:
    """A toy in the picture, with its box (xmin, ymin, xmax, ymax) in [0, 1] and its distance in metres."""

    toy: Placement
    box: tuple[float, float, float, float]
    distance: float

    @property
    def phrase(self) -> str:
        return f"{self.toy.paint or TOYS[self.toy.name].look} {self.toy.name}"


def visible_toys(view: View) -> list[VisibleToy]:
    """Return the visible toys from left to right, with tight boxes around their pixels."""
    size = len(view.instances)
    toys = []
    for index, toy in enumerate(view.scene.toys):
        rows, columns = np.nonzero(view.instances == index)
        if len(rows):
            bounds = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            xmin, ymin, xmax, ymax = (float(bound / size) for bound in bounds)
            toys.append(VisibleToy(toy, (xmin, ymin, xmax, ymax), float(view.depth[rows, columns].min())))
    return sorted(toys, key=lambda seen: seen.box[0] + seen.box[2])


def is_clear(view: View) -> bool:
    """Return whether every toy of the scene is visible and large enough to be recognised."""
    seen = visible_toys(view)
    areas = np.bincount(view.instances[view.instances >= 0], minlength=len(view.scene.toys)) / view.instances.size
    sides = [min(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (s.box for s in seen)]
    return len(seen) == len(view.scene.toys) and min(sides) >= MIN_SIDE and areas.min() >= MIN_AREA


def normals(depth: np.ndarray, camera: Camera) -> np.ndarray:
    """Compute unit surface normals (S, S, 3) in the camera frame, facing the viewer, from exact depth (S, S).

    Along each axis, the neighbour with the smaller depth difference is used, so that object edges stay sharp.
    """
    points = camera.points(depth)

    def tangent(axis: int) -> np.ndarray:
        step = np.diff(points, axis=axis)
        ends = [(1, 0) if a == axis else (0, 0) for a in range(3)]
        forward, backward = np.pad(step, [e[::-1] for e in ends], mode="edge"), np.pad(step, ends, mode="edge")
        return np.where(np.abs(forward[..., 2:]) <= np.abs(backward[..., 2:]), forward, backward)

    normal = np.cross(tangent(1), -tangent(0))  # x right × y up = towards the viewer
    return normal / np.linalg.norm(normal, axis=-1, keepdims=True)


def class_ids(view: View) -> np.ndarray:
    """Return the class of each pixel (S, S) as uint8 indices into :data:`~fourm.demo.scene.CLASSES`."""
    table = np.array([CLASSES.index(toy.name) for toy in view.scene.toys] + [0], np.uint8)
    return table[view.instances]  # the ground has index −1, which selects the last entry


def edges(rgb: np.ndarray) -> np.ndarray:
    """Return the Canny edges (S, S) of a colour picture as bool."""
    from skimage.color import rgb2gray
    from skimage.feature import canny

    return canny(rgb2gray(rgb), sigma=1.5)


def detections(seen: list[VisibleToy]) -> dict[str, Any]:
    """Return the boxes in the published format."""
    return {"instances": [{"boxes": list(s.box), "class_name": s.toy.name, "score": 1.0} for s in seen]}


def caption(seen: list[VisibleToy], ground: str, generator: np.random.Generator) -> str:
    """Describe the toys from left to right and the ground, in one of several randomly chosen sentence forms."""
    phrases = [f"{'an' if s.phrase[0] in 'aeiou' else 'a'} {s.phrase}" for s in seen]
    toys = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    location = GROUNDS[ground].phrase
    form = generator.integers(4) if len(seen) > 1 else 0
    if form == 0:
        return f"{toys} {location}"
    if form == 1:
        return f"from left to right: {toys}, {location}"
    if form == 2:
        between = f", {phrases[1]} in the middle" if len(seen) == 3 else f", {', '.join(phrases[1:-1])} in between"
        middle = between if len(seen) > 2 else ""
        return f"{location}, {phrases[0]} on the left{middle} and {phrases[-1]} on the right"
    nearest = min(seen, key=lambda s: s.distance)
    return f"{toys} {location}. the {nearest.toy.name} is closest"


def color_palette(rgb: np.ndarray, max_colors: int = 7) -> list[dict[str, list[list[int]]]]:
    """Return palettes of 1 … ``max_colors`` colours by median cut, most frequent first, in the published format."""
    picture = Image.fromarray(rgb).resize((32, 32), Image.Resampling.BOX)
    palettes = {}
    for n in range(1, max_colors + 1):
        reduced = picture.quantize(n, kmeans=1)
        counts = np.bincount(np.asarray(reduced).ravel(), minlength=n)[:n]
        colors = np.resize(np.array(reduced.getpalette()), (n, 3))
        palettes[str(n)] = colors[np.argsort(-counts, kind="stable")].tolist()
    return [palettes]


def metadata(view: View, seen: list[VisibleToy], normal: np.ndarray, text: str) -> dict[str, float]:
    """Return the published metadata that follow from a rendered view, without those that need a learned scorer.

    Colourfulness is defined as by Hasler and Süsstrunk, entropy is that of the grey levels in bits, geometric
    complexity is the spread of the normals' directions (1 − length of their mean), and the occlusion score is the
    fraction of pixels at a step in depth.
    """
    height, width = view.depth.shape
    red, green, blue = view.rgb.astype(np.float64).transpose(2, 0, 1)
    opponent = np.stack([red - green, (red + green) / 2 - blue])
    grey = np.asarray(Image.fromarray(view.rgb).convert("L"))
    frequencies = np.bincount(grey.ravel(), minlength=256) / grey.size
    coco = [s.toy.name for s in seen if TOYS[s.toy.name].coco]
    steps = np.zeros(view.depth.shape, bool)
    for axis in (0, 1):
        jump = np.abs(np.diff(view.depth, axis=axis)) > OCCLUSION_STEP
        steps |= np.pad(jump, [(0, int(a == axis)) for a in (0, 1)])
    on_ground = float((view.instances < 0).mean())
    values = {
        "original_width": width,
        "original_height": height,
        "caption_n_chars": len(text),
        "caption_n_words": len(text.split()),
        "caption_n_sentences": text.count(". ") + 1,
        "n_humans": 0,
        "n_coco_instances": len(coco),
        "coco_instance_diversity": len(set(coco)),
        "colorfulness": np.linalg.norm(opponent.std(axis=(1, 2))) + 0.3 * np.linalg.norm(opponent.mean(axis=(1, 2))),
        "brightness": grey.mean(),
        "contrast": grey.std(),
        "saturation": np.asarray(Image.fromarray(view.rgb).convert("HSV"))[..., 1].mean(),
        "entropy": -(frequencies[frequencies > 0] * np.log2(frequencies[frequencies > 0])).sum(),
        "walkability": on_ground,
        "objectness": 1 - on_ground,
        "semantic_diversity": len({s.toy.name for s in seen}) + 1,
        "geometric_complexity": 1 - np.linalg.norm(normal.mean(axis=(0, 1))),
        "occlusion_score": steps.mean(),
    }
    return {key: value if isinstance(value, int) else round(float(value), 4) for key, value in values.items()}
