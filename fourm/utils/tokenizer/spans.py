"""A sequence ↔ what is kept of it and what is to be predicted (method section 5.5), and back again.

Every run of dropped tokens becomes one sentinel in the input. The target repeats each sentinel with the tokens that it
stands for, and ends with the next unused sentinel: ``a b c d`` without ``b c`` is ``a S1 d`` and ``S1 b c S2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spans(NamedTuple):
    """Attributes:
    inputs: ids that are kept, and sentinels.
    targets: sentinels, and ids that are dropped.
    starts: positions in ``targets`` where a span begins; with sentinels the closing one too.
    """

    inputs: np.ndarray
    targets: np.ndarray
    starts: np.ndarray


def run_starts(kept: np.ndarray) -> np.ndarray:
    """(…, L) bool → True at the first token of each run of dropped ones."""
    starts = ~kept
    starts[..., 1:] &= kept[..., :-1]
    return starts


def split_spans(ids: np.ndarray, kept: np.ndarray, sentinels: np.ndarray | None) -> Spans:
    """Input and target of a sequence.

    Args:
        ids: (L,) the sequence.
        kept: (L,) bool.
        sentinels: ids of the first, second, … sentinel, more than there are runs; None = spans are not marked.
    """
    first = run_starts(kept)
    dropped = ~kept
    if sentinels is None:
        return Spans(ids[kept], ids[dropped], np.flatnonzero(first[dropped]))
    run = first.cumsum()
    number = int(run[-1]) if len(run) else 0
    inputs = ids.copy()
    inputs[first] = sentinels[:number]
    at = run[dropped]
    at += np.arange(len(at))
    targets = np.empty(len(at) + number + 1, ids.dtype)
    targets[at] = ids[dropped]
    starts = np.full(number + 1, len(targets) - 1)
    starts[:-1] = at[first[dropped]] - 1
    targets[starts] = sentinels[: number + 1]
    return Spans(inputs[kept | first], targets, starts)


def merge_spans(inputs: Sequence[int], targets: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """The sequence that :func:`split_spans` split: each sentinel of ``inputs`` is replaced by its span in ``targets``.

    A sentinel without a span stays, so the result of a target that was cut is an input with fewer gaps.
    """
    marks = {int(mark) for mark in sentinels}
    spans: dict[int, list[int]] = {}
    current: list[int] = []  # what comes before any sentinel belongs nowhere
    for token in map(int, targets):
        if token in marks:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    merged: list[int] = []
    for token in map(int, inputs):
        merged += spans.get(token) or [token]
    return merged
