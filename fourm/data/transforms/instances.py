"""People and segmented instances as text; their shapes are codes of a tokenizer.

Codes below 512 become the words ``v0=0`` … ``v0=511``, and the others ``v1=0``, ….
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from fourm.data.object_arrays import ObjectArray
from fourm.data.transforms.base import MAPPINGS, AbstractTransform, CropCoords
from fourm.data.transforms.sequence import Box, box_words, checked_box, crop_box, stored_crop_entry
from fourm.utils.errors import DataError, UnreadableValue

NUM_CODES = 1024
"""The codes of poses and masks are below this number."""
_CODE_WORDS = [f"v{code // 512}={code % 512}" for code in range(NUM_CODES)]
_POSE_CODES, _MASK_CODES = 8, 16

Described: TypeAlias = tuple[dict[str, Any], np.ndarray]
"""The description of an object without its codes, and the input (C, H, W) of the tokenizer that computes them."""


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


@dataclass(frozen=True)
class ObjectTransform(AbstractTransform):
    """Objects of a picture, such as people, each of which a tokenizer describes by a few codes.

    The training of such a tokenizer sees one random object of a file. :meth:`objects` returns all of them, in the form
    that the 4M modality reads, which lacks only the codes.

    Attributes:
        codes_key: The key of the codes in the description of an object.
        num_codes: The number of codes of an object, which are below :data:`NUM_CODES`.
    """

    codes_key: ClassVar[str]
    num_codes: ClassVar[int]

    def for_sizes(self, input_size: int, crop_size: int) -> ObjectTransform:
        """Return the transform for a tokenizer whose inputs have this side, and for crops of this side, in pixels."""
        return self

    def crops_in_file(self, value: Any) -> int | None:
        """Return the number of stored crops that a file describes, or None if it describes the whole picture."""
        return None

    @abstractmethod
    def objects(self, value: Any, crops: np.ndarray, orig_size: tuple[int, int]) -> list[list[Described]]:
        """Return the objects in each crop.

        Args:
            value: The value of the file.
            crops: (K, 5): top, left, height, width and flip of each crop.
            orig_size: (height, width) of the picture that the crops refer to.

        Raises:
            DataError: The file has another content.
        """


def _person_box(person: Any) -> Box:
    """Return the checked box of a person."""
    if not isinstance(person, MAPPINGS) or "box" not in person:
        raise DataError(f"expected a person with a 'box', not {person!r:.80}")
    box = person["box"]
    if isinstance(box, (list, tuple)) and any(isinstance(c, float) and not math.isfinite(c) for c in box):
        raise UnreadableValue(f"expected finite numbers, not {box!r:.80}")
    return checked_box(box, margin=1.0)  # people may extend beyond a stored crop


PARTS: dict[str, Callable[[Sequence], list[str]]] = {
    "pose": lambda codes: code_words(codes, _POSE_CODES),
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
            return [(person, _person_box(person)) for person in stored_crop_entry(value, rand_aug_idx)]
        kept = _people_in_crop(value, crop_coords, flip, orig_size)
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


def _people_in_crop(
    people: Sequence[Any], crop_coords: CropCoords | None, flip: bool, orig_size: tuple[int, int] | None
) -> list[tuple[Mapping[str, Any], Box]]:
    """Return the people of a whole picture who are in a crop, with their boxes relative to it."""
    boxes = [crop_box(_person_box(person), crop_coords, flip, orig_size) for person in people]
    return [(person, box) for person, box in zip(people, boxes, strict=True) if box]


_OPPOSITE_JOINTS = [1, 0, 2, 4, 3, 5, 7, 6, 8, 10, 9, 11, 13, 12, 14, 16, 15, 18, 17, 20, 19, 22, 21]
"""The joint on the other side of the body of each of the 23 joints of SMPL."""
_MIRROR = np.array([[1, -1, -1], [-1, 1, 1], [-1, 1, 1]], np.float32)
"""The factors that turn a rotation R into M R M, where M mirrors the x axis."""


@dataclass(frozen=True)
class BodyPoseTransform(ObjectTransform):
    """The rotations of the 23 joints of one random person: float32 (207, 1, 1); zeros where there is nobody.

    A file holds people as for ``human_poses``, with ``rotations`` in place of the codes of their ``pose``: 207 numbers,
    (23, 3, 3) or flat. Training also reads an array of such numbers, for each person or of one person.
    """

    codes_key: ClassVar[str] = "pose"
    num_codes: ClassVar[int] = _POSE_CODES

    def preprocess(self, value: Any) -> np.ndarray:
        people = value if self.crops_in_file(value) is None else [person for in_crop in value for person in in_crop]
        if isinstance(people, list) and people and all(isinstance(person, MAPPINGS) for person in people):
            value = [self._rotations(person).ravel() for person in people]
        return self._checked(value)

    @staticmethod
    def _checked(value: Any) -> np.ndarray:
        """Return rotations as (P, 207, 1, 1) float32."""
        people = np.asarray(value)
        if people.dtype.kind not in "iuf" or people.size % 207:
            raise DataError(f"expected rotations of 23 joints, 207 numbers, not {people.dtype} {people.shape}")
        if not np.isfinite(people).all():
            raise UnreadableValue("it holds values that are not finite")
        return people.astype(np.float32).reshape(-1, 207, 1, 1)

    def _rotations(self, person: Mapping[str, Any]) -> np.ndarray:
        """Return the rotations of a person, (207, 1, 1)."""
        if not isinstance(person, MAPPINGS) or "rotations" not in person:
            raise DataError(f"expected a person with 'rotations', not {person!r:.80}")
        rotations = self._checked(person["rotations"])
        if len(rotations) != 1:
            raise DataError(f"expected one person's 'rotations', 207 numbers, not {rotations.size}")
        return rotations[0]

    def crops_in_file(self, value: Any) -> int | None:
        lists = isinstance(value, list) and bool(value) and all(isinstance(people, list) for people in value)
        return len(value) if lists and all(isinstance(p, MAPPINGS) for people in value for p in people) else None

    def objects(self, value: Any, crops: np.ndarray, orig_size: tuple[int, int]) -> list[list[Described]]:
        """Return the people in each crop. Those of a whole picture are mirrored in a flipped crop.

        A mirrored person has no ``camera``, because files follow different conventions for its numbers.
        """
        if not isinstance(value, list):
            raise DataError(
                "expected a list of people with 'box' and 'rotations': an array does not tell where they are"
            )
        people = HumanPoseTransform().preprocess(value)
        if self.crops_in_file(people) is not None:
            return [[self._described(person, _person_box(person)) for person in in_crop] for in_crop in people]
        return [
            [
                self._described(_mirrored(person) if flip else person, box)
                for person, box in _people_in_crop(people, tuple(crop), bool(flip), orig_size)
            ]
            for *crop, flip in crops.tolist()
        ]

    def _described(self, person: Mapping[str, Any], box: Box) -> Described:
        described = {name: value for name, value in person.items() if name != "rotations"}
        return {**described, "box": list(box)}, self._rotations(person)

    def choose(self, value: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return value[generator.integers(len(value))] if len(value) else np.zeros((207, 1, 1), np.float32)

    def is_missing(self, value: Any) -> bool:
        """Only null is missing: an empty list says that there is nobody."""
        return value is None


def _mirrored(person: Mapping[str, Any]) -> dict[str, Any]:
    """Return a person as a mirror shows them."""
    mirrored = {name: value for name, value in person.items() if name != "camera"}
    for name, count in (("rotations", 23), ("global", 1)):
        if mirrored.get(name) is not None:
            matrices = np.asarray(mirrored[name], np.float32)
            if matrices.size != 9 * count:
                raise DataError(f"expected {9 * count} numbers of a person's '{name}', not {matrices.size}")
            matrices = matrices.reshape(count, 3, 3) * _MIRROR
            mirrored[name] = (matrices[_OPPOSITE_JOINTS] if count > 1 else matrices).ravel().tolist()
    return mirrored


@dataclass(frozen=True)
class InstanceMaskTransform(ObjectTransform):
    """One random instance, drawn into its bounding box: float32 (1, size, size), 1 inside and 0 outside.

    A file holds a list of outlines: ``[[x, y], ...]``, or ``{"points": [[x, y], ...]}``. It may also tell how large the
    image is: ``{"image": {"width": 640, "height": 480}, "annotations": [...]}``. Instances that are too small are then
    ignored.

    Attributes:
        size: Side of the mask in pixels.
        min_share: The smallest share of the image, or of a crop, that the bounding box of an instance covers.
        crop_size: Side of a crop, in whose pixels :meth:`objects` gives outlines.
    """

    size: int = 64
    min_share: float = 0.0005
    crop_size: int = 224

    codes_key: ClassVar[str] = "token_ids"
    num_codes: ClassVar[int] = _MASK_CODES

    def preprocess(self, value: Any) -> list[np.ndarray]:
        """Return the outlines whose box is large enough, and not empty."""
        outlines, image = _outlines(value)
        min_area = self.min_share * image[0] * image[1] if image else 0.0
        kept = [
            outline
            for outline in outlines
            if np.isfinite(outline).all()
            and (box := np.ptp(outline, axis=0).astype(float)).all()
            and box.prod() >= min_area
        ]
        if not kept:
            least = f" of at least {self.min_share:.2%} of the image" if min_area else " that is not empty"
            raise UnreadableValue(f"it has no instance with a box{least}")
        return kept

    def choose(self, value: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
        return value[generator.integers(len(value))]

    def postprocess(self, value: np.ndarray) -> np.ndarray:
        return self._drawn(value, value.min(axis=0), value.max(axis=0))

    def _drawn(self, outline: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Draw an outline (n, 2) into the box from ``low`` to ``high``, (1, size, size)."""
        mask = Image.new("L", (self.size, self.size))
        corners = (outline - low) / (high - low) * self.size
        ImageDraw.Draw(mask).polygon([(x, y) for x, y in corners.tolist()], fill=1)
        return np.asarray(mask, np.float32)[None]

    def for_sizes(self, input_size: int, crop_size: int) -> InstanceMaskTransform:
        return replace(self, size=input_size, crop_size=crop_size)

    def objects(self, value: Any, crops: np.ndarray, orig_size: tuple[int, int]) -> list[list[Described]]:
        """Return the instances in each crop. A mask fills the part of the bounding box that lies in the crop."""
        outlines, image = _outlines(value)
        scale = np.divide(orig_size, image or orig_size)[::-1]
        outlines = [outline * scale for outline in outlines if np.isfinite(outline).all()]
        return [[*self._in_crop(outlines, *crop)] for crop in crops.tolist()]

    def _in_crop(
        self, outlines: list[np.ndarray], top: int, left: int, height: int, width: int, flip: int
    ) -> Iterator[Described]:
        for outline in outlines:
            points = (outline - (left, top)) * (self.crop_size / width, self.crop_size / height)
            if flip:
                points[:, 0] = self.crop_size - points[:, 0]
            low, high = (corner.clip(0, self.crop_size) for corner in (points.min(axis=0), points.max(axis=0)))
            if (high - low).prod() > 0 and (high - low).prod() >= self.min_share * self.crop_size**2:
                mask = self._drawn(points, low, high)
                if mask.any():  # otherwise only its box reaches into the crop
                    yield {"points": points.round(2)}, mask

    def bind(self, modality: Mapping[str, Any]) -> InstanceMaskTransform:
        return replace(self, size=modality["input_size"])


def _outlines(value: Any) -> tuple[list[np.ndarray], tuple[float, float] | None]:
    """Return the outlines (n, 2) in a file of instances, and (height, width) of their image if the file has them."""
    image = None
    if isinstance(value, MAPPINGS):
        image, value = _image_size(value), value.get("annotations")
    if not isinstance(value, (list, tuple)):
        raise DataError(f"expected a list of outlines, not {value!r:.80}")
    outlines = [np.asarray(item["points"] if isinstance(item, MAPPINGS) else item, np.float32) for item in value]
    for outline in outlines:
        if outline.ndim != 2 or outline.shape[1] != 2 or len(outline) < 3:
            raise DataError(f"expected an outline of shape (3 or more, 2), not {outline.shape}")
    return outlines, image


def _image_size(value: Mapping[str, Any]) -> tuple[float, float]:
    """Return (height, width) of the image that a file of instances describes."""
    image = value.get("image")
    sides: list[Any] = [image.get(side) for side in ("height", "width")] if isinstance(image, MAPPINGS) else []
    if not sides or not all(isinstance(side, (int, float)) and 0 < side < 10**9 for side in sides):
        raise DataError(f"expected the width and height of the image under 'image', not {image!r:.80}")
    return sides[0], sides[1]


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
        if any(len(row) != _MASK_CODES for row in codes):
            raise DataError(f"expected {_MASK_CODES} codes of each polygon, not {sorted({len(row) for row in codes})}")
        array = np.array(codes)
        if array.dtype.kind not in "iu" and array.size:
            raise DataError(f"expected codes that are whole numbers, not {array.dtype}")
        self.codes = array.astype(np.int64).reshape(len(codes), _MASK_CODES)
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
