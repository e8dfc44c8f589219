"""Token ids that were precomputed by a tokenizer, once per stored crop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fourm.data.transforms.base import AbstractTransform
from fourm.data.transforms.sequence import stored_crop_entry
from fourm.utils.errors import DataError, UserError


@dataclass(frozen=True)
class PerCropTransform(AbstractTransform):
    """Arrays that a file has once per stored crop, or once for the whole sample.

    Attributes:
        per_crop: Whether there is an array per stored crop.
    """

    per_crop: bool = True

    @property
    def follows_crop(self) -> bool:  # type: ignore[override]
        return self.per_crop

    def stored_crops(self, value: np.ndarray) -> int | None:
        return len(value) if self.per_crop else None

    def image_augment(
        self, value, crop_coords, flip, orig_size, target_size, rand_aug_idx, resample_mode=None
    ) -> np.ndarray:
        """Return the entry of stored crop ``rand_aug_idx`` if there is one per crop."""
        return stored_crop_entry(value, rand_aug_idx) if self.per_crop else value


@dataclass(frozen=True)
class TokTransform(PerCropTransform):
    """Integer ids: int64 (L,) or (h, w), the row of a (crops, …) file that belongs to the sample's crop.

    Attributes:
        vocab_size: Upper bound (exclusive) of the ids plus ``vocab_offset``; None = unchecked.
        vocab_offset: Number that masking adds to the ids.
        num_tokens: Number of ids in a row; None = any number.
    """

    vocab_size: int | None = None
    vocab_offset: int = 0
    num_tokens: int | None = None

    def preprocess(self, value: Any) -> np.ndarray:
        """Check all rows, so that an id outside the vocabulary does not fail later on a GPU.

        A string, such as the class in a cls file, holds the ids of one row.
        """
        ids = np.array([int(word) for word in value.split()]) if isinstance(value, str) else np.asarray(value)
        if self.per_crop and (ids.ndim == 1 if self.num_tokens is None else ids.shape == (self.num_tokens,)):
            ids = ids[None]  # a flat row is one crop
        if ids.dtype.kind not in "iu" or ids.ndim < 1 + self.per_crop:
            shape = "(crops, tokens)" if self.per_crop else "(tokens,)"
            raise DataError(f"expected whole numbers of shape {shape}, not {ids.dtype} of shape {ids.shape}")
        count = math.prod(ids.shape[self.per_crop :])
        if self.num_tokens not in (None, count):
            raise DataError(f"expected {self.num_tokens} tokens, found {count}")
        if self.vocab_size is not None and ids.size:
            limit = self.vocab_size - self.vocab_offset
            # As an unsigned number, a negative id is huge, so one pass finds both kinds.
            if np.maximum.reduce(ids.view(ids.dtype.str.replace("i", "u")), axis=None) >= limit:
                outside = ids[(ids < 0) | (ids >= limit)]
                raise DataError(f"token id {outside[0]} lies outside the vocabulary of {limit}")
        return ids

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


@dataclass(frozen=True)
class CodebooksTransform(TokTransform):
    """Codes of several codebooks, as in neural audio codecs: (…, codebooks, steps) → int64 (steps · codebooks,).

    The codes of a step are adjacent, and the ids of codebook k begin at ``k · codebook_size``.

    Attributes:
        codebooks: Number of codebooks.
        codebook_size: Number of codes in each codebook.
    """

    codebooks: int = 1
    codebook_size: int = 1024

    def preprocess(self, value: Any) -> np.ndarray:
        codes = np.asarray(value)
        if codes.ndim != 2 + self.per_crop or codes.shape[-2] != self.codebooks or codes.dtype.kind not in "iu":
            raise DataError(f"expected codes (codebooks {self.codebooks}, steps), not {codes.dtype} {codes.shape}")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codebook_size:
            raise DataError(f"expected codes from 0 to {self.codebook_size - 1}, not {codes.min()} to {codes.max()}")
        ids = codes.astype(np.int64) + self.codebook_size * np.arange(self.codebooks)[:, None]
        return super().preprocess(ids.swapaxes(-1, -2).reshape(*codes.shape[:-2], -1))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Convert ids (L,) to codes (codebooks, steps); an incomplete or inconsistent step ends the sequence."""
        ids = ids[: len(ids) // self.codebooks * self.codebooks].reshape(-1, self.codebooks)
        valid = (ids // self.codebook_size == np.arange(self.codebooks)).all(1)
        steps = len(ids) if valid.all() else int(valid.argmin())
        return (ids[:steps] % self.codebook_size).T

    def bind(self, modality: Mapping[str, Any]) -> CodebooksTransform:
        required = modality["vocab_offset"] + self.codebooks * self.codebook_size
        if modality["vocab_size"] != required:
            raise UserError(
                f"modality {modality['name']}: {self.codebooks} codebooks of {self.codebook_size} codes need "
                f"vocab_size {required} (with vocab_offset {modality['vocab_offset']}), not {modality['vocab_size']}"
            )
        return replace(self, **vars(super().bind(modality)))
