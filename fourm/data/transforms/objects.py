"""People and segmented instances as the inputs of tokenizers, whose codes are parts of the texts of instances.py."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from fourm.data.transforms.base import MAPPINGS, AbstractTransform
from fourm.data.transforms.instances import MASK_CODES, POSE_CODES, HumanPoseTransform, people_in_crop, person_box
from fourm.data.transforms.sequence import Box
from fourm.utils.errors import DataError, UnreadableValue

Described: TypeAlias = tuple[dict[str, Any], np.ndarray]
"""The description of an object without its codes, and the input (C, H, W) of the tokenizer that computes them."""


@dataclass(frozen=True)
class ObjectTransform(AbstractTransform):
    """Objects of a picture, such as people, each of which a tokenizer describes by a few codes.

    The training of such a tokenizer sees one random object of a file. :meth:`objects` returns all of them, in the form
    that the 4M modality reads, which lacks only the codes.

    Attributes:
        codes_key: The key of the codes in the description of an object.
        num_codes: The number of codes of an object, which are below :data:`fourm.data.transforms.instances.NUM_CODES`.
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
    num_codes: ClassVar[int] = POSE_CODES

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
            return [[self._described(person, person_box(person)) for person in in_crop] for in_crop in people]
        return [
            [
                self._described(_mirrored(person) if flip else person, box)
                for person, box in people_in_crop(people, tuple(crop), bool(flip), orig_size)
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
    num_codes: ClassVar[int] = MASK_CODES

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
