"""Whatever the sample and the budgets are, a masked sample is well formed and loses nothing."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fourm.data.masking import Budgets, UnifiedMasking
from fourm.data.span_masking import padded
from fourm.utils.tokenizer import TextEncoder, merge_spans
from tests.data.dataset_files import text_tokenizer

ENCODE = TextEncoder(text_tokenizer())
TEXT = st.lists(st.sampled_from([f"s{i}" for i in range(30)] + ["v0=1", "other"]), max_size=25).map(" ".join)
SEEDS = st.integers(0, 2**32)
KEEP = st.sampled_from(["random", "all", "binary"])


def mask(value, n_in, n_out, seed, **fields):
    info = {"m": {"input_alphas": [1.0], "target_alphas": [1.0]} | fields}
    masking = UnifiedMasking(info, ENCODE._tokenizer, n_in, n_out)
    return masking.apply({"m": value}, Budgets({"m": n_in}, {"m": n_out}, 0), np.random.default_rng(seed))["m"]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), SEEDS)
def test_images(length, n_in, n_out, seed):
    n_in = min(n_in, length)
    n_out = min(n_out, length - n_in)
    entry = mask(np.arange(length), n_in, n_out, seed, type="img", max_tokens=length, vocab_size=length)
    seen, asked = ~entry["input_mask"], ~entry["target_mask"]
    assert (seen.sum(), asked.sum()) == (n_in, n_out) and not (seen & asked).any()
    attention = entry["decoder_attention_mask"]
    assert attention.sum() == n_out and attention[asked.argmax()] == n_out


def check_row(row, max_tokens, n_in, n_out):
    """Sizes of a sequence's row; returns its inputs and targets."""
    assert all(len(array) == (max_tokens + 1) * 2 for array in row.values())
    seen, asked = ~row["input_mask"], ~row["target_mask"]
    assert not (seen & asked).any() and seen.sum() <= n_in and asked.sum() <= n_out
    assert seen[: seen.sum()].all() and asked[n_in : n_in + asked.sum()].all()
    assert (row["decoder_attention_mask"] == asked).all()
    assert not row["tensor"][~seen & ~asked].any()
    return row["tensor"][seen].tolist(), row["tensor"][asked].tolist()


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(TEXT, st.lists(TEXT, max_size=6)), st.integers(1, 30), st.integers(0, 30), st.integers(0, 30), KEEP, SEEDS
)
def test_text(value, max_tokens, n_in, n_out, keep, seed):
    n_in, n_out = min(n_in, max_tokens), min(n_out, max_tokens)
    row = mask(value, n_in, n_out, seed, type="seq", max_tokens=max_tokens, keep=[keep])
    inputs, targets = check_row(row, max_tokens, n_in, n_out)
    marks = ENCODE.sentinels
    if targets:
        assert targets[0] in marks
    if isinstance(value, str):
        whole = [*ENCODE(value), ENCODE.eos_id][:max_tokens]
    else:
        whole, room = [], max_tokens - 1
        for ids in map(ENCODE, value):
            if len(ids) <= room:
                whole += ids
                room -= len(ids)
        whole.append(ENCODE.eos_id)
    # What is not in the input is in the target, unless that was cut.
    used = [token for token in inputs if token in marks]
    assert used == marks[: len(used)]
    if n_in and targets and targets[0] == marks[0] and targets[-1] == marks[len(used)]:
        assert merge_spans(inputs, targets, marks) == whole
    if not n_in and len(whole) + 2 <= n_out:
        assert targets == [marks[0], *whole, marks[1]]
    # A cut target is a part of what the sentinels stand for.
    position = 0
    for token in targets:
        if token not in marks:
            position = whole.index(token, position) + 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 19), max_size=20),
    st.integers(1, 15),
    st.integers(0, 15),
    st.integers(0, 15),
    KEEP,
    SEEDS,
    st.sampled_from([0, 13, 14, 50]),
)
def test_codes(codes, max_tokens, n_in, n_out, keep, seed, offset):
    n_in, n_out = min(n_in, max_tokens), min(n_out, max_tokens)
    value = np.array(codes, np.int16)
    fields = {"type": "seq_token", "max_tokens": max_tokens, "vocab_size": 20 + offset, "vocab_offset": offset}
    row = mask(value, n_in, n_out, seed, keep=[keep], **fields)
    inputs, targets = check_row(row, max_tokens, n_in, n_out)
    assert all(0 <= token < 20 + offset for token in inputs + targets)
    if offset >= 14:  # sentinels up to 13
        assert not targets or targets[0] < offset
    shown = {token - offset for token in inputs + targets if token >= offset}
    assert shown <= set(codes)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 20), st.integers(1, 15), st.integers(0, 15), KEEP, SEEDS)
def test_vectors(rows, max_tokens, n_in, keep, seed):
    n_in = min(n_in, max_tokens)
    value = np.arange(1, rows * 2 + 1, dtype=np.float32).reshape(rows, 2)
    row = mask(value, n_in, 0, seed, type="seq_emb", max_tokens=max_tokens, keep=[keep])
    row["tensor"] = padded(row["tensor"], len(row["input_mask"]))
    inputs, _ = check_row(row, max_tokens, n_in, 0)
    kept = [vector for vector in inputs if any(vector)]
    assert all(vector in value[:max_tokens].tolist() for vector in kept) and kept == sorted(kept)
    assert not any(not any(a) and not any(b) for a, b in zip(inputs, inputs[1:]))  # noqa: B905
