"""Transforms of pixels: colour, grey edges, depth, normals, class ids and masks.

These account for most of the cost of a sample. A JPEG is therefore decoded at half, quarter or eighth scale if the crop
then still has twice the target's resolution, the crop is not copied before it is resized, and pixels stay in 8 bits
until they are normalised.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fourm.data.images import EncodedImage, open_image, pixels_of, upright, upright_size
from fourm.data.transforms.base import AbstractTransform, CropCoords
from fourm.utils.errors import DataError, UnreadableValue, UserError
from fourm.utils.normalization import IMAGENET_MEAN, IMAGENET_STD

_RESAMPLE_MODES = ("nearest", "bilinear", "bicubic")
_GREY = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
_ASPECT_TOLERANCE = 0.02  # log difference of aspect ratios that may result from rounding sides to whole pixels
_TRUNCATED = 0.1  # share of a depth map's values that standardisation ignores at either end

Picture: TypeAlias = bytes | EncodedImage | Image.Image | np.ndarray
"""An encoded image, a PIL image, or an array (H, W) or (H, W, C)."""


def image_size(picture: Picture) -> tuple[int, int]:
    """Return the (height, width) of the upright picture without decoding it."""
    if isinstance(picture, Image.Image):
        return upright_size(picture)
    height, width = (EncodedImage(picture) if isinstance(picture, bytes) else picture).shape[:2]
    return height, width


def cut(
    picture: Picture,
    crop: CropCoords | None,
    orig_size: tuple[int, int] | None = None,
    target_size: tuple[int, int] | None = None,
    mode: str | None = None,
) -> np.ndarray:
    """Decode ``picture`` as coarsely as ``target_size`` allows, and return the crop, which callers must not modify.

    JPEG draft mode drops resolution in the inverse DCT. It is used for encoded images as long as the crop keeps twice
    the target's resolution. The border of the crop, which is rounded to decoded pixels, then moves by at most a quarter
    of a target pixel, and the resize still does the filtering.

    Args:
        picture: The picture.
        crop: (top, left, h, w) in pixels of an image of ``orig_size`` (None: of this picture).
        orig_size: (height, width) of the image that ``crop`` refers to; None = this picture.
        target_size: (height, width) that the crop will be resized to; None = no resizing.
        mode: Pillow mode to convert to; None = as stored.

    Returns:
        The crop, (h, w) or (h, w, C), at the decoded scale.

    Raises:
        DataError: The crop exceeds the picture.
        ValueError: The aspect ratio differs from that of ``orig_size``, so the picture shows something else.
    """
    if isinstance(picture, bytes):
        picture = EncodedImage(picture)
    full = image_size(picture)
    height, width = full if crop is None or orig_size is None else orig_size
    top, left, h, w = (0, 0, height, width) if crop is None else crop
    if top < 0 or left < 0 or h < 1 or w < 1 or top + h > height or left + w > width:
        raise DataError(f"crop (top {top}, left {left}, {h}x{w}) does not lie inside the image of {height}x{width}")
    if not same_frame(full, (height, width)):
        raise ValueError(
            f"a picture of {full[0]}x{full[1]} pixels does not match the sample's image of {height}x{width}: "
            "their aspect ratios differ"
        )
    if isinstance(picture, EncodedImage):
        oversampling = 1.0
        if target_size is not None:
            oversampling = min(h * full[0] / (height * target_size[0]), w * full[1] / (width * target_size[1]))
        # The largest of 1, 2, 4 and 8 that leaves two decoded pixels per target pixel.
        picture = picture.pixels(mode, 1 << (max(int(min(oversampling / 2, 8)), 1).bit_length() - 1))
    elif isinstance(picture, Image.Image):
        picture = pixels_of(picture, mode)
    y, x = picture.shape[0] / height, picture.shape[1] / width
    bottom, right = round((top + h) * y), round((left + w) * x)
    return picture[min(round(top * y), bottom - 1) : bottom, min(round(left * x), right - 1) : right]


def same_frame(size: tuple[int, int], frame: tuple[int, int]) -> bool:
    """Return whether two (height, width) sizes have the same aspect ratio up to rounding."""
    width, height = size[1] * frame[0], size[0] * frame[1]  # cross-multiplied, so they are equal for equal ratios
    # Rounding a side to a whole pixel changes the products by one side of the frame.
    return size == frame or abs(math.log(height / width)) <= _ASPECT_TOLERANCE or abs(height - width) <= max(frame)


def resize(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Return a resized copy of an (H, W) or (H, W, C) array of uint8 or float32; ``nearest`` takes any type.

    The result equals PIL's crop-then-resize, which is antialiased, within two of 255 levels, and is several times
    faster on uint8.
    """
    if image.shape[:2] == tuple(size):
        return image.copy()
    if mode == "nearest":
        rows, columns = (
            ((np.arange(n) + 0.5) * (old / n)).astype(np.intp) for n, old in zip(size, image.shape[:2], strict=True)
        )
        return image[rows[:, None], columns]
    image = image if image.flags.writeable else image.copy()  # PyTorch warns of memory that it must not write to
    channels_first = torch.from_numpy(image).reshape(*image.shape[:2], -1).permute(2, 0, 1)
    resized = F.interpolate(channels_first[None], tuple(size), mode=mode, antialias=True)[0]
    return resized.permute(1, 2, 0).numpy().reshape(*size, *image.shape[2:])


@dataclass(frozen=True)
class ImageTransform(AbstractTransform):
    """Crop, resize and flip an image; subclasses interpret the pixels.

    Attributes:
        size: Side length of the result in pixels; None = the target size of the sample.
    """

    size: int | None = field(default=None, kw_only=True)

    follows_crop: ClassVar[bool] = True
    mode: ClassVar[str | None] = None
    resample: ClassVar[str] = "nearest"
    channels: ClassVar[int] = 1
    takes_grey: ClassVar[bool] = True  # whether grey may be converted to several channels

    def load(self, path: str | Path) -> Any:
        """Return the upright PIL image in a file, or the array in an npy file."""
        value = super().load(path)
        return self.preprocess(open_image(value)) if isinstance(value, bytes) else value

    def preprocess(self, value: Any) -> Any:
        """Convert a PIL image to the right mode and turn it upright; others are decoded once the crop is known."""
        if not isinstance(value, Image.Image):
            return value
        self._check_mode(value)
        return upright(value, self.mode)

    def _check_mode(self, value: Picture) -> Picture:
        value = EncodedImage(value) if isinstance(value, bytes) else value
        if not self.takes_grey and getattr(value, "mode", None) in _GREY:
            raise DataError(f"expected {self.channels} channels, not a grey image")
        return value

    def _as_input_type(self, value: Picture, result: np.ndarray) -> Any:
        """Return a tensor if the input was a PIL image, as in notebooks, and an array otherwise."""
        return torch.from_numpy(np.ascontiguousarray(result)) if isinstance(value, Image.Image) else result

    def image_augment(
        self, value, crop_coords, flip, orig_size, target_size, rand_aug_idx, resample_mode=None
    ) -> np.ndarray:
        """Crop, resize and flip; the result is (h, w) or (h, w, C) in the data type of the file."""
        mode = resample_mode or self.resample
        if mode not in _RESAMPLE_MODES:
            raise UserError(f"resample_mode must be one of {', '.join(_RESAMPLE_MODES)}, not {mode!r}")
        target = (self.size, self.size) if self.size else target_size
        # Draft mode averages pixels, which would create new values where only the nearest pixel may be taken.
        value = self._check_mode(value)
        image = self.as_array(cut(value, crop_coords, orig_size, target if mode != "nearest" else None, self.mode))
        image = image.copy() if target is None else resize(image, target, mode)
        return self.hflip(image) if flip else image

    def pixels(self, value: Picture) -> np.ndarray:
        """Return the array of :meth:`image_augment` unchanged, and decode a picture that was not cropped."""
        if isinstance(value, np.ndarray):
            return value
        return self.as_array(cut(self._check_mode(value), None, mode=self.mode))

    def as_array(self, image: np.ndarray) -> np.ndarray:
        """Check the decoded crop, and convert it to a type that can be resized."""
        return image

    def hflip(self, image: np.ndarray) -> np.ndarray:
        return image[:, ::-1]

    def empty(self, target_size: tuple[int, int]) -> np.ndarray:
        """Return zeros (C, h, w) in place of an image that gets no tokens."""
        return np.zeros((self.channels, *((self.size, self.size) if self.size else target_size)), np.float32)

    def bind(self, modality: Mapping[str, Any]) -> ImageTransform:
        return replace(self, size=modality["input_size"])


@dataclass(frozen=True)
class PixelTransform(ImageTransform):
    """8-bit channels scaled to [0, 1] and normalised by mean and std: float32 (C, H, W).

    Attributes:
        raw: Leave the result in 8 bits; the reader then applies the scale and bias of :attr:`scaling`.
    """

    raw: bool = field(default=False, kw_only=True)

    resample: ClassVar[str] = "bicubic"
    mode: ClassVar[str | None] = "L"

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel; the default normalises to [-1, 1]."""
        return (0.5,) * self.channels, (0.5,) * self.channels

    @functools.cached_property
    def _scale_and_bias(self) -> tuple[np.ndarray, np.ndarray]:
        mean, std = (np.array(s)[:, None, None] for s in self.statistics)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    @property
    def scaling(self) -> tuple[list[float], list[float]]:
        """Scale and bias of each channel that normalise 8-bit values."""
        scale, bias = self._scale_and_bias
        return scale.ravel().tolist(), bias.ravel().tolist()

    def as_array(self, image: np.ndarray) -> np.ndarray:
        channels = image.shape[2] if image.ndim == 3 else 1
        if image.dtype != np.uint8 or channels != self.channels:
            raise DataError(f"expected {self.channels} channels of 8 bits, not {channels} of {image.dtype}")
        return image

    def postprocess(self, value: Picture) -> Any:
        """An array; of a PIL image a tensor."""
        image = self.as_array(self.pixels(value))
        image = image.reshape(*image.shape[:2], self.channels).transpose(2, 0, 1)
        image = np.array(image, order="C")  # moving bytes and then converting is several times as fast as both at once
        if not self.raw:
            scale, bias = self._scale_and_bias
            image = image.astype(np.float32)
            image *= scale
            image += bias
        return self._as_input_type(value, image)

    def empty(self, target_size: tuple[int, int]) -> np.ndarray:
        return super().empty(target_size).astype(np.uint8 if self.raw else np.float32, copy=False)

    def bind(self, modality: Mapping[str, Any]) -> ImageTransform:
        if modality["num_channels"] != self.channels:
            raise UserError(
                f"modality {modality['name']}: num_channels is {modality['num_channels']}, but the transform "
                f"'{modality['transform']}' gives {self.channels}"
            )
        return super().bind(modality)


@dataclass(frozen=True)
class RGBTransform(PixelTransform):
    """Colour images.

    Attributes:
        imagenet_default_mean_and_std: Normalise by the statistics of ImageNet, as 4M does; False normalises to [-1, 1],
            as tokenizers do.
        color_jitter: Maximum relative change of brightness, contrast and saturation; 0 = none.
    """

    imagenet_default_mean_and_std: bool = True
    color_jitter: float = 0.0

    mode: ClassVar[str | None] = "RGB"
    channels: ClassVar[int] = 3

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (IMAGENET_MEAN, IMAGENET_STD) if self.imagenet_default_mean_and_std else super().statistics

    def choose(self, value: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Blend with black, the mean grey and the grey image, in random order."""
        if not self.color_jitter:
            return value
        image = value.astype(np.float32)
        luma = np.array([0.299, 0.587, 0.114], np.float32)
        anchors = (lambda x: 0.0, lambda x: (x @ luma).mean(), lambda x: (x @ luma)[..., None])
        for step in generator.permutation(3):
            factor = np.float32(1 + self.color_jitter * generator.uniform(-1, 1))
            anchor = anchors[step](image)
            image = np.clip(anchor + factor * (image - anchor), 0, 255)
        return image.round().astype(np.uint8)


@dataclass(frozen=True)
class NormalTransform(PixelTransform):
    """Surface normals in [-1, 1]; a horizontal flip also negates the x component of the normals."""

    mode: ClassVar[str | None] = "RGB"
    channels: ClassVar[int] = 3
    resample: ClassVar[str] = "bilinear"
    takes_grey: ClassVar[bool] = False

    def hflip(self, image: np.ndarray) -> np.ndarray:
        flipped = image[:, ::-1].copy()
        flipped[..., 0] = 255 - flipped[..., 0]
        return flipped


@dataclass(frozen=True)
class DepthTransform(ImageTransform):
    """16-bit depth divided by 65535: float32 (1, H, W).

    Attributes:
        standardize_depth: Subtract the mean and divide by the standard deviation of the middle 80 % of an image's
            values.
    """

    standardize_depth: bool = True

    resample: ClassVar[str] = "bilinear"  # bicubic overshoots at the edges of objects

    def as_array(self, image: np.ndarray) -> np.ndarray:
        if image.dtype.kind == "f":
            raise UnreadableValue("expected depth of 16 bits, 0 to 65535, not floats, whose unit is unknown")
        if image.ndim != 2 or image.dtype not in (np.uint16, np.int32):
            raise DataError(f"expected one channel of 16 bits, not {image.shape} of {image.dtype}")
        if image.dtype == np.int32 and image.size and not 0 <= image.min() <= image.max() <= 65535:
            raise UnreadableValue(f"expected depth of 16 bits, 0 to 65535, not {image.min()} to {image.max()}")
        return image.astype(np.float32)

    def postprocess(self, value: Picture) -> Any:
        """An array; of a PIL image a tensor."""
        depth = self.pixels(value)
        if depth.dtype != np.float32:
            depth = self.as_array(depth)
        else:
            maximum = depth.max()
            if not (np.isfinite(maximum) and (maximum == 0 or maximum > 1)):
                raise UnreadableValue(f"expected depth in 16-bit units, up to 65535, but the maximum is {maximum}")
        depth = depth / np.float32(65535)
        return self._as_input_type(value, (standardise_depth(depth) if self.standardize_depth else depth)[None])


def standardise_depth(depth: np.ndarray) -> np.ndarray:
    """Subtract the mean and divide by the standard deviation of the middle 80 % of the values, float32 of any shape."""
    middle = np.sort(depth, axis=None)
    middle = middle[int(_TRUNCATED * middle.size) : int((1 - _TRUNCATED) * middle.size)]
    return (depth - middle.mean()) / np.sqrt(middle.var(ddof=1) + np.float32(1e-6))


@dataclass(frozen=True)
class SemsegTransform(ImageTransform):
    """Class ids: int64 (H, W). In a picture with a palette, they are the palette indices.

    Attributes:
        zero_is_none: Count the classes from 1, and let 0 stand for "none", which is 255 in the file.
    """

    zero_is_none: bool = False

    def image_augment(
        self, value, crop_coords, flip, orig_size, target_size, rand_aug_idx, resample_mode=None
    ) -> np.ndarray:
        if resample_mode not in (None, "nearest"):
            raise UserError(f"class ids cannot be averaged: resample_mode must be nearest, not {resample_mode!r}")
        return super().image_augment(value, crop_coords, flip, orig_size, target_size, rand_aug_idx)

    def as_array(self, image: np.ndarray) -> np.ndarray:
        if image.ndim != 2 or image.dtype.kind not in "iub":
            raise DataError(f"expected one channel of class ids, not {image.shape} of {image.dtype}")
        return image

    def postprocess(self, value: Picture) -> Any:
        """An array; of a PIL image a tensor."""
        ids = self.as_array(self.pixels(value)).astype(np.int64)
        return self._as_input_type(value, np.where(ids == 255, 0, ids + 1) if self.zero_is_none else ids)


@dataclass(frozen=True)
class MaskTransform(ImageTransform):
    """A mask of valid pixels: bool (1, H, W), True where the mask is exactly 1 (white)."""

    mode: ClassVar[str | None] = "L"

    def postprocess(self, value: Picture) -> Any:
        """An array; of a PIL image a tensor."""
        mask = self.pixels(value)
        if mask.ndim != 2 or mask.dtype not in (np.bool_, np.uint8):
            raise DataError(f"expected one channel of 8 bits or booleans, not {mask.shape} of {mask.dtype}")
        return self._as_input_type(value, (mask == (1 if mask.dtype == np.bool_ else 255))[None])
