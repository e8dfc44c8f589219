"""What a rendered view says about itself: normals, class ids, edges, boxes, caption, colours and numbers.

Pure functions of a :class:`~fourm.demo.simulator.View`, so every modality is exact and all of them agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fourm.demo.camera import Camera
from fourm.demo.scene import GROUNDS, TOYS, Placement
from fourm.demo.simulator import View

CLASSES = ("ground", *TOYS)  # class ids of the segmentation
MIN_SIDE = 0.05  # of the picture: smaller boxes are not worth naming
MIN_AREA = 0.004  # of the picture: pixels that must be left of a toy that others hide
OCCLUSION_STEP = 0.03  # metres between neighbouring pixels that make an occlusion edge


@dataclass(frozen=True)
class Seen:
    """A toy as the picture shows it: box (xmin, ymin, xmax, ymax) in [0, 1], and distance in metres."""

    toy: Placement
    box: tuple[float, float, float, float]
    distance: float

    @property
    def phrase(self) -> str:
        return f"{self.toy.paint or TOYS[self.toy.name].look} {self.toy.name}"


def seen_toys(view: View) -> list[Seen]:
    """The toys from left to right, with boxes tight around their pixels; those that are out of sight are left out."""
    size = len(view.instances)
    found = []
    for index, toy in enumerate(view.scene.toys):
        rows, columns = np.nonzero(view.instances == index)
        if len(rows):
            (xmin, xmax), (ymin, ymax) = ((at.min() / size, (at.max() + 1) / size) for at in (columns, rows))
            box = (float(xmin), float(ymin), float(xmax), float(ymax))
            found.append(Seen(toy, box, float(view.depth[rows, columns].min())))
    return sorted(found, key=lambda seen: seen.box[0] + seen.box[2])


def is_clear(view: View) -> bool:
    """Every toy of the scene is in the picture and large enough to be recognised."""
    seen = seen_toys(view)
    areas = np.bincount(view.instances[view.instances >= 0], minlength=len(view.scene.toys)) / view.instances.size
    sides = [min(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (s.box for s in seen)]
    return len(seen) == len(view.scene.toys) and min(sides) >= MIN_SIDE and areas.min() >= MIN_AREA


def normals(depth: np.ndarray, camera: Camera) -> np.ndarray:
    """Surface normals (S, S, 3) of unit length in the camera frame, facing the viewer, from exact depth (S, S).

    Of the two neighbours along each axis the one nearer in depth is taken, so that edges of objects stay sharp.
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
    """(S, S) uint8, index into :data:`CLASSES`."""
    table = np.array([CLASSES.index(toy.name) for toy in view.scene.toys] + [0], np.uint8)
    return table[view.instances]  # index −1, the ground, is the table's last entry


def edges(rgb: np.ndarray) -> np.ndarray:
    """Canny edges (S, S) bool of a colour picture."""
    from skimage.color import rgb2gray
    from skimage.feature import canny

    return canny(rgb2gray(rgb), sigma=1.5)


def detections(seen: list[Seen]) -> dict[str, Any]:
    """Boxes in the published format."""
    return {"instances": [{"boxes": list(s.box), "class_name": s.toy.name, "score": 1.0} for s in seen]}


def caption(seen: list[Seen], ground: str, generator: np.random.Generator) -> str:
    """One of several ways to say what stands where, from left to right."""
    things = [f"{'an' if s.phrase[0] in 'aeiou' else 'a'} {s.phrase}" for s in seen]
    listed = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    where = GROUNDS[ground].phrase
    form = generator.integers(4) if len(seen) > 1 else 0
    if form == 0:
        return f"{listed} {where}"
    if form == 1:
        return f"from left to right: {listed}, {where}"
    if form == 2:
        between = f", {things[1]} in the middle" if len(seen) == 3 else f", {', '.join(things[1:-1])} in between"
        return f"{where}, {things[0]} on the left{between if len(seen) > 2 else ''} and {things[-1]} on the right"
    nearest = min(seen, key=lambda s: s.distance)
    return f"{listed} {where}. the {nearest.toy.name} is closest"


def color_palette(rgb: np.ndarray, most: int = 7) -> list[dict[str, list[list[int]]]]:
    """The 1 … ``most`` dominant colours (median cut), commonest first, in the published format."""
    picture, palettes = Image.fromarray(rgb).resize((32, 32), Image.Resampling.BOX), {}
    for n in range(1, most + 1):
        reduced = picture.quantize(n, kmeans=1)
        counts = np.bincount(np.asarray(reduced).ravel(), minlength=n)[:n]
        colors = np.resize(np.array(reduced.getpalette()), (n, 3))
        palettes[str(n)] = colors[np.argsort(-counts, kind="stable")].tolist()
    return [palettes]


def metadata(view: View, seen: list[Seen], normal: np.ndarray, text: str) -> dict[str, float]:
    """The published metadata as far as a rendered view knows them; nothing that a learned scorer would have to guess.

    Colourfulness is Hasler and Süsstrunk's, entropy that of grey levels in bits, geometric complexity the spread of the
    normals' directions (1 − length of their mean), the occlusion score the share of pixels at a step in depth.
    """
    height, width = view.depth.shape
    red, green, blue = view.rgb.astype(np.float64).transpose(2, 0, 1)
    opponent = np.stack([red - green, (red + green) / 2 - blue])
    grey = np.asarray(Image.fromarray(view.rgb).convert("L"))
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
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
        "entropy": -(share[share > 0] * np.log2(share[share > 0])).sum(),
        "walkability": on_ground,
        "objectness": 1 - on_ground,
        "semantic_diversity": len({s.toy.name for s in seen}) + 1,
        "geometric_complexity": 1 - np.linalg.norm(normal.mean(axis=(0, 1))),
        "occlusion_score": steps.mean(),
    }
    return {key: value if isinstance(value, int) else round(float(value), 4) for key, value in values.items()}
