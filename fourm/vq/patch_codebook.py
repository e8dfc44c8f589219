"""The simplest tokenizer: each patch of an image gets the id of the nearest patch in a codebook."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from fourm.utils.errors import DataError
from fourm.vq.codebook import Codebook
from fourm.vq.kmeans import KMeansReport
from fourm.vq.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class PatchCodebookConfig(TokenizerConfig):
    """The configuration of a patch codebook.

    Attributes:
        one_hot_classes: The number of classes of maps of class ids (1 channel), whose patches are compared by the
            classes of their pixels and decoded to the most likely class of each pixel; None for other images.
    """

    one_hot_classes: int | None = None


class PatchCodebook(Codebook):
    """Vector quantization of raw patches, with D = channels (or classes) * patch * patch."""

    kind = "patch_codebook"
    Config = PatchCodebookConfig
    config: PatchCodebookConfig

    def __init__(self, config: PatchCodebookConfig):
        super().__init__(config, (config.one_hot_classes or config.num_channels) * config.patch_size**2)

    def items(self, x: Tensor) -> Tensor:
        return self.to_patches(x)

    @torch.no_grad()
    def decode_tokens(self, ids: Tensor) -> Tensor:
        patches = self.codebook[ids]  # (B, h, w, D)
        x = rearrange(patches, "b h w (c p q) -> b c (h p) (w q)", p=self.patch_size, q=self.patch_size)
        return x.argmax(1, keepdim=True).float() if self.config.one_hot_classes else x

    def embed(self, items: Tensor) -> Tensor:
        """Embed patches, (n, C, p, p) → (n, D).

        Raises:
            DataError: A class id is not below ``one_hot_classes``.
        """
        classes = self.config.one_hot_classes
        if classes is None:
            return super().embed(items)
        ids = items.long()
        if ids.min() < 0 or ids.max() >= classes:
            wrong = ids[(ids < 0) | (ids >= classes)][0]
            raise DataError(f"class id {wrong} of {self.config.modality} is not below one_hot_classes = {classes}")
        # (n, classes, p, p)
        return torch.zeros(len(ids), classes, *ids.shape[2:], device=ids.device).scatter_(1, ids, 1.0).flatten(1)

    def fit(self, pool: Tensor, *, epochs: int, generator: torch.Generator) -> KMeansReport:
        self.config = replace(self.config, value_range=(float(pool.min()), float(pool.max())))
        self.info = self.config
        return super().fit(pool, epochs=epochs, generator=generator)
