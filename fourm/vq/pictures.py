"""Pictures of tokenizers: resizing them, and showing reconstructions beside their originals.

Shapes: B samples, C channels or classes, h x w pixels or positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fourm.vq.domains import Domain

_SIDE = 64  # the smallest height of a picture in pixels: a map of features has only a few positions


def resized(images: Tensor, size: int) -> Tensor:
    """Resize images (B, C, h, w), or integer class ids (B, h, w), to ``size`` pixels in height and width."""
    if images.ndim == 3:
        return F.interpolate(images[:, None].float(), (size, size), mode="nearest-exact")[:, 0].to(images.dtype)
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def side_by_side(domain: Domain, original: Tensor, reconstruction: Tensor) -> Tensor | None:
    """Draw originals on the left and reconstructions on the right.

    Args:
        domain: The domain of the tokenizer.
        original: (B, C, h, w), or class ids (B, h, w).
        reconstruction: (B, C, h, w); for class maps and masks these are logits.

    Returns:
        (B, 3, height, 2 width) in [0, 1]; None for vectors, which cannot be shown.
    """
    if domain.kind == "vector":
        return None
    if domain.kind == "classes":
        pair = [_class_colours(ids) for ids in (original, reconstruction.argmax(1))]
    elif domain.kind == "mask":
        pair = [original, reconstruction.sigmoid()]
    elif domain.kind == "map":
        pair = _principal_components(original, reconstruction)
    else:
        pair = _in_range(original, reconstruction)
    both = torch.cat(pair, dim=3).float().clamp(0, 1)
    both = both.expand(-1, 3, -1, -1)
    height, width = both.shape[2:]
    scale = -(-_SIDE // height)
    return F.interpolate(both, (height * scale, width * scale), mode="nearest")


def _in_range(original: Tensor, reconstruction: Tensor) -> list[Tensor]:
    """Map [-1, 1] to [0, 1]; for images that exceed it, such as depth, map the range of each original instead."""
    low, high = original.amin((1, 2, 3), keepdim=True), original.amax((1, 2, 3), keepdim=True)
    low, high = low.where(low < -1, -torch.ones_like(low)), high.where(high > 1, torch.ones_like(high))
    return [(x - low) / (high - low) for x in (original, reconstruction)]


def _class_colours(ids: Tensor) -> Tensor:
    """Colour class ids, (B, h, w) → (B, 3, h, w): a class always has the same colour, and class 0 is black."""
    return torch.stack([ids * step % 256 / 255 for step in (67, 131, 197)], dim=1)


def _principal_components(original: Tensor, reconstruction: Tensor) -> list[Tensor]:
    """Show the three principal components of the originals as red, green and blue."""
    rows = rearrange(original.float(), "b c h w -> (b h w) c")
    mean = rows.mean(0)
    basis = torch.linalg.svd(rows - mean, full_matrices=False)[2][:3]  # (3, C)
    parts = [torch.einsum("bchw,kc->bkhw", x.float() - mean[:, None, None], basis) for x in (original, reconstruction)]
    low, high = parts[0].amin((0, 2, 3), keepdim=True), parts[0].amax((0, 2, 3), keepdim=True)
    return [F.pad((part - low) / (high - low).clamp(min=1e-8), (0, 0, 0, 0, 0, 3 - len(basis))) for part in parts]
