"""What every transform is: the steps between a file and the value that masking takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fourm.data.decoding import decode_value

CropCoords = tuple[int, int, int, int]
"""(top, left, height, width) in pixels of the main modality's image."""


class AbstractTransform:
    """One kind of modality. A step that a kind does not need passes its value on.

    The order is ``load`` (files only), ``preprocess``, ``image_augment``, ``choose``, ``postprocess``. All but
    ``choose`` are pure; whatever the crop does not decide is drawn there, from the sample's generator.

    Attributes:
        follows_crop: what it gives depends on the crop of the picture.
    """

    follows_crop: ClassVar[bool] = False

    def load(self, path: str | Path) -> Any:
        """The raw value in the file ``path``; shards are decoded the same way from their members."""
        path = Path(path)
        return decode_value(path.name, path.read_bytes())

    def preprocess(self, value: Any) -> Any:
        """What can be done before the crop is known."""
        return value

    def image_augment(
        self,
        value: Any,
        crop_coords: CropCoords | None,
        flip: bool,
        orig_size: tuple[int, int] | None,
        target_size: tuple[int, int] | None,
        rand_aug_idx: int | None,
        resample_mode: str | None = None,
    ) -> Any:
        """Follow the sample's crop, flip and stored crop.

        Args:
            crop_coords: (top, left, height, width); None = everything.
            flip: mirror left and right, after the crop.
            orig_size: (height, width) in which ``crop_coords`` are given.
            target_size: (height, width) of the result; None = that of the crop.
            rand_aug_idx: index of the stored crop; None if there are none.
            resample_mode: nearest, bilinear or bicubic in place of the transform's own.
        """
        return value

    def choose(self, value: Any, generator: np.random.Generator) -> Any:
        """Random choices that need not agree with other modalities."""
        return value

    def postprocess(self, value: Any) -> Any:
        """The value in the form that masking takes."""
        return value

    def is_missing(self, value: Any) -> bool:
        """Whether a raw value says that there is none: null, no text, or nothing in a list or mapping."""
        if isinstance(value, np.ndarray):  # most are; asking them whether they are mappings takes longest
            return False
        if isinstance(value, str):
            return not value or value.isspace()
        return value is None or (isinstance(value, (list, tuple, Mapping)) and not value)

    def stored_crops(self, value: Any) -> int | None:
        """For how many stored crops a preprocessed ``value`` has entries; None where crops do not matter."""
        return None

    def bind(self, modality: Mapping[str, Any]) -> AbstractTransform:
        """This transform with the limits that ``modality`` declares, so that it can check values against them."""
        return self
