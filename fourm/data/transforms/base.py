"""The base class of transforms: the steps from a file to the value that masking takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fourm.data.decoding import decode_value

MAPPINGS = (dict, Mapping)
"""Types to check for a mapping: for a dict, this is several times as fast as the check for a ``Mapping`` alone."""

CropCoords = tuple[int, int, int, int]
"""(top, left, height, width) in pixels of the main modality's image."""


class AbstractTransform:
    """The transform of one type of modality. By default, each step returns its value unchanged.

    The order is ``load`` (files only), ``preprocess``, ``image_augment``, ``choose``, ``postprocess``. All steps but
    ``choose`` are pure; ``choose`` makes the random choices other than the crop, with the sample's generator.

    Attributes:
        follows_crop: Whether the result depends on the crop of the image.
    """

    follows_crop: ClassVar[bool] = False

    def load(self, path: str | Path) -> Any:
        """Decode the raw value in a file; members of shards are decoded in the same way."""
        path = Path(path)
        return decode_value(path.name, path.read_bytes())

    def preprocess(self, value: Any) -> Any:
        """Do everything that does not depend on the crop."""
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
        """Apply the sample's crop, flip and stored crop.

        Args:
            value: The preprocessed value.
            crop_coords: (top, left, height, width); None = the whole image.
            flip: Whether to flip horizontally after the crop.
            orig_size: (height, width) of the image that ``crop_coords`` refer to.
            target_size: (height, width) of the result; None = that of the crop.
            rand_aug_idx: Index of the stored crop; None if there are none.
            resample_mode: nearest, bilinear or bicubic; overrides the default of the transform.
        """
        return value

    def choose(self, value: Any, generator: np.random.Generator) -> Any:
        """Make random choices that are independent of other modalities."""
        return value

    def postprocess(self, value: Any) -> Any:
        """Convert the value to the form that masking takes."""
        return value

    def is_missing(self, value: Any) -> bool:
        """Return whether a raw value is null, a blank string, or an empty list or mapping."""
        if isinstance(value, np.ndarray):  # the most frequent type; the check for a mapping is the slowest
            return False
        if isinstance(value, str):
            return not value or value.isspace()
        return value is None or (isinstance(value, (list, tuple, *MAPPINGS)) and not value)

    def stored_crops(self, value: Any) -> int | None:
        """Return the number of stored crops that a preprocessed ``value`` has entries for, or None if it has none."""
        return None

    def bind(self, modality: Mapping[str, Any]) -> AbstractTransform:
        """Return this transform with the limits that ``modality`` declares, which values are checked against."""
        return self
