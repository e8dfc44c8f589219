"""People and segmented instances as text; their shapes are codes of tokenizers, whose inputs objects.py makes.

Codes below 512 become the words ``v0=0`` … ``v0=511``, and the others ``v1=0``, ….
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fourm.data.object_arrays import ObjectArray
from fourm.data.transforms.base import MAPPINGS, AbstractTransform, CropCoords
from fourm.data.transforms.sequence import Box, box_words, checked_box, crop_box, stored_crop_entry
from fourm.utils.errors import DataError, UnreadableValue

NUM_CODES = 1024
"""The codes of poses and masks are below this number."""
POSE_CODES, MASK_CODES = 8, 16
"""The numbers of codes of a pose and of a mask."""
_CODE_WORDS = [f"v{code // 512}={code % 512}" for code in range(NUM_CODES)]


def code_words(codes: Sequence[int], count: int) -> list[str]:
    """Return the words of ``count`` codes below 1024."""
    if not isinstance(codes, (list, tuple)) or len(codes) != count:
        raise DataError(f"expected {count} codes from 0 to 1023, not {codes!r:.80}")
    if not all(type(code) is int and 0 <= code < NUM_CODES for code in codes):
        raise DataError(f"expected {count} codes, whole numbers from 0 to 1023, not {codes!r:.80}")
    return [_CODE_WORDS[code] for code in codes]


def _number_words(count: int, low: float, high: float) -> Callable[[Sequence[float]], list[str]]:
    """Return a function that converts ``count`` values in [low, high] to words of the numbers 0 to 999."""

    def words(values: Sequence[float]) -> list[str]:
        are_numbers = isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)
        if not are_numbers or len(values) != count:
            raise DataError(f"expected {count} numbers, not {values!r:.80}")
        if not all(map(math.isfinite, values)):
            raise UnreadableValue(f"expected finite numbers, not {values}")
        return [f"v0={round(999 * (min(max(value, low), high) - low) / (high - low))}" for value in values]

    return words


def person_box(person: Any) -> Box:
    """Return the checked box of a person."""
    if not isinstance(person, MAPPINGS) or "box" not in person:
        raise DataError(f"expected a person with a 'box', not {person!r:.80}")
    box = person["box"]
    if isinstance(box, (list, tuple)) and any(isinstance(c, float) and not math.isfinite(c) for c in box):
        raise UnreadableValue(f"expected finite numbers, not {box!r:.80}")
    return checked_box(box, margin=1.0)  # people may extend beyond a stored crop


PARTS: dict[str, Callable[[Sequence], list[str]]] = {
    "pose": lambda codes: code_words(codes, POSE_CODES),
    "global": _number_words(9, -1, 1),
    "shape": _number_words(10, -3, 3),
    "camera": _number_words(3, -1, 19),
}
"""Descriptions of a person besides the box: the codes of the pose, the rotation, the shape, and the camera."""


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
        """Return the people in the crop with their boxes relative to it.

        Raises:
            DataError: People of the whole image would have to be flipped, which is impossible for pose codes.
        """
        if self.stored_crops(value) is not None:
            return [(person, person_box(person)) for person in stored_crop_entry(value, rand_aug_idx)]
        kept = people_in_crop(value, crop_coords, flip, orig_size)
        if flip and kept:
            raise DataError(
                "a pose cannot be mirrored; store one list of people per stored crop in the file, or set hflip to 0"
            )
        return kept

    def choose(self, value: list[tuple[Mapping[str, Any], Box]], generator: np.random.Generator) -> list[str]:
        words: list[str] = []
        for person, box in value:
            words += ["human", *box_words(box)]
            parts = [name for name in PARTS if person.get(name) is not None]
            for index in generator.permutation(len(parts)):
                name = parts[index]
                words += [name, *PARTS[name](person[name])]
        return words or ["none"]

    def is_missing(self, value: Any) -> bool:
        """Return whether the value is null; an empty list is a value."""
        return value is None

    def postprocess(self, value: list[str]) -> str:
        if not value or not isinstance(value[0], str):  # the caller skipped ``choose``
            value = self.choose(value, np.random.default_rng())  # type: ignore[arg-type]
        return " ".join(value)


def people_in_crop(
    people: Sequence[Any], crop_coords: CropCoords | None, flip: bool, orig_size: tuple[int, int] | None
) -> list[tuple[Mapping[str, Any], Box]]:
    """Return the people of a whole picture who are in a crop, with their boxes relative to it."""
    boxes = [crop_box(person_box(person), crop_coords, flip, orig_size) for person in people]
    return [(person, box) for person, box in zip(people, boxes, strict=True) if box]


# Crop sides by which a polygon may extend beyond its crop, because the smallest crops have such large images.
_MAX_OVERHANG = 5


@dataclass(frozen=True)
class SAMInstanceTransform(AbstractTransform):
    """For random query points: ``point``, row and column, then each polygon around it in random order, or ``none``.

    A file has an entry per stored crop: a list of ``{"points": (n, 2) x and y in pixels, "token_ids": (16,)}``, or one
    dict of two such lists.

    Attributes:
        size: Side length of the crops in pixels.
        num_points: Number of query points that are drawn.
    """

    size: int = 224
    num_points: int = 7

    follows_crop: ClassVar[bool] = True

    def preprocess(self, value: Any) -> Sequence[Any]:
        if not isinstance(value, (np.ndarray, ObjectArray, list)):
            raise DataError(f"expected the instances of each stored crop, not {type(value).__name__}")
        return value  # type: ignore[return-value]  # an array behaves like a sequence

    def stored_crops(self, value: Sequence[Any]) -> int:
        return len(value)

    def image_augment(
        self, value, crop_coords, flip, orig_size, target_size, rand_aug_idx, resample_mode=None
    ) -> Polygons:
        """Return the instances of the stored crop."""
        crop = stored_crop_entry(value, rand_aug_idx)
        crop = crop[()] if isinstance(crop, np.ndarray) and crop.ndim == 0 else crop
        if not isinstance(crop, (list, tuple, dict, np.ndarray)):
            raise DataError(f"expected the instances of a crop, not {type(crop).__name__}")
        if isinstance(crop, dict):
            crop = [dict(zip(crop, row, strict=True)) for row in zip(*crop.values(), strict=True)]
        for instance in crop:
            if not isinstance(instance, MAPPINGS) or "points" not in instance or "token_ids" not in instance:
                raise DataError(f"expected instances with 'points' and 'token_ids', not {instance!r:.80}")
        polygons = Polygons([i["points"] for i in crop], [i["token_ids"] for i in crop])
        polygons.check_unit(self.size)
        return polygons

    def choose(self, value: Polygons, generator: np.random.Generator) -> list[str]:
        points = generator.integers(self.size, size=(self.num_points, 2))
        boxes = (value.boxes.clip(0, self.size) / self.size).tolist()
        codes = value.codes.tolist()
        described: dict[int, list[str]] = {}  # several points may lie in the same polygon
        words: list[str] = []
        for (row, column), inside in zip(points.tolist(), value.enclosing(points[:, ::-1]), strict=True):
            words += ["point", f"v0={row}", f"v1={column}"]
            enclosing = inside.nonzero()[0].tolist()
            for position in generator.permutation(len(enclosing)).tolist():
                index = enclosing[position]
                if index not in described:
                    shape = map(_CODE_WORDS.__getitem__, codes[index])
                    described[index] = ["polygon", *box_words(boxes[index]), *shape]
                words += described[index]
            if not enclosing:
                words.append("none")
        return words

    def postprocess(self, value: list[str] | Polygons) -> str:
        if isinstance(value, Polygons):  # the caller skipped ``choose``
            value = self.choose(value, np.random.default_rng())
        return " ".join(value)


class Polygons:
    """The instances of a crop, whose edges are concatenated so that queries are vectorised over all instances.

    Args:
        outlines: Corners of each instance, x and y, (n, 2).
        codes: 16 codes of each instance.

    Attributes:
        codes: Codes, (instances, 16).
        boxes: Bounding boxes xmin, ymin, xmax, ymax, (instances, 4).

    Raises:
        DataError: Outlines or codes are invalid.
    """

    def __init__(self, outlines: Sequence[Any], codes: Sequence[Any]):
        if any(len(row) != MASK_CODES for row in codes):
            raise DataError(f"expected {MASK_CODES} codes of each polygon, not {sorted({len(row) for row in codes})}")
        array = np.array(codes)
        if array.dtype.kind not in "iu" and array.size:
            raise DataError(f"expected codes that are whole numbers, not {array.dtype}")
        self.codes = array.astype(np.int64).reshape(len(codes), MASK_CODES)
        if self.codes.view(np.uint64).max(initial=0) >= NUM_CODES:  # as unsigned numbers, negative codes are huge
            raise DataError(f"expected codes from 0 to 1023, not from {self.codes.min()} to {self.codes.max()}")
        arrays = [np.asarray(outline) for outline in outlines]
        for array in arrays:
            if array.ndim != 2 or array.shape[1] != 2 or len(array) < 3:
                raise DataError(f"expected a polygon of shape (3 or more, 2), not {array.shape}")
        lengths = [len(array) for array in arrays]
        # The start of each edge, (edges, 2).
        self._corners = np.concatenate([*arrays, np.empty((0, 2))], dtype=float, casting="unsafe")
        if not np.isfinite(self._corners).all():
            raise UnreadableValue("a polygon has corners that are not finite")
        self._owner = np.arange(len(arrays)).repeat(lengths)
        ends = np.cumsum(lengths, dtype=np.intp)
        starts = ends - lengths
        following = np.arange(1, len(self._corners) + 1)
        following[ends - 1] = starts
        self._ends = self._corners[following]
        limits = [reduce.reduceat(self._corners, starts) for reduce in (np.minimum, np.maximum) if lengths]
        self.boxes = np.concatenate(limits, axis=1) if lengths else np.empty((0, 4))

    def check_unit(self, size: int) -> None:
        """Check that corners are in pixels of a crop with side ``size``; polygons may extend beyond their crop.

        Raises:
            DataError: The corners cannot be in these units.
        """
        low, high = self._corners.min(initial=0), self._corners.max(initial=0)
        if low < -_MAX_OVERHANG * size or high > (1 + _MAX_OVERHANG) * size:
            raise DataError(f"polygons from {low:g} to {high:g} lie far outside their crop of {size}x{size} pixels")
        if high <= 1 and low >= 0 and (self._corners % 1).any():
            raise DataError(f"all polygons of a crop lie in [0, 1]: expected pixels of a crop of {size}x{size}")

    def enclosing(self, points: np.ndarray) -> np.ndarray:
        """Test which polygons contain which points: a ray from inside crosses the outline an odd number of times.

        Args:
            points: x and y of the points, (p, 2).

        Returns:
            Whether each polygon contains each point, (p, instances) bool.
        """
        x, y = points[:, 0], points[:, 1, None]
        point, edge = ((self._corners[:, 1] > y) != (self._ends[:, 1] > y)).nonzero()
        (x0, y0), (x1, y1) = self._corners[edge].T, self._ends[edge].T
        at = x0 + (y[point, 0] - y0) / (y1 - y0) * (x1 - x0)
        count = len(self.boxes)
        crossed = (point * count + self._owner[edge])[at > x[point]]
        return np.bincount(crossed, minlength=len(points) * count).reshape(len(points), count) % 2 == 1
