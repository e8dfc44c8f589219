"""Vector quantisation by k-means: every place of a grid gets the number of the most similar vector in a codebook."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fourm.vq import kmeans
from fourm.vq.tokenizer import ImageTokenizer, TokenizerConfig

_CHUNK = 2**14  # items embedded at a time


class Codebook(ImageTokenizer):
    """What patches and features have in common. A subclass says what the items of an image are and how they compare.

    Args:
        depth: D, numbers that an item is compared by.
    """

    codebook: Tensor  # (K, D)

    def __init__(self, config: TokenizerConfig, depth: int):
        super().__init__(config)
        self.register_buffer("codebook", torch.zeros(config.vocab_size, depth))

    @abstractmethod
    def items(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, h, w, …), what becomes a token each."""

    def embed(self, items: Tensor) -> Tensor:
        """Items (n, …) → vectors (n, D)."""
        return items.flatten(1)

    @torch.no_grad()
    def tokenize(self, x: Tensor) -> Tensor:
        items = self.items(x)
        chunks = items.flatten(0, 2).split(_CHUNK)
        ids = torch.cat([kmeans.nearest(self.embed(chunk), self.codebook)[0] for chunk in chunks])
        return ids.view(items.shape[:3])

    def fit(self, pool: Tensor, *, epochs: int, generator: torch.Generator) -> kmeans.KMeansReport:
        """Learn the codebook from items (N, …)."""
        self.codebook, report = kmeans.fit(pool, self.vocab_size, epochs=epochs, generator=generator, embed=self.embed)
        return report
