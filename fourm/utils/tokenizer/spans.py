"""Split a sequence into input and target by span masking, as in T5 (arXiv 1910.10683), and merge them again.

Each run of dropped tokens becomes one sentinel in the input. The target repeats each sentinel, followed by the tokens
that it replaces, and ends with the next unused sentinel: ``a b c d`` without ``b c`` becomes ``a S1 d``
and ``S1 b c S2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Spans(NamedTuple):
    """A sequence that has been split.

    Attributes:
        inputs: Ids of the kept tokens, and sentinels.
        targets: Sentinels, and ids of the dropped tokens.
        starts: Positions in ``targets`` where a span begins, including the closing sentinel if there are sentinels.
    """

    inputs: list[int]
    targets: list[int]
    starts: list[int]


def split_spans(ids: Sequence[int], kept: Sequence[bool], sentinels: Sequence[int] | None) -> Spans:
    """Split a sequence into input and target.

    Args:
        ids: Token ids of the sequence.
        kept: Whether each token is kept.
        sentinels: Ids of the first, second, … sentinel, at least one more than there are runs; None to not mark the
            spans.
    """
    spans = Spans([], [], [])
    inputs, targets, starts = spans

    def begin_span() -> None:
        starts.append(len(targets))
        if sentinels is not None:
            targets.append(sentinels[len(starts) - 1])

    after_kept = True
    # For such short sequences, a loop is faster than array operations.
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
    """Undo :func:`split_spans`: replace each sentinel of ``inputs`` by its span in ``targets``.

    A sentinel without a span is kept, so that merging a truncated target gives an input with fewer gaps.
    """
    sentinel_ids = {int(sentinel) for sentinel in sentinels}
    spans: dict[int, list[int]] = {}
    current: list[int] = []  # tokens before the first sentinel belong to no span and are discarded
    for token in map(int, targets):
        if token in sentinel_ids:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    merged: list[int] = []
    for token in map(int, inputs):
        merged += spans.get(token) or [token]
    return merged
