"""People and segmented instances, whose shapes are codes of a tokenizer, as text.

Codes below 512 are the words ``v0=0`` … ``v0=511``, those from there on ``v1=0``, ….
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fourm.data.transforms.base import AbstractTransform
from fourm.data.transforms.sequence import Box, box_words, crop_box, of_stored_crop
from fourm.utils.errors import DataError


def code_words(codes: Sequence[int], count: int) -> list[str]:
    """The words of ``count`` codes below 1024."""
    codes = [int(code) for code in codes]
    if len(codes) != count or not all(0 <= code < 1024 for code in codes):
        raise DataError(f"expected {count} codes from 0 to 1023, not {codes}")
    return [f"v{code // 512}={code % 512}" for code in codes]


def _numbers(count: int, low: float, high: float) -> Callable[[Sequence[float]], list[str]]:
    """``count`` values in [low, high] → the words of 0 to 999."""

    def words(values: Sequence[float]) -> list[str]:
        if len(values) != count or not all(isinstance(value, (int, float)) for value in values):
            raise DataError(f"expected {count} numbers, not {values}")
        return [f"v0={round(999 * (min(max(value, low), high) - low) / (high - low))}" for value in values]

    return words


def _clipped(box: Sequence[float]) -> Box:
    xmin, ymin, xmax, ymax = (min(max(side, 0.0), 1.0) for side in box)
    return xmin, ymin, xmax, ymax


PARTS: dict[str, Callable[[Sequence], list[str]]] = {
    "pose": lambda codes: code_words(codes, 8),
    "global": _numbers(9, -1, 1),
    "shape": _numbers(10, -3, 3),
    "camera": _numbers(3, -1, 19),
}
"""What is said of a person beside the box: the codes of the pose, the rotation, the shape, and the camera."""


@dataclass(frozen=True)
class HumanPoseTransform(AbstractTransform):
    """``human`` and the box, then the parts in random order, for each person; ``none`` without people.

    A file has a list of people, ``{"box", "pose", "global", "shape", "camera"}``, or one such list per stored crop.
    """

    follows_crop: ClassVar[bool] = True

    def preprocess(self, value: Any) -> list[Any]:
        if not isinstance(value, list) or not all(isinstance(item, (list, Mapping)) for item in value):
            raise DataError(f"expected a list of people, or one per stored crop, not {value!r:.80}")
        return value

    def stored_crops(self, value: list[Any]) -> int | None:
        return len(value) if value and all(isinstance(item, list) for item in value) else None

    def image_augment(
        self, value, crop_coords, flip, orig_size, target_size, rand_aug_idx, resample_mode=None
    ) -> list[tuple[Mapping[str, Any], Box]]:
        """Who is left in the crop, with the box there.

        Raises:
            DataError: people of the whole picture were to be mirrored, which codes of a pose cannot be.
        """
        if self.stored_crops(value) is not None:
            return [(person, _clipped(person["box"])) for person in of_stored_crop(value, rand_aug_idx)]
        boxes = [crop_box(person["box"], crop_coords, flip, orig_size) for person in value]
        kept = [(person, box) for person, box in zip(value, boxes, strict=True) if box]
        if flip and kept:
            raise DataError(
                "a pose cannot be mirrored: let the file have one list of people per stored crop, or set hflip to 0"
            )
        return kept

    def choose(self, value: list[tuple[Mapping[str, Any], Box]], generator: np.random.Generator) -> list[str]:
        words = []
        for person, box in value:
            words += ["human", *box_words(box)]
            parts = [name for name in PARTS if name in person]
            for index in generator.permutation(len(parts)):
                name = parts[index]
                words += [name, *PARTS[name](person[name])]
        return words or ["none"]

    def postprocess(self, value: list[str]) -> str:
        return " ".join(value)


@dataclass(frozen=True)
class SAMInstanceTransform(AbstractTransform):
    """``point`` and its row and column, then ``none`` or each polygon around it in random order, for some random points.

    A file has an entry per stored crop: a list of ``{"points": (n, 2) x and y in pixels, "token_ids": (16,)}``, or one dict
    of two such lists.

    Attributes:
        size: side of the crops in pixels.
        num_points: query points that are drawn.
    """

    size: int = 224
    num_points: int = 7

    follows_crop: ClassVar[bool] = True

    def preprocess(self, value: Any) -> Sequence[Any]:
        if not isinstance(value, (np.ndarray, list)) or not all(
            isinstance(v, (list, tuple, dict, np.ndarray)) for v in value
        ):
            raise DataError(f"expected the instances of each stored crop, not {type(value).__name__}")
        return list(value)

    def stored_crops(self, value: Sequence[Any]) -> int:
        return len(value)

    def image_augment(
        self, value, crop_coords, flip, orig_size, target_size, rand_aug_idx, resample_mode=None
    ) -> list[tuple[np.ndarray, list[str]]]:
        """Outline and words of each instance in the crop."""
        crop = of_stored_crop(value, rand_aug_idx)
        if isinstance(crop, dict):
            crop = [dict(zip(crop, row, strict=True)) for row in zip(*crop.values(), strict=True)]
        return [self._instance(instance) for instance in crop]

    def _instance(self, instance: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
        points = np.asarray(instance["points"], float)
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
            raise DataError(f"expected a polygon of shape (3 or more, 2), not {points.shape}")
        box = np.concatenate([points.min(0), points.max(0)]).clip(0, self.size) / self.size
        return points, ["polygon", *box_words(box.tolist()), *code_words(instance["token_ids"], 16)]

    def choose(self, value: list[tuple[np.ndarray, list[str]]], generator: np.random.Generator) -> list[str]:
        words: list[str] = []
        for row, column in generator.integers(self.size, size=(self.num_points, 2)).tolist():
            words += ["point", f"v0={row}", f"v1={column}"]
            around = [polygon for outline, polygon in value if encloses(outline, column, row)]
            words += [word for index in generator.permutation(len(around)) for word in around[index]] or ["none"]
        return words

    def postprocess(self, value: list[str]) -> str:
        return " ".join(value)


def encloses(outline: np.ndarray, x: float, y: float) -> bool:
    """Whether a polygon (n, 2) has the point inside: a ray from it crosses the outline an odd number of times."""
    (x0, y0), (x1, y1) = outline.T, np.roll(outline, -1, axis=0).T
    crosses = (y0 > y) != (y1 > y)
    at = x0[crosses] + (y - y0[crosses]) / (y1 - y0)[crosses] * (x1 - x0)[crosses]
    return bool((at > x).sum() % 2)
