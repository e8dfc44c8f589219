"""Measure how far generated modalities are from the truth, with the usual metric of each kind.

All are pure functions of arrays, boxes and words. Metrics that are not defined for single scenes (segmentation, boxes,
words) are computed over all scenes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fourm.vq import metrics

IOU = 0.5  # minimum overlap of a box with the object that it detects


def abs_rel(predicted: np.ndarray, true: np.ndarray) -> float:
    """Compute the mean of |p − t| / t of depth maps (H, W), with the scale ≥ 0 and shift of p that fit best.

    Tokens encode depth relative to its picture rather than in metres, so that scale and shift are fitted, as is usual
    for such depth. A prediction that confuses far and near is fitted by a constant.
    Pixels that are nan in either map are ignored.
    """
    p, t = (torch.from_numpy(depth)[None] for depth in (predicted, true))
    return metrics.abs_rel(p, t, fit=True).item()


def normal_angle(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the mean angle in degrees between normals (H, W, 3); normals of length 0 are unknown."""
    return metrics.mean_angle(*(torch.from_numpy(x).permute(2, 0, 1)[None] for x in (predicted, true))).item()


def mean_iou(predicted: Iterable[np.ndarray], true: Iterable[np.ndarray]) -> float:
    """Return the IoU of class ids (H, W), counted over all pictures and averaged over the classes in the truth."""
    p, t = (np.concatenate([ids.ravel() for ids in maps]) for maps in (predicted, true))
    ious = []
    for label in np.unique(t):
        both = ((p == label) & (t == label)).sum()
        ious.append(both / ((p == label) | (t == label)).sum())
    return float(np.mean(ious))


Boxes = Sequence[Mapping[str, Any]]
"""The boxes of a scene, each ``{"boxes": [xmin, ymin, xmax, ymax], "class_name": …}``."""


def box_precision_recall(predicted: Sequence[Boxes], true: Sequence[Boxes]) -> tuple[float, float]:
    """Return precision and recall of boxes; a box detects an object of its class if their IoU is at least 0.5."""
    matches = sum(_count_matches(p, t) for p, t in zip(predicted, true, strict=True))
    return matches / max(sum(map(len, predicted)), 1), matches / max(sum(map(len, true)), 1)


def _count_matches(predicted: Boxes, true: Boxes) -> int:
    """Match each box, in order, with the unmatched object of its class that it overlaps most."""
    unmatched = list(true)
    for box in predicted:
        candidates = [other for other in unmatched if other["class_name"] == box["class_name"]]
        best = max(candidates, key=lambda other: box_iou(box["boxes"], other["boxes"]), default=None)
        if best is not None and box_iou(box["boxes"], best["boxes"]) >= IOU:
            unmatched.remove(best)
    return len(true) - len(unmatched)


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / max(area - width * height, 1e-12)


def named_objects(text: str, names: Iterable[str]) -> set[str]:
    """Return those of ``names`` that a text contains. The longest match counts: a robot arm is not a robot."""
    pattern = "|".join(rf"\b{re.escape(name)}\b" for name in sorted(names, key=len, reverse=True))
    return set(re.findall(pattern, text))


def precision_recall(predicted: Sequence[set[str]], true: Sequence[set[str]]) -> tuple[float, float]:
    """Return precision and recall of the objects of all scenes together."""
    both = sum(len(p & t) for p, t in zip(predicted, true, strict=True))
    return both / max(sum(map(len, predicted)), 1), both / max(sum(map(len, true)), 1)


def word_precision_recall(
    predicted: Sequence[str], true: Sequence[str], names: Sequence[str]
) -> tuple[float, float, float]:
    """Return precision and recall of named objects, and the fraction of captions with exactly the true objects.

    Args:
        predicted: Generated captions.
        true: True captions.
        names: Names of objects; see :func:`named_objects`.
    """
    p, t = ([named_objects(text, names) for text in texts] for texts in (predicted, true))
    return *precision_recall(p, t), sum(a == b for a, b in zip(p, t, strict=True)) / len(p)
