"""How far generated modalities are from the truth: the usual measures of each kind.

Pure functions of arrays, boxes and words. Where a measure cannot be had from single scenes (segmentation, boxes, words),
it is taken over all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

IOU = 0.5  # from which on a box has found its object


def abs_rel(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean |p − t| / t of depth maps (H, W), nan where unknown, after the scale ≥ 0 and shift of p that fit t best.

    Tokens tell depth within its picture, not in metres, so that scale and shift are fitted, as is usual for such depth.
    What takes far for near is fitted by a constant.
    """
    known = np.isfinite(predicted) & np.isfinite(true)
    p, t = predicted[known].astype(np.float64), true[known].astype(np.float64)
    design = np.stack([p, np.ones_like(p)], axis=1) / t[:, None]  # relative errors are what is to be small
    scale, _ = np.linalg.lstsq(design, np.ones_like(t), rcond=None)[0]
    design = design if scale >= 0 else design[:, 1:]
    fitted = design @ np.linalg.lstsq(design, np.ones_like(t), rcond=None)[0]
    return float(np.abs(fitted - 1).mean())


def normal_angle(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean angle in degrees between normals (H, W, 3); those of length 0 are unknown."""
    lengths = np.linalg.norm(predicted, axis=-1) * np.linalg.norm(true, axis=-1)
    cosine = (predicted * true).sum(-1)[lengths > 0] / lengths[lengths > 0]
    return float(np.degrees(np.arccos(cosine.clip(-1, 1))).mean())


def mean_iou(predicted: Iterable[np.ndarray], true: Iterable[np.ndarray]) -> float:
    """Intersection over union of class ids (H, W), counted over all pictures, mean over the classes of the truth."""
    p, t = (np.concatenate([ids.ravel() for ids in maps]) for maps in (predicted, true))
    ious = []
    for label in np.unique(t):
        both = ((p == label) & (t == label)).sum()
        ious.append(both / ((p == label) | (t == label)).sum())
    return float(np.mean(ious))


Boxes = Sequence[Mapping[str, Any]]
"""``{"boxes": [xmin, ymin, xmax, ymax], "class_name"}`` each."""


def box_precision_recall(predicted: Sequence[Boxes], true: Sequence[Boxes]) -> tuple[float, float]:
    """Share of the predicted boxes that have found an object of their class (IoU ≥ 0.5), and of the objects found."""
    found = sum(_matches(p, t) for p, t in zip(predicted, true, strict=True))
    return found / max(sum(map(len, predicted)), 1), found / max(sum(map(len, true)), 1)


def _matches(predicted: Boxes, true: Boxes) -> int:
    """Boxes in their order, each to the free object of its class that it covers best."""
    free, found = list(true), 0
    for box in predicted:
        rivals = [other for other in free if other["class_name"] == box["class_name"]]
        best = max(rivals, key=lambda other: box_iou(box["boxes"], other["boxes"]), default=None)
        if best is not None and box_iou(box["boxes"], best["boxes"]) >= IOU:
            free.remove(best)
            found += 1
    return found


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / max(area - width * height, 1e-12)


def word_precision_recall(
    predicted: Sequence[str], true: Sequence[str], names: Sequence[str]
) -> tuple[float, float, float]:
    """Share of the objects named that are in the true caption, share of those in it that are named, and the share of the
    captions that name exactly the right ones.

    Args:
        names: of objects; the longest that fits counts: a robot arm is no robot.
    """
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in sorted(names, key=len, reverse=True)))
    pairs = [(set(pattern.findall(p)), set(pattern.findall(t))) for p, t in zip(predicted, true, strict=True)]
    both = sum(len(p & t) for p, t in pairs)
    said, there = (sum(len(words) for words in side) for side in zip(*pairs, strict=True))
    return both / max(said, 1), both / max(there, 1), sum(p == t for p, t in pairs) / len(pairs)
