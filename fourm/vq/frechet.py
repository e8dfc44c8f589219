"""The Fréchet distance between the features of originals and reconstructions (FID, arXiv 1706.08500), by torchmetrics.

Published figures use one particular Inception network. Distances by other networks, or by the same network with other
weights, can only be compared with one another.

Shapes: B pictures, H x W pixels, D features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fourm.utils.dependencies import optional_import
from fourm.vq.picture_network import PictureNetwork


def torchmetrics() -> ModuleType:
    """Import torchmetrics.

    Raises:
        MissingDependency: It is not installed.
    """
    with optional_import("torchmetrics", "MS-SSIM or FID", "'fourm[eval]'"):
        import torchmetrics.functional.image
        import torchmetrics.image.fid
    return torchmetrics


class PooledFeatures(PictureNetwork):
    """(B, 3, H, W) in [-1, 1] → the pooled features in front of a network's classifier, (B, D)."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.network.forward_head(self.network.forward_features(self.prepare(x)), pre_logits=True)


class FrechetDistance:
    """Accumulates the statistics of pictures in [-1, 1], with one or three channels.

    Args:
        network: A network of timm.
    """

    def __init__(self, network: Any):
        # The processes of a run sum the statistics themselves, and a cached result would be that of another evaluation.
        self._metric = torchmetrics().image.fid.FrechetInceptionDistance(
            PooledFeatures(network), sync_on_compute=False, compute_with_cache=False
        )

    def statistics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute the statistics of a batch, (B, C, H, W) each: numbers, sums and sums of products of the features."""
        metric = self._metric.to(target.device)
        metric.reset()
        for images, real in ((target, True), (prediction, False)):
            metric.update(images.float().expand(-1, 3, -1, -1), real=real)
        return {f"fid_{name}": value for name, value in metric.metric_state.items()}

    def distance(self, sums: Mapping[str, Tensor]) -> float:
        """Compute the distance from sums of the :meth:`statistics`; NaN if they are of fewer than two pictures."""
        metric = self._metric.to(sums["fid_real_features_sum"].device)
        metric.reset()
        for name in metric.metric_state:
            setattr(metric, name, sums[f"fid_{name}"])
        if metric.real_features_num_samples < 2:
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it misses calls of its update method
            return metric.compute().item()
