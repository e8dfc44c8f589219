"""Frozen networks of timm that look at pictures in [-1, 1]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PictureNetwork(nn.Module):
    """A frozen network with the size and the standardisation that it expects of pictures.

    Args:
        network: A network of timm, with its weights.
    """

    mean: Tensor  # (3, 1, 1), like std
    std: Tensor

    def __init__(self, network: Any):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.size = network.pretrained_cfg["input_size"][-1]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1))

    def prepare(self, x: Tensor) -> Tensor:
        """Standardise and resize pictures, (B, 3, H, W) in [-1, 1] → (B, 3, size, size)."""
        x = ((x.float() + 1) / 2 - self.mean) / self.std
        return F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
