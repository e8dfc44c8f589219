"""Reconstructions to look at, beside their originals.

Shapes: B samples, C channels or classes, h x w places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fourm.vq.domains import Domain

_SIDE = 64  # in pixels, at least: features have a few places only


def side_by_side(domain: Domain, original: Tensor, reconstruction: Tensor) -> Tensor | None:
    """Originals on the left, reconstructions on the right: (B, 3, h, 2 w) in [0, 1]; None of vectors, which nobody can see.

    Args:
        original: What a tokenizer of ``domain`` is trained on, (B, C, h, w), or class ids (B, h, w).
        reconstruction: (B, C, h, w); of classes and masks logits.
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
    """[-1, 1] → [0, 1]; what reaches farther, as depth does, from its smallest to its largest value in each original."""
    low, high = original.amin((1, 2, 3), keepdim=True), original.amax((1, 2, 3), keepdim=True)
    low, high = low.where(low < -1, -torch.ones_like(low)), high.where(high > 1, torch.ones_like(high))
    return [(x - low) / (high - low) for x in (original, reconstruction)]


def _class_colours(ids: Tensor) -> Tensor:
    """(B, h, w) → (B, 3, h, w): always the same colour for a class, black for class 0."""
    return torch.stack([ids * step % 256 / 255 for step in (67, 131, 197)], dim=1)


def _principal_components(original: Tensor, reconstruction: Tensor) -> list[Tensor]:
    """The three directions in which the originals differ most, as red, green and blue."""
    rows = rearrange(original.float(), "b c h w -> (b h w) c")
    mean = rows.mean(0)
    basis = torch.linalg.svd(rows - mean, full_matrices=False)[2][:3]  # (3, C)
    parts = [torch.einsum("bchw,kc->bkhw", x.float() - mean[:, None, None], basis) for x in (original, reconstruction)]
    low, high = parts[0].amin((0, 2, 3), keepdim=True), parts[0].amax((0, 2, 3), keepdim=True)
    return [F.pad((part - low) / (high - low).clamp(min=1e-8), (0, 0, 0, 0, 0, 3 - len(basis))) for part in parts]
