"""How good reconstructions are, and how a codebook is used.

Shapes: B samples, C channels or classes, h x w places, G codebooks of K codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fourm.vq.domains import Domain


def metrics_of(domain: Domain, name: str, bounded: bool) -> list[str]:
    """The names of what :func:`sample_metrics` gives."""
    if domain.kind == "classes":
        return ["accuracy"]
    if domain.kind == "mask":
        return ["iou"]
    return ["l1", "mse"] + ["psnr"] * bounded + ["angle"] * (name == "normal")


def sample_metrics(names: list[str], prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Means over the samples of a batch.

    Args:
        names: Of :func:`metrics_of`.
        prediction: (B, C, h, w) float32; of classes and masks logits.
        target: The same, of classes (B, h, w) int64.
    """
    known = {
        "accuracy": lambda: (prediction.argmax(1) == target).double().mean(),
        "iou": lambda: _mask_iou(prediction > 0, target > 0.5).mean(),
        "l1": lambda: F.l1_loss(prediction, target),
        "mse": lambda: F.mse_loss(prediction, target),
        "psnr": lambda: psnr(prediction.clamp(-1, 1), target).mean(),
        "angle": lambda: torch.rad2deg(F.cosine_similarity(prediction, target, dim=1).clamp(-1, 1).acos()).mean(),
    }
    return {name: known[name]() for name in names}


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures in [-1, 1], (B, C, h, w) twice → (B,) in dB."""
    return 10 * torch.log10(4 / (prediction - target).square().flatten(1).mean(1).clamp(min=1e-10))


def _mask_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """(B, 1, h, w) bool twice → (B,)."""
    both = (prediction & target).flatten(1).sum(1)
    return both / (prediction | target).flatten(1).sum(1).clamp(min=1)


def region_counts(prediction: Tensor, target: Tensor, classes: int) -> dict[str, Tensor]:
    """Pixels of each class, (classes,), in the prediction, the target and both; for :func:`region_metrics`.

    Args:
        prediction: (B, classes, h, w).
        target: (B, h, w) int64.
    """
    chosen = prediction.argmax(1)
    count = lambda ids: torch.bincount(ids.flatten(), minlength=classes).double()  # noqa: E731
    return {
        "class_predicted": count(chosen), "class_target": count(target), "class_both": count(target[chosen == target])
    }  # fmt: skip


def region_metrics(counts: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean over classes that there are of intersection over union, from sums of :func:`region_counts`."""
    if "class_both" not in counts:
        return {}
    both = counts["class_both"]
    union = counts["class_predicted"] + counts["class_target"] - both
    return {"miou": (both / union)[union > 0].mean().item()}


def code_counts(ids: Tensor, codebooks: int, size: int) -> Tensor:
    """How often each code is used, (G, K).

    Args:
        ids: (B, h, w), or (B, G, h, w).
    """
    first = torch.arange(codebooks, device=ids.device)[:, None] * size
    places = ids.reshape(len(ids), codebooks, -1) + first
    return torch.bincount(places.flatten(), minlength=codebooks * size).view(codebooks, size).double()


def codebook_metrics(counts: Tensor) -> dict[str, float]:
    """Share of codes in use, and perplexity: how many codes that are used alike would carry as much information.

    Args:
        counts: (G, K), sums of :func:`code_counts`; the figures are means over G.
    """
    shares = counts / counts.sum(1, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(1)
    return {"code_usage": (counts > 0).double().mean().item(), "perplexity": entropy.exp().mean().item()}
