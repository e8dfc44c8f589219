"""What a reconstruction is compared by: losses of tokenizers, and a perceptual one that compares what a network sees.

Shapes: B samples, C channels (or classes), h x w places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourm.utils.errors import UserError
from fourm.utils.options import Options, option

Loss = Callable[[Tensor, Tensor], Tensor]


def cosine_1d(prediction: Tensor, target: Tensor) -> Tensor:
    """1 minus the cosine between the channels of each place, (B, C, h, w) twice → scalar."""
    return 1 - F.cosine_similarity(prediction, target, dim=1).mean()


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """1 minus the cosine between the places of each channel, (B, C, h, w) twice → scalar."""
    return 1 - F.cosine_similarity(prediction.flatten(2), target.flatten(2), dim=2).mean()


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of masks with values in [0, 1], (B, C, h, w) twice → scalar; 0 for a perfect prediction."""
    return F.binary_cross_entropy_with_logits(logits, target)


def softmax_of_sigmoids(logits: Tensor, target: Tensor) -> Tensor:
    """The formula that published SAM tokenizers were trained with in place of a binary cross-entropy.

    The probabilities p and 1 - p go through a softmax once more, so that a perfect prediction still has a loss of 0.3133.
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
    percept_model: str = option("network of timm that looks at both pictures", "", fixed=True)
    percept_weights: str = option("file of its weights under timm's names (default: those of timm)", "")
    percept_layers: str = option(
        "its blocks that are compared, joined by '-'", "blocks.2-blocks.5-blocks.8-blocks.11", fixed=True
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
        """The indices in ``percept_layers``."""
        names = self.percept_layers.split("-")
        if not all(name.removeprefix("blocks.").isdigit() for name in names):
            raise UserError(
                f"'percept_layers' must be like blocks.2-blocks.5, not {self.percept_layers!r}: vision transformers of timm "
                "call their blocks so"
            )
        return [int(name.removeprefix("blocks.")) for name in names]


class PerceptualLoss(nn.Module):
    """How differently a vision transformer sees two pictures: a mean over samples, summed over some of its blocks.

    Pictures in [-1, 1] are standardised as the network expects them and resized to its size.

    Args:
        network: Of timm, with its weights.
    """

    mean: Tensor  # (3, 1, 1), as std
    std: Tensor

    def __init__(self, network: Any, options: PerceptualOptions):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._blocks, self._l1 = options.blocks(), options.percept_loss_fn == "l1"
        if max(self._blocks) >= len(network.blocks):
            raise UserError(
                f"'percept_layers': {options.percept_model} has {len(network.blocks)} blocks, the last is "
                f"blocks.{len(network.blocks) - 1}"
            )
        precision = options.dtype_percept
        long = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
        self._dtype = getattr(torch, long.get(precision, precision))
        self._size = network.pretrained_cfg["input_size"][-1]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1] twice → scalar."""
        with torch.autocast(target.device.type, self._dtype, enabled=self._dtype != torch.float32):
            with torch.no_grad():
                wanted = self._features(target)
            seen = self._features(prediction)
        total = prediction.new_zeros(())
        for one, other in zip(seen, wanted, strict=True):  # (B, tokens, D)
            one, other = one.float(), other.float()
            if self._l1:
                difference = (F.normalize(one, dim=-1) - F.normalize(other, dim=-1)).abs().sum(-1).mean()
            else:
                difference = 1 - F.cosine_similarity(one, other, dim=-1).mean()
            total = total + difference
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        x = ((x.float() + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x, (self._size, self._size), mode="bilinear", antialias=True)
        outputs = self.network.forward_intermediates(
            x, indices=self._blocks, norm=False, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
        return [torch.cat([prefix, tokens], dim=1) for tokens, prefix in outputs]
