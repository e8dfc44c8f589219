"""Modalities that become text: captions, boxes, metadata and colour palettes.

Numbers are single words of the vocabulary: ``v0=17`` is the number 17 in role 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from fourm.data.transforms.base import MAPPINGS, AbstractTransform, CropCoords
from fourm.utils.errors import DataError, UnreadableValue, did_you_mean

T = TypeVar("T")
Box = tuple[float, float, float, float]
"""xmin, ymin, xmax, ymax in [0, 1]."""


def stored_crop_entry(values: Sequence[T], index: int | None) -> T:
    """Return the entry of the chosen stored crop.

    Raises:
        DataError: No stored crop was chosen, or there is no entry for it.
    """
    if index is None:
        raise DataError("its values belong to stored crops, but no stored crop was chosen (crop_settings is required)")
    if index >= len(values):
        raise DataError(f"stored crop {index} was chosen, but there are values of only {len(values)} crops")
    return values[index]


_TOLERANCE = 0.02  # tolerated rounding error of coordinates
_NUMBER_TYPES = frozenset({float, int})
_CAPTION_KEYS = ("caption", "text", "captions")  # possible keys of a caption


def checked_box(box: Any, margin: float = _TOLERANCE) -> Box:
    """Check a box of four numbers, and clip it to [0, 1].

    Args:
        box: xmin, ymin, xmax, ymax.
        margin: Maximum distance by which it may extend beyond [0, 1].

    Raises:
        DataError: The box follows another convention; the message names the one that is suspected.
    """
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not _NUMBER_TYPES.issuperset(map(type, box)):
        raise DataError(f"expected a box of four numbers xmin, ymin, xmax, ymax, not {box!r:.80}")
    xmin, ymin, xmax, ymax = box
    if 0 <= xmin <= xmax <= 1 and 0 <= ymin <= ymax <= 1:  # the common case
        return xmin, ymin, xmax, ymax
    low, high = -margin, 1 + margin
    if not (low <= min(box) and max(box) <= high and all(map(math.isfinite, box))):
        reason = "are they in pixels?" if all(map(math.isfinite, box)) else "they are not finite"
        raise DataError(f"expected a box of xmin, ymin, xmax, ymax in [0, 1], not {list(box)}: {reason}")
    if xmin > xmax + _TOLERANCE or ymin > ymax + _TOLERANCE:
        raise DataError(f"a box's maximum is below its minimum, {list(box)}: is it x, y, width, height?")
    if min(box) < 0 or max(box) > 1:
        xmin, ymin, xmax, ymax = (min(max(c, 0.0), 1.0) for c in box)
    return xmin, ymin, xmax, ymax


def crop_box(
    box: Sequence[float], crop_coords: CropCoords | None, flip: bool, orig_size: tuple[int, int] | None
) -> Box | None:
    """Return a box relative to the crop, clipped to it and flipped; None if no area is left.

    Raises:
        DataError: The image's size is unknown.
    """
    left, top, width, height = 0.0, 0.0, 1.0, 1.0
    if crop_coords is not None:
        if orig_size is None:
            raise DataError("boxes can follow a crop only if the image's size is known; set main_augment_domain")
        top, height = crop_coords[0] / orig_size[0], crop_coords[2] / orig_size[0]
        left, width = crop_coords[1] / orig_size[1], crop_coords[3] / orig_size[1]
    xmin, ymin, xmax, ymax = box
    xmin, xmax = max((xmin - left) / width, 0.0), min((xmax - left) / width, 1.0)
    ymin, ymax = max((ymin - top) / height, 0.0), min((ymax - top) / height, 1.0)
    if not (xmin < xmax and ymin < ymax):
        return None
    return (1 - xmax, ymin, 1 - xmin, ymax) if flip else (xmin, ymin, xmax, ymax)


def box_words(box: Sequence[float], coord_bins: int = 1000) -> list[str]:
    """Return the words ``v0=X v1=Y v2=X v3=Y`` of a box."""
    return [f"v{i}={round(c * (coord_bins - 1))}" for i, c in enumerate(box)]


@dataclass(frozen=True)
class CaptionTransform(AbstractTransform):
    """A caption, or one of several.

    Attributes:
        aligned_captions: Whether a list holds one caption per stored crop, so that the crop decides which one is used;
            if False, one is drawn at random.
    """

    aligned_captions: bool = True

    def preprocess(self, value: Any) -> list[Any]:
        """Convert a string, ``{"caption": …}`` (or ``text``) or a list of either to a list; blank ones become None."""
        captions = [None if _is_null(caption) else caption for caption in _captions(value)]
        present = [caption for caption in captions if caption is not None]
        if not present or not all(isinstance(caption, str) for caption in present):
            raise DataError(f"expected a caption or a list of them, not {value!r:.80}")
        return captions if len(present) > 1 else present

    def is_missing(self, value: Any) -> bool:
        if isinstance(value, str):
            return super().is_missing(value)
        if isinstance(value, (list, tuple, *MAPPINGS)) and any(
            isinstance(c, MAPPINGS) for c in (value, *value) if not isinstance(c, str)
        ):
            try:
                return all(map(_is_null, _captions(value)))
            except UnreadableValue:
                return not value
        return all(map(_is_null, value)) if isinstance(value, (list, tuple)) else _is_null(value)

    def stored_crops(self, value: list[str]) -> int | None:
        return len(value) if self.aligned_captions and len(value) > 1 else None

    def image_augment(
        self, value, crop_coords, flip, orig_size, target_size, rand_aug_idx, resample_mode=None
    ) -> list[str]:
        """Return the caption of stored crop ``rand_aug_idx`` if there is one per crop, and all captions otherwise."""
        if rand_aug_idx is None or self.stored_crops(value) is None:
            return [caption for caption in value if caption is not None]
        chosen = stored_crop_entry(value, rand_aug_idx)
        return [caption for caption in value if caption is not None] if chosen is None else [chosen]

    def choose(self, value: list[str], generator: np.random.Generator) -> list[str]:
        return [value[generator.integers(len(value))]] if len(value) > 1 else value

    def postprocess(self, value: list[str]) -> str:
        if len(value) > 1:  # the caller skipped ``choose``
            value = self.choose([caption for caption in value if caption is not None], np.random.default_rng())
        return value[0]


def _is_null(caption: Any) -> bool:
    """Return whether a caption is null, blank, or NaN, which tables use for null."""
    return caption is None or caption != caption or (isinstance(caption, str) and not caption.strip())


def _captions(value: Any) -> list[Any]:
    """Return the captions in a file as a list.

    Raises:
        UnreadableValue: A mapping has none of the known keys.
    """
    if isinstance(value, MAPPINGS):
        key = next(
            (key for key in _CAPTION_KEYS if value.get(key) is not None),
            next((k for k in _CAPTION_KEYS if k in value), None),
        )
        if key is None:
            keys = ", ".join(map(str, value)) or "none"
            raise UnreadableValue(f"no key {' or '.join(_CAPTION_KEYS)} (there are {keys:.200})")
        value = value[key]
    if isinstance(value, (list, tuple)):
        return [
            text
            for item in value
            for text in ([item] if isinstance(item, str) or not isinstance(item, MAPPINGS) else _captions(item))
        ]
    return [value]


@dataclass(frozen=True)
class DetectionTransform(AbstractTransform):
    """Boxes as ``v0=X v1=Y v2=X v3=Y class``, ordered by the distance of their corner to the top left of the image.

    Attributes:
        det_threshold: Minimum score of a box; others are dropped.
        coord_bins: Number of bins for a coordinate in [0, 1].
    """

    det_threshold: float = 0.6
    coord_bins: int = 1000

    follows_crop: ClassVar[bool] = True

    def preprocess(self, value: Mapping[str, Any]) -> list[tuple[str, Box]]:
        if isinstance(value, MAPPINGS) and "annotations" in value and "instances" not in value:
            raise DataError('this is COCO\'s annotation file; expected a file per image with {"instances": …}')
        if isinstance(value, MAPPINGS) and "instances" not in value:
            raise UnreadableValue(f"no key instances (there are {', '.join(map(str, value)):.200})")
        if not isinstance(value, MAPPINGS) or not isinstance(value["instances"], list):
            raise DataError(f'expected {{"instances": […]}}, not {value!r:.80}')
        instances = [_parse_instance(instance) for instance in value["instances"] if instance is not None]
        return [(name, box) for name, box, score in instances if score >= self.det_threshold]

    def is_missing(self, value: Any) -> bool:
        """Return whether the value or its instances are null; an empty list of instances is a value."""
        return super().is_missing(value) or (isinstance(value, MAPPINGS) and value.get("instances", "") is None)

    def image_augment(
        self, value, crop_coords, flip, orig_size, target_size, rand_aug_idx, resample_mode=None
    ) -> list[tuple[str, Box]]:
        """Return the boxes relative to the crop and clipped to it; boxes outside are dropped."""
        boxes = [(name, crop_box(box, crop_coords, flip, orig_size)) for name, box in value]
        return [(name, box) for name, box in boxes if box]

    def postprocess(self, value: list[tuple[str, Box]]) -> str:
        words = []
        for name, box in sorted(value, key=lambda item: item[1][0] ** 2 + item[1][1] ** 2):
            words += [*box_words(box, self.coord_bins), name]
        return " ".join(words)


def _parse_instance(instance: Any) -> tuple[str, Box, float]:
    """Return the class name, box and score of an instance.

    Raises:
        DataError: The instance has another format.
    """
    if not isinstance(instance, MAPPINGS):
        raise DataError(f'expected an instance {{"boxes", "class_name", "score"}}, not {instance!r:.80}')
    for key in ("boxes", "class_name"):
        if key not in instance:
            hint = "; COCO's annotations have x, y, width, height in pixels" if "bbox" in instance else ""
            raise DataError(f"an instance has no '{key}' (there are {', '.join(map(str, instance)):.200}){hint}")
    name, score = instance["class_name"], instance.get("score")
    score = 1.0 if score is None else score
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"'class_name' must be a name, not {name!r:.80}")
    if type(score) not in (float, int) or not math.isfinite(score):
        raise DataError(f"'score' must be a number, not {score!r:.80}")
    return name, checked_box(instance["boxes"]), score


class Scale(NamedTuple):
    """Functions that encode a value as a number of the vocabulary, and decode the number to a representative value."""

    encode: Callable[[float], int]
    decode: Callable[[int], float]


def _bins(low: float, high: float) -> Scale:
    width = (high - low) / 49
    return Scale(
        lambda value: min(max(int(49 * (value - low) / (high - low)), 0), 49),
        lambda number: min(low + width * (number + 0.5), high),
    )


def _count(value: float) -> int:
    return min(max(int(value), 0), 999)


_COUNT = Scale(_count, lambda number: number)
_SIDE = Scale(lambda value: _count(value // 32), lambda number: 32 * number)

# The order defines the numbers of the keys.
METADATA = {
    "original_width": _SIDE,
    "original_height": _SIDE,
    "caption_n_chars": _COUNT,
    "caption_n_words": _COUNT,
    "caption_n_sentences": _COUNT,
    "n_humans": _COUNT,
    "n_sam_instances": _COUNT,
    "n_coco_instances": _COUNT,
    "coco_instance_diversity": _COUNT,
    "colorfulness": _bins(0, 150),
    "brightness": _bins(0, 255),
    "contrast": _bins(0, 127),
    "saturation": _bins(0, 255),
    "entropy": _bins(0, 10),
    "walkability": _bins(0, 1),
    "objectness": _bins(0, 1),
    "semantic_diversity": _COUNT,
    "geometric_complexity": _bins(0, 0.75),
    "occlusion_score": _bins(0, 0.25),
    "watermark_score": Scale(lambda value: int(value >= 0.5), lambda number: 0.25 + 0.5 * number),
    "aesthetic_score": Scale(lambda value: int(value >= 4.5) + int(value >= 5.5), lambda number: 4.0 + number),
}
_METADATA_INDEX = {key: index for index, key in enumerate(METADATA)}


@dataclass(frozen=True)
class MetadataTransform(AbstractTransform):
    """A list of chunks ``v1=KEY v0=VALUE`` in random order; masking keeps or drops a chunk as a whole.

    Attributes:
        shuffle: Whether to shuffle the chunks; False keeps the order of the file.
        random_trunc: Whether to drop a random number of chunks, but not all, at the end.
        return_chunks: Whether to return a list of chunks; False joins them into one string.
    """

    shuffle: bool = True
    random_trunc: bool = False
    return_chunks: bool = True

    def metadata_to_string(self, metadata: Mapping[str, float]) -> str | list[str]:
        """Apply all steps to a sample's metadata, for use without a data loader."""
        return self.postprocess(self.choose(self.preprocess(metadata), np.random.default_rng()))

    def postprocess(self, value: list[str]) -> str | list[str]:
        return value if self.return_chunks else " ".join(value)

    def preprocess(self, value: Mapping[str, float]) -> list[str]:
        chunks = []
        if not isinstance(value, MAPPINGS):
            raise DataError(f"expected a mapping of metadata, not {value!r:.80}")
        for key, number in value.items():
            if number is None:
                continue
            if key not in METADATA:
                raise DataError(f"unknown metadata key '{key}'{did_you_mean(key, METADATA)}")
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise DataError(f"metadata '{key}' must be a number, not {number!r}")
            if not math.isfinite(number):
                raise UnreadableValue(f"metadata '{key}' is not finite")
            chunks.append(f"v1={_METADATA_INDEX[key]} v0={METADATA[key].encode(number)}")
        return chunks

    def is_missing(self, value: Any) -> bool:
        return super().is_missing(value) or (isinstance(value, MAPPINGS) and all(v is None for v in value.values()))

    def choose(self, value: list[str], generator: np.random.Generator) -> list[str]:
        value = [value[i] for i in generator.permutation(len(value))] if self.shuffle else value
        return value[: generator.integers(1, len(value) + 1)] if self.random_trunc and value else value


def _is_color(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    return all(type(channel) is int and 0 <= channel < 256 for channel in value)


@dataclass(frozen=True)
class ColorPaletteTransform(AbstractTransform):
    """``v1=n``, then ``v0=c`` for each channel value of the n colours; n is drawn from 1 to 7."""

    max_colors: int = 7

    def preprocess(self, value: Any) -> Mapping[str, list[list[int]]]:
        palettes = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
        if not isinstance(palettes, MAPPINGS):
            raise DataError(f'expected palettes {{"1": [[r, g, b]], …}}, not {value!r:.80}')
        for count in map(str, range(1, self.max_colors + 1)):
            colors = palettes.get(count)
            if not isinstance(colors, list) or len(colors) != int(count):
                raise DataError(f"expected {count} colours under '{count}', not {colors!r:.80}")
            for color in colors:
                if not _is_color(color):
                    raise DataError(f"expected a colour of three whole numbers from 0 to 255, not {color!r:.80}")
        return palettes

    def choose(self, value: Mapping[str, list[list[int]]], generator: np.random.Generator) -> list[list[int]]:
        return value[str(generator.integers(1, self.max_colors + 1))]

    def postprocess(self, value: list[list[int]] | Mapping[str, list[list[int]]]) -> str:
        if isinstance(value, MAPPINGS):  # the caller skipped ``choose``
            value = self.choose(value, np.random.default_rng())
        return " ".join([f"v1={len(value)}", *(f"v0={channel}" for color in value for channel in color)])
