"""The statistics of ImageNet, by which the pixels of 4M are normalised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def denormalize(img: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Undo the normalisation of pixels.

    Args:
        img: Normalised pixels, (…, C, H, W); they are not changed.
        mean, std: Mean and standard deviation of each channel.

    Returns:
        Pixels, (…, C, H, W), in [0, 1] if they come from a picture.
    """
    offset, scale = (torch.tensor(values, dtype=img.dtype, device=img.device)[:, None, None] for values in (mean, std))
    return img * scale + offset
