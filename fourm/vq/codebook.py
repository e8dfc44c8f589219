"""Vector quantization by k-means: each position of a grid gets the id of the nearest vector in a codebook."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fourm.vq import kmeans
from fourm.vq.tokenizer import ImageTokenizer, TokenizerConfig

_CHUNK = 2**14  # items embedded at a time


class Codebook(ImageTokenizer):
    """The base class of codebooks. A subclass defines the items of an image, and how they are embedded for comparison.

    Args:
        config: The configuration of the tokenizer.
        depth: D, the dimension of an embedded item.
    """

    codebook: Tensor  # (K, D)

    def __init__(self, config: TokenizerConfig, depth: int):
        super().__init__(config)
        self.register_buffer("codebook", torch.zeros(config.vocab_size, depth))

    @abstractmethod
    def items(self, x: Tensor) -> Tensor:
        """Return the items of images, (B, C, H, W) → (B, h, w, …); each becomes a token."""

    def embed(self, items: Tensor) -> Tensor:
        """Embed items, (n, …) → vectors (n, D)."""
        return items.flatten(1)

    @torch.no_grad()
    def tokenize(self, x: Tensor) -> Tensor:
        items = self.items(x)
        chunks = items.flatten(0, 2).split(_CHUNK)
        ids = torch.cat([kmeans.nearest(self.embed(chunk), self.codebook)[0] for chunk in chunks])
        return ids.view(items.shape[:3])

    def fit(self, pool: Tensor, *, epochs: int, generator: torch.Generator) -> kmeans.KMeansReport:
        """Fit the codebook to items (N, …)."""
        self.codebook, report = kmeans.fit(pool, self.vocab_size, epochs=epochs, generator=generator, embed=self.embed)
        return report
