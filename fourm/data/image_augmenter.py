"""Draw the crop, flip and target size that all modalities of a sample share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fourm.data.transforms.base import CropCoords
from fourm.data.transforms.image import image_size
from fourm.utils.errors import DataError


class Augmentation(NamedTuple):
    """The augmentation that the modalities of a sample share.

    Attributes:
        crop_coords: (top, left, height, width) in the main modality's image; None = the whole image.
        flip: Whether to flip horizontally after the crop.
        orig_size: (height, width) of the main modality's image; None if there is none.
        target_size: (height, width) after resizing, unless a modality's name has its own; None = the crop's size.
        rand_aug_idx: Index of the stored crop; None if crops were not stored.
    """

    crop_coords: CropCoords | None = None
    flip: bool = False
    orig_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    rand_aug_idx: int | None = None


class AbstractImageAugmenter:
    """Draws an :class:`Augmentation` for the preprocessed values of one sample."""

    def __call__(
        self,
        mod_dict: Mapping[str, Any],
        crop_settings: np.ndarray | int | None = None,
        generator: np.random.Generator | None = None,
    ) -> Augmentation:
        raise NotImplementedError


class EmptyAugmenter(AbstractImageAugmenter):
    """The augmenter for samples without images, which crops nothing."""

    def __call__(self, mod_dict, crop_settings=None, generator=None) -> Augmentation:
        return Augmentation()


class _ImageAugmenter(AbstractImageAugmenter):
    """Base class of the augmenters of images.

    Attributes:
        target_size: Size in pixels, one number for squares or (height, width).
        main_domain: Modality whose image defines the original size.
    """

    target_size: int | tuple[int, int]
    main_domain: str

    @property
    def target(self) -> tuple[int, int]:
        return (self.target_size, self.target_size) if isinstance(self.target_size, int) else self.target_size

    def orig_size(self, mod_dict: Mapping[str, Any]) -> tuple[int, int] | None:
        """Return the (height, width) of the main modality's image, or None if the sample has no such image."""
        image = mod_dict.get(self.main_domain, mod_dict.get(self.main_domain.split("@")[0]))
        return None if image is None else image_size(image)

    def required_size(self, mod_dict: Mapping[str, Any]) -> tuple[int, int]:
        size = self.orig_size(mod_dict)
        if size is None:
            raise DataError(
                f"main_augment_domain '{self.main_domain}' is not an image of this sample ({', '.join(mod_dict)})"
            )
        return size


@dataclass(frozen=True)
class CenterCropImageAugmenter(_ImageAugmenter):
    """Takes the largest centred crop with the target's aspect ratio, flipped with probability ``hflip``."""

    target_size: int | tuple[int, int]
    hflip: float = 0.0
    main_domain: str = "rgb"

    def __call__(self, mod_dict, crop_settings=None, generator=None) -> Augmentation:
        size = self.required_size(mod_dict)
        flip = bool(self.hflip) and _generator(generator).random() < self.hflip
        return Augmentation(center_crop(size, self.target[1] / self.target[0]), flip, size, self.target)


@dataclass(frozen=True)
class RandomCropImageAugmenter(_ImageAugmenter):
    """Takes a crop of random area and aspect ratio, flipped with probability ``hflip``.

    Attributes:
        crop_scale: Range of the crop's area relative to the image's area.
        crop_ratio: Range of width / height, whose logarithm is drawn uniformly.
    """

    target_size: int | tuple[int, int]
    hflip: float = 0.5
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    main_domain: str = "rgb"

    def __call__(self, mod_dict, crop_settings=None, generator=None) -> Augmentation:
        generator = _generator(generator)
        size = self.required_size(mod_dict)
        crop = random_crop(size, self.crop_scale, self.crop_ratio, generator)
        return Augmentation(crop, generator.random() < self.hflip, size, self.target)


@dataclass(frozen=True)
class PreTokenizedImageAugmenter(_ImageAugmenter):
    """Takes one of the crops that tokens were computed for; with ``no_aug`` always the first, the centre crop.

    If no modality needs the coordinates of crops, the number of crops may be passed as ``crop_settings``.
    """

    target_size: int | tuple[int, int]
    no_aug: bool = False
    main_domain: str = "rgb"

    def __call__(self, mod_dict, crop_settings=None, generator=None) -> Augmentation:
        if isinstance(crop_settings, int):
            index = 0 if self.no_aug else int(_generator(generator).integers(crop_settings))
            return Augmentation(rand_aug_idx=index)
        settings = np.asarray(crop_settings)
        if crop_settings is None or settings.ndim != 2 or settings.shape[1] != 5 or len(settings) == 0:
            actual = "none" if crop_settings is None else f"an array of shape {settings.shape}"
            raise DataError(
                f"tokens need crop_settings of shape (crops, 5): top, left, height, width, flip; found {actual}"
            )
        index = 0 if self.no_aug else int(_generator(generator).integers(len(settings)))
        top, left, height, width, flip = settings[index].tolist()
        crop = (int(top), int(left), int(height), int(width))
        return Augmentation(crop, bool(flip), self.orig_size(mod_dict), self.target, index)


def center_crop(size: tuple[int, int], ratio: float = 1.0) -> CropCoords:
    """Return the largest centred crop with width / height ``ratio`` of an image of ``size`` (height, width)."""
    height, width = size
    h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> CropCoords:
    """Draw area and ratio until the crop fits into ``size`` (height, width); after ten draws, take the centre crop."""
    height, width = size
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w
    return center_crop(size, min(max(width / height, ratio[0]), ratio[1]))


def _generator(generator: np.random.Generator | None) -> np.random.Generator:
    return generator if generator is not None else np.random.default_rng()
