"""One crop, one flip and one target size for all modalities of a sample."""

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
    """What the modalities of a sample share.

    Attributes:
        crop_coords: (top, left, height, width) in the main modality's image; None = everything.
        flip: mirror left and right, after the crop.
        orig_size: (height, width) of the main modality's image; None if there is none.
        target_size: (height, width) after resizing, where a modality's name gives no other; None = the crop's.
        rand_aug_idx: index of the stored crop; None if crops were not stored.
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
    """For samples without images: nothing is cropped."""

    def __call__(self, mod_dict, crop_settings=None, generator=None) -> Augmentation:
        return Augmentation()


class _ImageAugmenter(AbstractImageAugmenter):
    """What the three below share.

    Attributes:
        target_size: pixels, one number for squares or (height, width).
        main_domain: modality whose image gives the original size.
    """

    target_size: int | tuple[int, int]
    main_domain: str

    @property
    def target(self) -> tuple[int, int]:
        return (self.target_size, self.target_size) if isinstance(self.target_size, int) else self.target_size

    def orig_size(self, mod_dict: Mapping[str, Any]) -> tuple[int, int] | None:
        """(height, width) of the main modality's image, if the sample has it as an image."""
        image = mod_dict.get(self.main_domain, mod_dict.get(self.main_domain.split("@")[0]))
        return None if image is None else image_size(image)

    def required_size(self, mod_dict: Mapping[str, Any]) -> tuple[int, int]:
        size = self.orig_size(mod_dict)
        if size is None:
            raise DataError(
                f"main_augment_domain '{self.main_domain}' is no image of this sample ({', '.join(mod_dict)})"
            )
        return size


@dataclass(frozen=True)
class CenterCropImageAugmenter(_ImageAugmenter):
    """The largest centred crop of the target's shape; flipped with probability ``hflip``."""

    target_size: int | tuple[int, int]
    hflip: float = 0.0
    main_domain: str = "rgb"

    def __call__(self, mod_dict, crop_settings=None, generator=None) -> Augmentation:
        size = self.required_size(mod_dict)
        flip = bool(self.hflip) and _generator(generator).random() < self.hflip
        return Augmentation(center_crop(size, self.target[1] / self.target[0]), flip, size, self.target)


@dataclass(frozen=True)
class RandomCropImageAugmenter(_ImageAugmenter):
    """A crop of random area and aspect ratio; flipped with probability ``hflip``.

    Attributes:
        crop_scale: range of the crop's share of the image's area.
        crop_ratio: range of width / height, drawn uniformly in its logarithm.
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
    """One of the crops for which tokens were computed; with ``no_aug`` always the first, the centre crop.

    Where nothing needs to know where they lie, the number of crops may stand for ``crop_settings``.
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
            found = "none" if crop_settings is None else f"an array of shape {settings.shape}"
            raise DataError(
                f"tokens need crop_settings of shape (crops, 5): top, left, height, width, flip; found {found}"
            )
        index = 0 if self.no_aug else int(_generator(generator).integers(len(settings)))
        top, left, height, width, flip = settings[index].tolist()
        crop = (int(top), int(left), int(height), int(width))
        return Augmentation(crop, bool(flip), self.orig_size(mod_dict), self.target, index)


def center_crop(size: tuple[int, int], ratio: float = 1.0) -> CropCoords:
    """The largest crop of width / height ``ratio`` in the middle of an image of ``size`` (height, width)."""
    height, width = size
    h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> CropCoords:
    """Draw area and ratio until the crop fits into ``size`` (height, width), ten times at most; then the centre."""
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
