"""Which tokens of a sequence are kept, and the row that input and target share (method section 5.5).

Shapes: n tokens of the sequence, u units that are kept or dropped as a whole (tokens or chunks), L = (max_tokens + 1)·2.
"""

from __future__ import annotations

import numpy as np

from fourm.utils.tokenizer.spans import Spans, run_starts

KEEP_SCHEMES = ("random", "all", "binary")

_SHRINK = 0.9
_AT_ONCE = 16  # attempts that are drawn together, which costs little more than one
_POWERS = _SHRINK ** np.arange(_AT_ONCE)[:, None]


def keep_probability(scheme: str, generator: np.random.Generator) -> float:
    """With which probability each unit of this sample is kept."""
    if scheme == "all":
        return 1.0
    return float(generator.random()) if scheme == "random" else float(generator.integers(2))


def draw_kept(lengths: np.ndarray, probability: float, budget: int, generator: np.random.Generator) -> np.ndarray:
    """Keep each unit with ``probability``; while the input is over its budget, lower the probability and draw again.

    Args:
        lengths: (u,) tokens of each unit.
        probability: of keeping a unit, at first.
        budget: most tokens of the input, where each run of dropped units counts as one; 0 keeps nothing.

    Returns:
        (n,) bool, per token.
    """
    if budget == 0 or probability == 0:
        return np.zeros(int(lengths.sum()), bool)
    while True:
        kept = generator.random((_AT_ONCE, len(lengths))) < probability * _POWERS
        fits = kept @ lengths + run_starts(kept).sum(1) <= budget
        first = fits.argmax()
        if fits[first]:
            return kept[first].repeat(lengths)
        probability *= _SHRINK**_AT_ONCE


def cut_target(spans: Spans, budget: int, generator: np.random.Generator) -> np.ndarray:
    """The targets; of those over budget a part that begins with a random span."""
    targets, starts = spans.targets, spans.starts
    if len(targets) <= budget:
        return targets
    start = starts[generator.integers(max(len(starts) - 1, 1))]  # the last one only closes
    if len(targets) - start < budget:
        start = starts[starts.searchsorted(len(targets) - budget)]
    return targets[start : start + budget]


def sequence_row(inputs: np.ndarray, targets: np.ndarray, input_budget: int, max_tokens: int) -> dict[str, np.ndarray]:
    """Inputs from 0 and targets from ``input_budget``, in rows of length L; ids or vectors."""
    length = (max_tokens + 1) * 2
    end, target = len(inputs), slice(input_budget, input_budget + len(targets))
    row = {
        "tensor": np.zeros((length, *inputs.shape[1:]), inputs.dtype),
        "input_mask": np.ones(length, bool),
        "target_mask": np.ones(length, bool),
        "decoder_attention_mask": np.zeros(length, np.int32),
    }
    row["tensor"][:end] = inputs
    row["tensor"][target] = targets
    row["input_mask"][:end] = False
    row["target_mask"][target] = False
    row["decoder_attention_mask"][target] = 1
    return row
