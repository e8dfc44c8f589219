"""Numbers other than images: embedding vectors, grids of features, scalars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fourm.data.transforms.base import AbstractTransform
from fourm.data.transforms.sequence import stored_crop_entry
from fourm.data.transforms.tokens import PerCropTransform
from fourm.utils.errors import DataError, UnreadableValue, UserError


def require_finite(array: np.ndarray) -> np.ndarray:
    """Return ``array`` unchanged if all values are finite; a single NaN would spread to every weight of a model.

    Raises:
        UnreadableValue: The array contains NaN or infinity.
    """
    if array.dtype == np.float16:  # test for an exponent with all bits set, which is ten times as fast as np.isfinite
        bad = array.size and (np.ascontiguousarray(array).view(np.uint16) & 0x7C00).max() == 0x7C00
    else:
        bad = array.dtype.kind == "f" and not np.isfinite(array).all()
    if bad:
        raise UnreadableValue("it holds values that are not finite")
    return array


@dataclass(frozen=True)
class CaptionEmbTransform(AbstractTransform):
    """The embedding vectors of a caption (L, D), for example from T5. Masking converts the float16 ones that it uses.

    A file has ``emb`` (variants, L, D) and ``mask_valid`` (variants, L), which marks the valid vectors.

    Attributes:
        aligned_captions: See :class:`CaptionTransform`.
        width: Expected D; None = unchecked.
    """

    aligned_captions: bool = True
    width: int | None = None

    def preprocess(self, value: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the vectors of each variant and the mask of the valid ones."""
        if not isinstance(value, Mapping) or not {"emb", "mask_valid"} <= value.keys():
            raise DataError(f"expected an npz file with emb and mask_valid, not {_names(value)}")
        vectors, valid = np.asarray(value["emb"]), require_finite(np.asarray(value["mask_valid"])).astype(bool)
        if vectors.ndim != 3 or not len(vectors) or vectors.shape[:2] != valid.shape:
            raise DataError(
                f"expected emb (variants, L, D) and mask_valid (variants, L), not {vectors.shape} and {valid.shape}"
            )
        if self.width not in (None, vectors.shape[2]):
            raise DataError(f"expected vectors of {self.width} numbers, not of {vectors.shape[2]}")
        return list(zip(vectors, valid, strict=True))

    def stored_crops(self, value: list[tuple[np.ndarray, np.ndarray]]) -> int | None:
        return len(value) if self.aligned_captions and len(value) > 1 else None

    def image_augment(
        self, value, crop_coords, flip, orig_size, target_size, rand_aug_idx, resample_mode=None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the variant of stored crop ``rand_aug_idx`` if there is one per crop, and all variants otherwise."""
        if rand_aug_idx is None or self.stored_crops(value) is None:
            return value
        return [stored_crop_entry(value, rand_aug_idx)]

    def choose(
        self, value: list[tuple[np.ndarray, np.ndarray]], generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        return value[generator.integers(len(value)) if len(value) > 1 else 0]

    def postprocess(self, value: tuple[np.ndarray, np.ndarray] | list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        # A list means that the caller skipped ``choose``.
        vectors, valid = self.choose(value, np.random.default_rng()) if isinstance(value, list) else value
        vectors = vectors[valid]
        return require_finite(vectors if vectors.dtype == np.float16 else vectors.astype(np.float32, copy=False))

    def is_missing(self, value: Any) -> bool:
        """Return whether there are no vectors, or no valid ones."""
        if super().is_missing(value):
            return True
        return isinstance(value, Mapping) and "mask_valid" in value and not np.any(value["mask_valid"])

    def bind(self, modality: Mapping[str, Any]) -> CaptionEmbTransform:
        return replace(self, width=modality["embedding_options"].get("orig_emb_dim"))


def _names(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__


@dataclass(frozen=True)
class GridTransform(PerCropTransform):
    """A grid of numbers that is not cropped, float32 (C, H, W): features of a network, a spectrogram.

    Attributes:
        per_crop: Whether the file has one grid per stored crop. If False, it has one, and (H, W) is a single channel.
        mean: Mean that is subtracted.
        std: Standard deviation that the result is divided by.
        shape: Expected (C, H, W); None = unchecked.
    """

    per_crop: bool = False
    mean: float = 0.0
    std: float = 1.0
    shape: tuple[int, int, int] | None = None

    def preprocess(self, value: Any) -> np.ndarray:
        grid = np.asarray(value)
        grid = grid[None] if grid.ndim == 2 and not self.per_crop else grid
        if grid.dtype.kind not in "iuf" or grid.ndim != 3 + self.per_crop:
            raise DataError(f"expected a grid of numbers (channels, height, width), not {grid.dtype} {grid.shape}")
        if self.shape not in (None, grid.shape[-3:]):
            raise DataError(f"expected a grid of shape {self.shape}, not {grid.shape[-3:]}")
        return grid

    def postprocess(self, value: np.ndarray) -> np.ndarray:
        grid = (value.astype(np.float32) - np.float32(self.mean)) / np.float32(self.std)
        return grid if value.dtype.kind in "iu" else require_finite(grid)

    def bind(self, modality: Mapping[str, Any]) -> GridTransform:
        channels, side = modality["num_channels"], modality["input_size"]
        shape = (channels, side, side) if channels and side else None
        return replace(self, per_crop=modality["pretokenized"], shape=shape)


@dataclass(frozen=True)
class ScalarTransform(AbstractTransform):
    """A number as the token of its bin, int64 (1,). Numbers outside the range are clipped to it.

    A file has the number: ``12.5`` in txt or json, or an npy of one number.

    Attributes:
        low: Lower end of the range of the bins.
        high: Upper end of the range of the bins.
        log: Whether bins have equal width in the logarithm.
        bins: Number of bins, which is the vocabulary size.
    """

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    bins: int = 1000

    def preprocess(self, value: Any) -> float:
        number = float(np.asarray(value).item())
        if not math.isfinite(number):
            raise UnreadableValue(f"expected a finite number, not {number}")
        return number

    def postprocess(self, value: float) -> np.ndarray:
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(min(max(value, self.low), self.high)) - low) / (high - low)
        return np.array([min(int(share * self.bins), self.bins - 1)])

    def decode(self, token: int) -> float:
        """Return the centre of a bin."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        value = low + (token + 0.5) / self.bins * (high - low)
        return math.exp(value) if self.log else value

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value

    def bind(self, modality: Mapping[str, Any]) -> ScalarTransform:
        if not (0 if self.log else -math.inf) < self.low < self.high < math.inf:
            raise UserError(
                f"modality {modality['name']}: transform_options 'low' and 'high' must be a range, above 0 with 'log', "
                f"not {self.low} to {self.high}"
            )
        return replace(self, bins=modality["vocab_size"])
