"""A sequence ↔ what is kept of it and what is to be predicted (method section 5.5), and back again.

Every run of dropped tokens becomes one sentinel in the input. The target repeats each sentinel with the tokens that it
stands for, and ends with the next unused sentinel: ``a b c d`` without ``b c`` is ``a S1 d`` and ``S1 b c S2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Spans(NamedTuple):
    """A sequence in two.

    Attributes:
        inputs: ids that are kept, and sentinels.
        targets: sentinels, and ids that are dropped.
        starts: positions in ``targets`` where a span begins; with sentinels the closing one too.
    """

    inputs: list[int]
    targets: list[int]
    starts: list[int]


def split_spans(ids: Sequence[int], kept: Sequence[bool], sentinels: Sequence[int] | None) -> Spans:
    """Input and target of a sequence.

    Args:
        ids: the sequence.
        kept: which of them are kept.
        sentinels: ids of the first, second, … sentinel, more than there are runs; None = spans are not marked.
    """
    spans = Spans([], [], [])
    inputs, targets, starts = spans

    def begin_span() -> None:
        starts.append(len(targets))
        if sentinels is not None:
            targets.append(sentinels[len(starts) - 1])

    after_kept = True
    # For sequences as short as these a loop is faster than arrays.
    for token, keep in zip(ids, kept, strict=True):
        if keep:
            inputs.append(token)
        else:
            if after_kept:
                begin_span()
                inputs += targets[starts[-1] :]
            targets.append(token)
        after_kept = keep
    if sentinels is not None:
        begin_span()
    return spans


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
