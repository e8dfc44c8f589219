"""Metrics of reconstructions, and of the use of a codebook.

Shapes: B samples, C channels or classes, h x w pixels or positions, G codebooks of K codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fourm.vq.domains import Domain
from fourm.vq.frechet import torchmetrics

MS_SSIM_SIDE = 176
"""The smallest side in pixels that MS-SSIM accepts: a window of 11 pixels must fit in after four halvings."""


def metrics_of(domain: Domain, name: str, bounded: bool) -> list[str]:
    """Return the names of the metrics of a domain, for :func:`sample_metrics`.

    Args:
        name: The name of the domain.
        bounded: Whether its values lie in [-1, 1].
    """
    if domain.kind == "classes":
        return ["accuracy"]
    if domain.kind == "mask":
        return ["iou"]
    return ["l1", "mse"] + (["psnr"] if bounded else []) + (["angle"] if name == "normal" else [])


def sample_metrics(
    names: list[str], prediction: Tensor, target: Tensor, depth: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute metrics as means over the samples of a batch.

    Args:
        names: Names from :func:`metrics_of`, ``ms_ssim``, or, with ``depth``, ``abs_rel`` and ``abs_rel_fitted``.
        prediction: (B, C, h, w) float32; for class maps and masks these are logits.
        target: The same; class ids are (B, h, w) int64.
        depth: For domain depth, the depth that ``target`` standardises, (B, 1, h, w); 0 where it is unknown.

    Returns:
        Name → scalar.
    """
    known = {
        "accuracy": lambda: (prediction.argmax(1) == target).double().mean(),
        "iou": lambda: _mask_iou(prediction > 0, target > 0.5).mean(),
        "l1": lambda: F.l1_loss(prediction, target),
        "mse": lambda: F.mse_loss(prediction, target),
        "psnr": lambda: psnr(prediction.clamp(-1, 1), target).mean(),
        "angle": lambda: mean_angle(prediction, target),
        "ms_ssim": lambda: ms_ssim(prediction, target),
    }
    if depth is not None:
        known["abs_rel"] = lambda: abs_rel(unstandardised(prediction, target, depth), depth).mean()
        known["abs_rel_fitted"] = lambda: abs_rel(prediction, depth, fit=True).mean()
    return {name: known[name]() for name in names}


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of pictures in [-1, 1], (B, C, h, w) each → (B,) in dB."""
    return 10 * torch.log10(4 / (prediction - target).square().flatten(1).mean(1).clamp(min=1e-10))


def ms_ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean multi-scale structural similarity of pictures in [-1, 1], at most 1 for equal ones.

    Args:
        prediction, target: (B, C, h, w), with sides of at least :data:`MS_SSIM_SIDE`.
    """
    images = [(x.clamp(-1, 1) + 1) / 2 for x in (prediction, target)]
    return torchmetrics().functional.image.multiscale_structural_similarity_index_measure(*images, data_range=1.0)


def mean_angle(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean angle in degrees between normals (B, 3, h, w); normals of length 0 are unknown and ignored."""
    known = (prediction.norm(dim=1) > 0) & (target.norm(dim=1) > 0)
    cosine = F.cosine_similarity(prediction, target, dim=1)[known]
    return torch.rad2deg(cosine.clamp(-1, 1).acos()).mean()


def abs_rel(prediction: Tensor, depth: Tensor, fit: bool = False) -> Tensor:
    """Return the mean of abs(p − t) / t over the pixels of depth maps; unknown pixels are ignored.

    Args:
        prediction: p, (B, …).
        depth: The true depth t of the same shape. Pixels that are not positive, or NaN in either map, are unknown.
        fit: First fit a scale ≥ 0 and a shift of each prediction, as is usual for relative depth. A prediction that
            confuses far and near is fitted by a constant.

    Returns:
        (B,) float64.
    """
    prediction, depth = prediction.double().flatten(1), depth.double().flatten(1)
    known = prediction.isfinite() & (depth > 0) & depth.isfinite()
    inverse = torch.where(known, 1 / depth, 0)
    ratio = torch.where(known, prediction * inverse, 0)
    if fit:
        # Least squares of the relative errors scale · p / t + shift / t − 1, and without a scale where it is negative.
        design = torch.stack([ratio, inverse], dim=2)
        solution = torch.linalg.pinv(design.mT @ design, hermitian=True) @ design.sum(1, keepdim=True).mT  # (B, 2, 1)
        constant = inverse * (inverse.sum(1) / inverse.square().sum(1))[:, None]
        ratio = torch.where(solution[:, :1, 0] >= 0, (design @ solution)[..., 0], constant)
    return torch.where(known, ratio - 1, 0).abs().sum(1) / known.sum(1).clamp(min=1)


def unstandardised(prediction: Tensor, standardised: Tensor, original: Tensor) -> Tensor:
    """Apply to ``prediction`` the scale and shift that turn each ``standardised`` image into its ``original``.

    Args:
        prediction, standardised, original: (B, C, h, w) each.
    """
    (std, mean), (std_original, mean_original) = (
        torch.std_mean(x.double(), dim=(1, 2, 3), keepdim=True) for x in (standardised, original)
    )
    return (prediction - mean) * (std_original / std.clamp(min=1e-12)) + mean_original


def _mask_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the intersection over union of masks, (B, 1, h, w) bool each → (B,)."""
    both = (prediction & target).flatten(1).sum(1)
    return both / (prediction | target).flatten(1).sum(1).clamp(min=1)


def region_counts(prediction: Tensor, target: Tensor, classes: int) -> dict[str, Tensor]:
    """Count the pixels of each class in the prediction, in the target and in both, for :func:`region_metrics`.

    Args:
        prediction: Logits (B, classes, h, w).
        target: (B, h, w) int64.
        classes: The number of classes.

    Returns:
        Name → (classes,).
    """
    chosen = prediction.argmax(1)
    ids = {"class_predicted": chosen, "class_target": target, "class_both": target[chosen == target]}
    return {name: torch.bincount(own.flatten(), minlength=classes).double() for name, own in ids.items()}


def region_metrics(counts: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute the mean intersection over union of the classes that occur, from sums of :func:`region_counts`."""
    both = counts["class_both"]
    union = counts["class_predicted"] + counts["class_target"] - both
    return {"miou": (both / union)[union > 0].mean().item()}


def code_counts(ids: Tensor, codebooks: int, size: int) -> Tensor:
    """Count the uses of each code.

    Args:
        ids: (B, h, w), or (B, G, h, w).
        codebooks: G.
        size: K.

    Returns:
        (G, K).
    """
    first = torch.arange(codebooks, device=ids.device)[:, None] * size
    numbers = ids.reshape(len(ids), codebooks, -1) + first
    return torch.bincount(numbers.flatten(), minlength=codebooks * size).view(codebooks, size).double()


def codebook_metrics(counts: Tensor) -> dict[str, float]:
    """Compute the share of codes in use, and the perplexity: the number of equally frequent codes of the same entropy.

    Args:
        counts: (G, K), sums of :func:`code_counts`; the metrics are means over G.
    """
    shares = counts / counts.sum(1, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(1)
    return {"code_usage": (counts > 0).double().mean().item(), "perplexity": entropy.exp().mean().item()}
