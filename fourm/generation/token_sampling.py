"""From logits to tokens: top-k, top-p, temperature, and randomness that belongs to a sample, not to its batch.

Shapes: B batch, n tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourm.utils.errors import UserError

LOWEST_TEMPERATURE = 1e-9
"""A schedule ends here rather than at 0, and means the same."""

Seed = int | Sequence[int] | torch.Generator | None


def sample_seeds(seed: Seed, batch_size: int) -> list[int]:
    """A seed for every sample.

    Args:
        seed: sample b gets ``seed + b``; or one seed per sample; or a generator to draw them from (None: torch's).
    """
    if isinstance(seed, int):
        return [seed + b for b in range(batch_size)]
    if seed is None or isinstance(seed, torch.Generator):
        device = "cpu" if seed is None else seed.device
        return torch.randint(2**62, (batch_size,), generator=seed, device=device).tolist()
    if len(seed) != batch_size:
        raise UserError(f"seed: {len(seed)} seeds for a batch of {batch_size}; give one number, or one per sample")
    return [int(value) for value in seed]


class SampleNoise:
    """One stream of random numbers for every sample, so that no sample depends on its neighbours."""

    def __init__(self, seeds: Sequence[int]):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) in [0, 1), on the host."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self._generators])


@dataclass(frozen=True)
class TokenSampler:
    """Which tokens may be drawn.

    Attributes:
        top_k: the likeliest ones, as a count (int) or as a fraction of the vocabulary (float); 0 = all.
        top_p: the fewest likeliest ones that have this probability together; 0 = all.
    """

    top_k: int | float = 0.0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.top_k >= 0 or (isinstance(self.top_k, float) and self.top_k > 1):
            raise UserError(f"top_k is a count (int) or a fraction of the vocabulary (float), not {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p must lie between 0 and 1, not {self.top_p}")

    def __call__(self, logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a token for each row.

        Args:
            logits: (n, V).
            temperature: 0 = the likeliest token.
            uniform: (n,) numbers in [0, 1) that decide.

        Returns:
            The ids and their probabilities, (n,) each.
        """
        logits = logits.float()
        if temperature <= LOWEST_TEMPERATURE:
            confidence, ids = logits.max(-1)
            return ids, (confidence - logits.logsumexp(-1)).exp()
        probabilities = (self.filter(logits) / temperature).softmax(-1)
        ends = probabilities.cumsum(-1)
        # The first token whose share of [0, 1) ends beyond the number: one without probability never is.
        ids = torch.searchsorted(ends, uniform[:, None] * ends[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
        return ids[:, 0], probabilities.gather(-1, ids)[:, 0]

    def filter(self, logits: Tensor) -> Tensor:
        """Logits (n, V) with −∞ for what may not be drawn."""
        if self.top_k:
            count = self.top_k if isinstance(self.top_k, int) else max(int(self.top_k * logits.shape[-1]), 1)
            least = logits.topk(min(count, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p:
            ordered, order = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
            before[:, 0] = 0.0
            logits = logits.scatter(-1, order, ordered.masked_fill(before > self.top_p, -torch.inf))
        return logits
