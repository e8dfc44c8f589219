"""Choose the kept tokens of a sequence, and build the row that input and target share.

Shapes: n tokens of the sequence, u units that are kept or dropped as a whole (tokens or chunks), L = (max_tokens +
    1)·2.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fourm.utils.tokenizer.spans import Spans

KEEP_SCHEMES = ("random", "all", "binary")

_SHRINK = 0.9
_DRAWS_AT_ONCE = 16  # several attempts are drawn together, which costs little more than one
_POWERS = _SHRINK ** np.arange(_DRAWS_AT_ONCE)[:, None]


def keep_probability(scheme: str, generator: np.random.Generator) -> float:
    """Draw the probability with which each unit of this sample is kept."""
    if scheme == "all":
        return 1.0
    return float(generator.random()) if scheme == "random" else float(generator.integers(2))


def draw_kept(lengths: np.ndarray, probability: float, budget: int, generator: np.random.Generator) -> np.ndarray:
    """Keep each unit with ``probability``; while the input exceeds its budget, lower the probability and draw again.

    Args:
        lengths: Tokens of each unit, (u,).
        probability: Initial probability of keeping a unit.
        budget: Maximum tokens of the input, where each run of dropped units counts as one; 0 keeps nothing.
        generator: Source of randomness.

    Returns:
        Whether each token is kept, (n,) bool.
    """
    if budget == 0 or probability == 0:
        return np.zeros(int(lengths.sum()), bool)
    while True:
        kept = generator.random((_DRAWS_AT_ONCE, len(lengths))) < probability * _POWERS
        fits = kept @ lengths + run_starts(kept).sum(1) <= budget
        first = fits.argmax()
        if fits[first]:
            return kept[first].repeat(lengths)
        probability *= _SHRINK**_DRAWS_AT_ONCE


def run_starts(kept: np.ndarray) -> np.ndarray:
    """Return True at the first unit of each run of dropped units; both arrays are (…, u) bool."""
    starts = ~kept
    starts[..., 1:] &= kept[..., :-1]
    return starts


def cut_target(spans: Spans, budget: int, generator: np.random.Generator) -> list[int]:
    """Return the targets; if they exceed the budget, a part of them that begins with a random span."""
    targets, starts = spans.targets, spans.starts
    if len(targets) <= budget:
        return targets
    start = starts[generator.integers(max(len(starts) - 1, 1))]  # the last one only marks the end
    if len(targets) - start < budget:
        start = starts[bisect_left(starts, len(targets) - budget)]
    return targets[start : start + budget]


@lru_cache(maxsize=1024)
def _masked_rows(length: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((2, length), bool), np.zeros(length, np.int32)


def masked_row(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return new masks of inputs and targets, and the attention of the decoder, of a row without tokens, (length,)."""
    masks, attention = _masked_rows(length)  # copying is faster than filling
    input_mask, target_mask = masks.copy()
    return input_mask, target_mask, attention.copy()


def sequence_row(
    inputs: Sequence[int] | np.ndarray, targets: Sequence[int], input_budget: int, max_tokens: int
) -> dict[str, np.ndarray]:
    """Place inputs at 0 and targets at ``input_budget`` in rows of length L; vectors are only inputs and not padded."""
    length = (max_tokens + 1) * 2
    end, target = len(inputs), slice(input_budget, input_budget + len(targets))
    input_mask, target_mask, attention = masked_row(length)
    tensor = inputs
    if not isinstance(tensor, np.ndarray):
        tensor = np.zeros(length, np.int64)
        tensor[target] = targets
        tensor[:end] = inputs
    input_mask[:end] = False
    target_mask[target] = False
    attention[target] = 1
    return {
        "tensor": tensor,
        "input_mask": input_mask,
        "target_mask": target_mask,
        "decoder_attention_mask": attention,
    }


def padded(vectors: np.ndarray, length: int) -> np.ndarray:
    """Pad vectors (n, D) with zeros to (length, D)."""
    out = np.zeros((length, *vectors.shape[1:]), vectors.dtype)
    out[: len(vectors)] = vectors
    return out
