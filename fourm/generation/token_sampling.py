"""Samples tokens from logits, with top-k, top-p, temperature and random numbers that do not depend on the batch.

Shapes: B batch, n tokens, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourm.utils.errors import UserError

MIN_TEMPERATURE = 1e-9
"""Schedules end here instead of at 0; both take the most likely token."""

Seed = int | Sequence[int] | torch.Generator | None


def sample_seeds(seed: Seed, batch_size: int) -> list[int]:
    """Return one seed for each sample.

    Args:
        seed: A number, from which sample b gets ``seed + b``, one seed per sample, or a generator that draws the seeds.
            None uses PyTorch's global generator.
        batch_size: Number of samples.

    Raises:
        UserError: If the number of seeds is not ``batch_size``.
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
    """One stream of random numbers per sample, so that samples do not depend on the rest of the batch."""

    def __init__(self, seeds: Sequence[int]):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers (B, *shape) in [0, 1), on the host."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self._generators])


@dataclass(frozen=True)
class TokenSampler:
    """Samples tokens from the most likely ones.

    Attributes:
        top_k: Number of most likely tokens (int), or their fraction of the vocabulary (float); 0 = all.
        top_p: Total probability that the most likely tokens must reach; 0 = all.

    Raises:
        UserError: If a value is out of range.
    """

    top_k: int | float = 0.0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.top_k >= 0 or (isinstance(self.top_k, float) and self.top_k > 1):
            raise UserError(f"top_k must be a count (int) or a fraction of the vocabulary (float), not {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p must lie between 0 and 1, not {self.top_p}")

    def __call__(self, logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a token for each row.

        Args:
            logits: Logits, (n, V), without gradients. Those in float32 are overwritten, because allocating another
                matrix of this size takes as long as the softmax.
            temperature: Temperature; 0 takes the most likely token.
            uniform: Random numbers in [0, 1) that determine the tokens, (n,).

        Returns:
            The ids and their probabilities, (n,) each.
        """
        logits = logits.float()
        if temperature <= MIN_TEMPERATURE:
            ids = _argmax(logits)
            return ids, torch.softmax(logits, -1, out=logits).gather(-1, ids[:, None])[:, 0]
        logits = self.filter(logits).div_(temperature)
        probabilities = torch.softmax(logits, -1, out=logits)
        ends = probabilities.cumsum(-1)
        # Take the first token whose share of [0, 1) ends beyond the number; tokens of probability 0 are never drawn.
        ids = torch.searchsorted(ends, uniform[:, None] * ends[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
        return ids[:, 0], probabilities.gather(-1, ids)[:, 0]

    def filter(self, logits: Tensor) -> Tensor:
        """Set the logits (n, V) of tokens that must not be drawn to −∞."""
        if self.top_k:
            count = self.top_k if isinstance(self.top_k, int) else max(int(self.top_k * logits.shape[-1]), 1)
            threshold = logits.topk(min(count, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        if self.top_p:
            ordered, order = logits.sort(descending=True)
            preceding = ordered.softmax(-1).cumsum(-1).roll(1, -1)  # total probability of the more likely tokens
            preceding[:, 0] = 0.0
            logits = logits.scatter(-1, order, ordered.masked_fill(preceding > self.top_p, -torch.inf))
        return logits


_GROUP = 128  # columns; the largest of a vocabulary of 16 384 ids is then the largest of 128 groups


def _argmax(values: Tensor) -> Tensor:
    """Return the first column of each row that has its maximum, (n, V) → (n,).

    On a CPU, ``Tensor.argmax`` takes ten times as long as ``Tensor.amax``, and is therefore used only to choose a group
    of columns, and then one of its columns.
    """
    if values.device.type != "cpu" or values.shape[-1] % _GROUP:
        return values.argmax(-1)
    groups = values.unflatten(-1, (-1, _GROUP))
    group = groups.amax(-1).argmax(-1)
    row = torch.arange(len(values), device=values.device)
    return group * _GROUP + groups[row, group].argmax(-1)
