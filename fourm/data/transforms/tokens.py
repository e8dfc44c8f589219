"""Token ids that a tokenizer computed beforehand, once per stored crop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fourm.data.transforms.base import AbstractTransform
from fourm.utils.errors import DataError


@dataclass(frozen=True)
class TokTransform(AbstractTransform):
    """Integer ids: int64 (L,) or (h, w), the row of a (crops, …) file that belongs to the sample's crop.

    Attributes:
        per_crop: the file has one row per stored crop; False: it is one row of codes.
        vocab_size: ids, with ``vocab_offset`` added, must lie below; None = unchecked.
        vocab_offset: what masking adds to the ids.
        num_tokens: how many ids a row must hold; None = any number.
    """

    per_crop: bool = True
    vocab_size: int | None = None
    vocab_offset: int = 0
    num_tokens: int | None = None

    def preprocess(self, value: Any) -> np.ndarray:
        """Check all rows: an id outside the vocabulary must not come up in the middle of a run, on a GPU."""
        ids = np.asarray(value)
        if ids.dtype.kind not in "iu" or ids.ndim < 1 + self.per_crop:
            shape = "(crops, tokens)" if self.per_crop else "(tokens,)"
            raise DataError(f"expected whole numbers of shape {shape}, not {ids.dtype} of shape {ids.shape}")
        count = math.prod(ids.shape[self.per_crop :])
        if self.num_tokens not in (None, count):
            raise DataError(f"expected {self.num_tokens} tokens, found {count}")
        if self.vocab_size is not None and ids.size:
            limit = self.vocab_size - self.vocab_offset
            # Seen as unsigned, a negative id is a huge one, so one pass finds both kinds.
            if ids.view(ids.dtype.str.replace("i", "u")).max() >= limit:
                outside = ids[(ids < 0) | (ids >= limit)]
                raise DataError(f"token id {outside[0]} lies outside the vocabulary of {limit}")
        return ids

    def stored_crops(self, value: np.ndarray) -> int | None:
        return len(value) if self.per_crop else None

    def image_augment(
        self, value, crop_coords, flip, orig_size, target_size, rand_aug_idx, resample_mode=None
    ) -> np.ndarray:
        """Row ``rand_aug_idx``."""
        if not self.per_crop:
            return value
        if rand_aug_idx is None:
            raise DataError("tokens belong to stored crops, but no stored crop was chosen (crop_settings is needed)")
        if rand_aug_idx >= len(value):
            raise DataError(f"stored crop {rand_aug_idx} was chosen, but there are tokens of only {len(value)} crops")
        return value[rand_aug_idx]

    def postprocess(self, value: np.ndarray) -> np.ndarray:
        return value.astype(np.int64)

    def bind(self, modality: Mapping[str, Any]) -> TokTransform:
        return replace(
            self,
            per_crop=modality["pretokenized"],
            vocab_size=modality["vocab_size"],
            vocab_offset=modality["vocab_offset"],
            num_tokens=modality["max_tokens"] if modality["type"] == "img" else None,
        )
