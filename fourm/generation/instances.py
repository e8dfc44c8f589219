"""Segmented instances: decodes the codes of their shapes to masks, and draws these.

A model names the instances at a few query points. Each has a box, and 16 codes of a mask that fills the box.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from fourm.data.transforms.instances import MASK_CODES
from fourm.generation.drawing import SIZE, canvas, color
from fourm.utils.errors import UserError
from fourm.vq import ImageTokenizer

_POINT_RANGE = 224  # points are in pixels of a picture of this side
_MIN_CONTRAST = 0.9  # a mask whose probabilities differ by less shows no shape
_SAME_MASK, _SAME_BOX = 0.8, 0.9  # Dice of masks and IoU of boxes above which two polygons are the same instance


def decode_instances(points: Sequence[dict[str, Any]], tokenizer: ImageTokenizer) -> tuple[list[dict[str, Any]], int]:
    """Add to each polygon its ``mask``: probabilities (S, S) float16 that a part of its box belongs to the instance.

    Args:
        points: See :func:`fourm.generation.sequences.sam_instances`.
        tokenizer: Tokenizer of masks.

    Returns:
        The points, and the number of dropped words: polygons with a code that the tokenizer does not have are left out.

    Raises:
        UserError: If the tokenizer is not one of masks.
    """
    if (tokenizer.num_channels, tokenizer.num_codebooks) != (1, 1):
        raise UserError(
            f"the tokenizer of sam_instance must decode {MASK_CODES} codes to a mask, but it has "
            f"{tokenizer.num_codebooks} codebooks and {tokenizer.num_channels} channels"
        )
    decoded, dropped = [], 0
    for point in points:
        known = [dict(polygon) for polygon in point["polygons"] if max(polygon["codes"]) < tokenizer.vocab_size]
        dropped += (len(point["polygons"]) - len(known)) * (1 + 4 + MASK_CODES)
        decoded.append({**point, "polygons": known})
    polygons = [polygon for point in decoded for polygon in point["polygons"]]
    if polygons:
        ids = torch.tensor([polygon["codes"] for polygon in polygons])
        masks = tokenizer.decode_pictures(tokenizer.to_grid(ids)).sigmoid()[:, 0].half().numpy()
        for polygon, mask in zip(polygons, masks, strict=True):
            polygon["mask"] = mask
    return decoded, dropped


def merge_instances(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each instance once, ``{"box", "mask"}``, although several query points may lie in it; larger boxes first.

    Masks of the same instance are averaged. Masks without a shape are left out.
    """
    merged: list[tuple[list[float], list[np.ndarray]]] = []
    for polygon in (polygon for point in points for polygon in point["polygons"] if "mask" in polygon):
        mask = np.asarray(polygon["mask"], np.float32)
        if np.ptp(mask) < _MIN_CONTRAST:
            continue
        for box, masks in merged:
            if _iou(box, polygon["box"]) > _SAME_BOX and _dice(masks[0] > 0.5, mask > 0.5) > _SAME_MASK:
                masks.append(mask)
                break
        else:
            merged.append((polygon["box"], [mask]))
    merged.sort(key=lambda instance: -_area(instance[0]))
    return [{"box": box, "mask": np.mean(masks, axis=0)} for box, masks in merged]


def place_mask(mask: np.ndarray, box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """Resize a mask to its box.

    Args:
        mask: Probabilities (S, S).
        box: Corners xmin, ymin, xmax, ymax in [0, 1].
        size: Height and width of the picture in pixels.

    Returns:
        (H, W) bool.
    """
    height, width = size
    left, top, right, bottom = (round(c * side) for c, side in zip(box, (width, height) * 2, strict=True))
    left, top = min(left, width - 1), min(top, height - 1)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    values = Image.fromarray(np.asarray(mask, np.float32)).resize(
        (right - left, bottom - top), Image.Resampling.BILINEAR
    )
    placed = np.zeros((height, width), bool)
    placed[top:bottom, left:right] = np.asarray(values) > 0.5
    return placed


def draw_instances(
    points: Sequence[dict[str, Any]], background: np.ndarray | None = None, size: int = SIZE
) -> np.ndarray:
    """Draw the masks of instances, each in a colour of its own, and the query points.

    Polygons without a ``mask`` are only a box.

    Args:
        points: Points as of :func:`decode_instances`.
        background: Picture (H, W, 3) uint8 to draw on; None: white.
        size: Minimum side of the result in pixels.

    Returns:
        (H, W, 3) uint8.
    """
    pixels = np.array(canvas(background, size))
    height, width = pixels.shape[:2]
    for index, instance in enumerate(merge_instances(points)):
        inside = place_mask(instance["mask"], instance["box"], (height, width))
        pixels[inside] = (0.4 * pixels[inside] + 0.6 * np.array(color(index))).round()
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    line = max(min(picture.size) // 110, 1)
    for index, point in enumerate(points):
        for polygon in point["polygons"]:
            if "mask" not in polygon:
                low, high = np.array(polygon["box"], float).reshape(2, 2) * (width, height)
                draw.rectangle([*low, *np.maximum(high - 1, low)], outline=color(index), width=line)
        row, column = (c * side / _POINT_RANGE for c, side in zip(point["point"], (height, width), strict=True))
        draw.ellipse(
            [column - 2 * line, row - 2 * line, column + 2 * line, row + 2 * line], fill=color(index), outline="white"
        )
    return np.asarray(picture)


def _area(box: Iterable[float]) -> float:
    xmin, ymin, xmax, ymax = box
    return max(xmax - xmin, 0.0) * max(ymax - ymin, 0.0)


def _iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    common = _area([*np.maximum(first[:2], second[:2]), *np.minimum(first[2:], second[2:])])
    return common / max(_area(first) + _area(second) - common, 1e-12)


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    """Twice the intersection of two masks over the sum of their areas."""
    return 2 * float((first & second).sum()) / max(float(first.sum() + second.sum()), 1.0)
