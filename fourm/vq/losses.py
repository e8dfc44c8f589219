"""The losses of tokenizers, among them a perceptual one that compares the features of a network.

Shapes: B samples, C channels or classes, h x w pixels or positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fourm.utils.errors import UserError
from fourm.utils.options import Options, option
from fourm.vq.picture_network import PictureNetwork

Loss = Callable[[Tensor, Tensor], Tensor]


def cosine_1d(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 1 minus the cosine similarity over the channels of each position, (B, C, h, w) each → scalar."""
    return 1 - F.cosine_similarity(prediction, target, dim=1).mean()


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 1 minus the cosine similarity over the positions of each channel, (B, C, h, w) each → scalar."""
    return 1 - F.cosine_similarity(prediction.flatten(2), target.flatten(2), dim=2).mean()


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the loss of masks with values in [0, 1], (B, C, h, w) each → scalar; 0 for a perfect prediction."""
    return F.binary_cross_entropy_with_logits(logits, target)


def softmax_of_sigmoids(logits: Tensor, target: Tensor) -> Tensor:
    """Return the loss that the published SAM tokenizers were trained with under the name of a binary cross-entropy.

    The probabilities p and 1 - p go through another softmax, so that a perfect prediction still has a loss of 0.3133.
    """
    p, y = logits.sigmoid().flatten(), target.flatten()
    return F.cross_entropy(torch.stack([p, 1 - p], dim=1), torch.stack([y, 1 - y], dim=1))


LOSSES: dict[str, Loss] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cross_entropy": F.cross_entropy,
    "cosine_1d": cosine_1d,
    "cosine": cosine,
    "binary_cross_entropy": binary_cross_entropy,
    "softmax_of_sigmoids": softmax_of_sigmoids,
}


@dataclass(frozen=True, kw_only=True)
class LossOptions(Options):
    """Loss"""

    loss_fn: Literal[
        "mse", "l1", "smooth_l1", "cross_entropy", "cosine_1d", "cosine", "binary_cross_entropy", "softmax_of_sigmoids"
    ] = option(
        "reconstruction loss; softmax_of_sigmoids is the published formula of binary_cross_entropy", "mse", fixed=True
    )
    codebook_weight: float = option("weight of the quantizer's loss", 1.0, at_least=0, fixed=True)


@dataclass(frozen=True, kw_only=True)
class PerceptualOptions(Options):
    """Perceptual loss"""

    percept_loss_weight: float = option("weight of the perceptual loss; 0 = none", 0.0, at_least=0, fixed=True)
    percept_model: str = option("network of timm whose features are compared", "", fixed=True)
    percept_weights: str = option("file of its weights under timm's names (default: downloaded by timm)", "")
    percept_layers: str = option(
        "blocks whose features are compared, joined by '-'", "blocks.2-blocks.5-blocks.8-blocks.11", fixed=True
    )
    percept_loss_fn: Literal["cosine", "l1"] = option("how features are compared", "cosine", fixed=True)
    dtype_percept: Literal["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"] = option(
        "precision of the network", "fp16"
    )

    def check(self) -> None:
        if self.percept_loss_weight and not self.percept_model:
            raise UserError("'percept_loss_weight' is set, but 'percept_model' names no network of timm")
        self.blocks()

    def blocks(self) -> list[int]:
        """Return the indices in ``percept_layers``."""
        names = self.percept_layers.split("-")
        if not all(name.removeprefix("blocks.").isdigit() for name in names):
            raise UserError(
                "'percept_layers' must be like blocks.2-blocks.5, as vision transformers of timm name their blocks, "
                f"not {self.percept_layers!r}"
            )
        return [int(name.removeprefix("blocks.")) for name in names]


class PerceptualLoss(PictureNetwork):
    """The difference between the features of two pictures: a mean over samples, summed over blocks of the network.

    Args:
        network: A vision transformer of timm, with its weights.
        options: The blocks, and how their features are compared.

    Raises:
        UserError: The network has fewer blocks.
    """

    def __init__(self, network: Any, options: PerceptualOptions):
        super().__init__(network)
        self._blocks, self._l1 = options.blocks(), options.percept_loss_fn == "l1"
        if max(self._blocks) >= len(network.blocks):
            raise UserError(
                f"'percept_layers': {options.percept_model} has {len(network.blocks)} blocks, the last is "
                f"blocks.{len(network.blocks) - 1}"
            )
        precision = options.dtype_percept
        long = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
        self._dtype = getattr(torch, long.get(precision, precision))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compare pictures, (B, 3, h, w) in [-1, 1] each → scalar."""
        with torch.autocast(target.device.type, self._dtype, enabled=self._dtype != torch.float32):
            with torch.no_grad():
                target_features = self._features(target)
            features = self._features(prediction)
        total = prediction.new_zeros(())
        for own, other in zip(features, target_features, strict=True):  # (B, tokens, D)
            own, other = own.float(), other.float()
            if self._l1:
                difference = (F.normalize(own, dim=-1) - F.normalize(other, dim=-1)).abs().sum(-1).mean()
            else:
                difference = 1 - F.cosine_similarity(own, other, dim=-1).mean()
            total = total + difference
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        outputs = self.network.forward_intermediates(
            self.prepare(x),
            indices=self._blocks,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=True,
        )
        return [torch.cat([prefix, tokens], dim=1) for tokens, prefix in outputs]
