"""Masking of a sample: every rule of the method, and what callers rely on."""

import numpy as np
import pytest

from fourm.data.masking import Budgets, UnifiedMasking
from fourm.data.span_masking import cut_target, draw_kept, keep_probability, padded
from fourm.utils.errors import DataError, UserError
from fourm.utils.tokenizer import merge_spans, split_spans
from tests.data.dataset_files import text_tokenizer

TOKENIZER = text_tokenizer()
EOS = 3
SENTINELS = [4 + i for i in range(1, 200)]

INFO = {
    "rgb@32": {"type": "img", "max_tokens": 4},
    "tok_rgb@32": {"type": "img", "max_tokens": 4, "vocab_size": 10},
    "caption": {"type": "seq", "max_tokens": 20, "vocab_size": 5000},
    "codes": {"type": "seq_token", "max_tokens": 12, "vocab_size": 40, "vocab_offset": 30},
    "t5_caption": {"type": "seq_emb", "max_tokens": 5},
}
SAMPLE = {
    "rgb@32": np.zeros((3, 32, 32), np.float32),
    "tok_rgb@32": np.arange(4, dtype=np.int16).reshape(2, 2),
    "caption": " ".join(f"s{i}" for i in range(10)),
    "codes": np.array([0, 9, 3, 3, 1]),
    "t5_caption": np.arange(1, 13, dtype=np.float16).reshape(4, 3),
}


def masking(info=INFO, tokenizer=TOKENIZER, inputs=10, targets=10, **options):
    filled = {name: {"input_alphas": [1.0], "target_alphas": [1.0]} | entry for name, entry in info.items()}
    return UnifiedMasking(filled, tokenizer, inputs, targets, **options)


_MASKINGS = {}


def one(name, value, n_in, n_out, seed=0, component=0, **fields):
    """One modality with fixed budgets."""
    budgets = Budgets({name: n_in}, {name: n_out}, component)
    key = f"{name} {fields}"
    if key not in _MASKINGS:  # building one takes ten times as long as masking a sample
        _MASKINGS[key] = masking({name: INFO[name] | fields})
    return _MASKINGS[key].apply({name: value}, budgets, np.random.default_rng(seed))[name]


def parts(row):
    """(inputs, targets) of a sequence's row."""
    tensor = padded(row["tensor"], len(row["input_mask"]))
    return tensor[~row["input_mask"]], tensor[~row["target_mask"]]


def ids(text):
    return [*TOKENIZER.encode(text).ids, EOS]


def test_shapes_and_types_of_every_kind():
    masked = masking(inputs=(5, 20), targets=(5, 20))(SAMPLE | {"other": 1}, np.random.default_rng(0))
    assert list(masked) == list(INFO)
    lengths = {"rgb@32": 4, "tok_rgb@32": 4, "caption": 42, "codes": 26, "t5_caption": 12}
    for name, entry in masked.items():
        assert list(entry) == ["tensor", "input_mask", "target_mask", "decoder_attention_mask"]
        for key, dtype in (("input_mask", bool), ("target_mask", bool), ("decoder_attention_mask", np.int32)):
            assert entry[key].shape == (lengths[name],) and entry[key].dtype == dtype
    assert masked["rgb@32"]["tensor"].shape == (3, 32, 32) and masked["rgb@32"]["tensor"].dtype == np.float32
    assert masked["tok_rgb@32"]["tensor"].shape == (2, 2) and masked["tok_rgb@32"]["tensor"].dtype == np.int64
    assert masked["t5_caption"]["tensor"].shape == (12, 3) and masked["t5_caption"]["tensor"].dtype == np.float32
    for name in ("caption", "codes"):
        assert masked[name]["tensor"].shape == (lengths[name],) and masked[name]["tensor"].dtype == np.int64
    assert masked["t5_caption"]["target_mask"].all() and not masked["t5_caption"]["decoder_attention_mask"].any()


def test_only_modalities_of_the_sample_are_masked():
    assert list(masking()({"codes": SAMPLE["codes"]}, np.random.default_rng(0))) == ["codes"]


def test_a_generator_decides_everything():
    mask = masking()
    first, again, other = (mask(SAMPLE, np.random.default_rng(seed)) for seed in (1, 1, 2))
    same = lambda a, b: all((a[m][k] == b[m][k]).all() for m in a for k in a[m])  # noqa: E731
    assert same(first, again) and not same(first, other)
    assert not same(mask(SAMPLE), mask(SAMPLE))  # without one, always anew


def test_image_input_and_target_are_parts_of_one_permutation():
    inputs, targets = np.zeros(4), np.zeros(4)
    for seed in range(2000):
        entry = one("tok_rgb@32", SAMPLE["tok_rgb@32"], 1, 2, seed)
        seen, asked = ~entry["input_mask"], ~entry["target_mask"]
        assert seen.sum() == 1 and asked.sum() == 2 and not (seen & asked).any()
        assert entry["decoder_attention_mask"].tolist() == [2 * (i == asked.argmax()) for i in range(4)]
        inputs += seen
        targets += asked
    assert np.abs(inputs / 2000 - 0.25).max() < 0.04 and np.abs(targets / 2000 - 0.5).max() < 0.04


def test_image_without_budget_is_masked():
    entry = one("rgb@32", SAMPLE["rgb@32"], 0, 0)
    assert entry["input_mask"].all() and entry["target_mask"].all() and not entry["decoder_attention_mask"].any()


def test_caption_spans_merge_back_to_the_text():
    for seed in range(50):
        row = one("caption", SAMPLE["caption"], 20, 20, seed)
        inputs, targets = parts(row)
        assert merge_spans(inputs, targets, SENTINELS) == ids(SAMPLE["caption"])
        used = [i for i in inputs if i in SENTINELS]
        assert used == SENTINELS[: len(used)]
        assert [i for i in targets if i in SENTINELS] == SENTINELS[: len(used) + 1]
        assert targets[0] == SENTINELS[0] and targets[-1] == SENTINELS[len(used)]
        assert not row["input_mask"][: len(inputs)].any() and not row["target_mask"][20 : 20 + len(targets)].any()
        assert (row["decoder_attention_mask"] == ~row["target_mask"]).all()
        assert not row["tensor"][row["input_mask"] & row["target_mask"]].any()


def test_text_is_closed_and_cut_to_max_tokens():
    inputs, _ = parts(one("caption", "dog sample", 20, 0, keep=["all"]))
    assert inputs.tolist() == ids("dog sample")
    inputs, _ = parts(one("caption", SAMPLE["caption"], 3, 0, keep=["all"], max_tokens=3))
    assert inputs.tolist() == ids(SAMPLE["caption"])[:3]


def test_empty_text_is_an_end_alone():
    assert parts(one("caption", "", 5, 5, keep=["all"]))[0].tolist() == [EOS]


def test_input_budget_0_asks_for_everything():
    row = one("caption", SAMPLE["caption"], 0, 20, keep=["all"])
    assert row["input_mask"].all()
    assert parts(row)[1].tolist() == [SENTINELS[0], *ids(SAMPLE["caption"]), SENTINELS[1]]
    assert not row["target_mask"][0]


def test_keep_schemes():
    def kept(scheme, samples):
        shares = []
        for seed in range(samples):
            inputs, _ = parts(one("caption", SAMPLE["caption"], 20, 0, seed, keep=[scheme]))
            shares.append(sum(i not in SENTINELS for i in inputs) / 11)
        return np.array(shares)

    assert (kept("all", 50) == 1).all()
    binary = kept("binary", 1000)
    assert set(binary) == {0.0, 1.0} and abs(binary.mean() - 0.5) < 0.04
    # With a uniform probability, every number of kept tokens out of 11 is equally likely.
    counts = np.bincount((kept("random", 1500) * 11).round().astype(int), minlength=12)
    assert np.abs(counts / 1500 - 1 / 12).max() < 0.025


def test_keep_belongs_to_the_component():
    fields = {"keep": ["all", "binary"], "input_alphas": [1.0, 1.0], "target_alphas": [1.0, 1.0]}
    lengths = {c: {len(parts(one("caption", "dog", 5, 0, s, c, **fields))[0]) for s in range(20)} for c in (0, 1)}
    assert lengths == {0: {2}, 1: {1, 2}}


def test_probability_shrinks_by_a_tenth_until_the_input_fits():
    # Of three tokens at most 2 may stay, gaps included; the expected shares follow from p = 1, 0.9, 0.81, …
    rng = np.random.default_rng(0)
    three = np.ones(3, int)
    found = np.array([draw_kept(three, 1.0, 2, rng) for _ in range(20_000)])
    p, left, law = 1.0, 1.0, {}
    for _ in range(200):
        for pattern in [(0, 0, 0), (1, 0, 0), (0, 0, 1)]:
            kept = sum(pattern)
            law[pattern] = law.get(pattern, 0) + left * p**kept * (1 - p) ** (3 - kept)
        left *= 1 - (1 - p) ** 3 - 2 * p * (1 - p) ** 2
        p *= 0.9
    assert set(map(tuple, found.astype(int).tolist())) == set(law)
    for pattern, probability in law.items():
        assert abs((found == np.array(pattern, bool)).all(1).mean() - probability) < 0.012


def test_a_long_text_fits_into_one_token():
    class Limited(np.random.Generator):
        """A probability that does not shrink would need 10^20 attempts."""

        attempts = 0

        def random(self, shape):
            self.attempts += shape[0]
            assert self.attempts < 200
            return super().random(shape)

    rng = Limited(np.random.PCG64(0))
    assert not draw_kept(np.ones(200, int), 1.0, 1, rng).any()


def test_a_table_of_plain_dicts_may_hold_none():
    entry = INFO["caption"] | {"keep": None, "min_tokens": None, "encoder_embedding": None, "target_alphas": None}
    assert masking({"caption": entry})({"caption": "dog"}, np.random.default_rng(0))["caption"][
        "target_mask"
    ].shape == (42,)


def test_chunks_are_kept_or_dropped_as_a_whole():
    chunks = [f"v1={i} v0={100 + i}" for i in range(5)]
    seen = set()
    for seed in range(100):
        inputs, targets = parts(one("caption", chunks, 20, 20, seed))
        assert merge_spans(inputs, targets, SENTINELS) == ids(" ".join(chunks))
        for i in range(5):
            pair = TOKENIZER.encode(chunks[i]).ids
            inside = [token in inputs for token in pair]
            assert inside in ([True, True], [False, False])
            seen.add((i, inside[0]))
        runs = sum(i in SENTINELS for i in inputs)
        dropped = [TOKENIZER.token_to_id(f"v1={i}") not in inputs for i in range(5)] + [EOS not in inputs]
        assert runs == sum(d and not before for before, d in zip([False, *dropped], dropped))  # noqa: B905
    assert len(seen) == 10


def test_chunks_past_max_tokens_are_left_out():
    chunks = ["s0 s1", "s2 s3 s4 s5", "s6", "s7 s8"]
    inputs, _ = parts(one("caption", chunks, 6, 0, keep=["all"], max_tokens=6))
    assert inputs.tolist() == ids("s0 s1 s6 s7 s8") == inputs.tolist()[:6]


class TestTargetOverBudget:
    """Spans with known starts: S1 a S2 b b b S3 c S4."""

    def cut(self, budget, draws=600):
        tokens = [100, 1000, 101, 1001, 1001, 1001, 102, 1002]  # 10xx are dropped
        spans = split_spans(tokens, [token < 1000 for token in tokens], SENTINELS)
        assert spans.targets == [5, 1000, 6, 1001, 1001, 1001, 7, 1002, 8]
        rng = np.random.default_rng(0)
        found = [tuple(cut_target(spans, budget, rng)) for _ in range(draws)]
        return {part: found.count(part) / draws for part in set(found)}

    def test_within_budget_it_is_whole(self):
        assert list(self.cut(9)) == [(5, 1000, 6, 1001, 1001, 1001, 7, 1002, 8)]

    def test_it_starts_at_each_sentinel_but_the_closing_one(self):
        shares = self.cut(2)
        assert shares.keys() == {(5, 1000), (6, 1001), (7, 1002)}
        assert all(abs(share - 1 / 3) < 0.07 for share in shares.values())

    def test_it_goes_back_to_the_earliest_sentinel_from_which_all_fits(self):
        # After S3 there are 3 tokens, after S2 7: of a budget of 7, S3 would leave 4 unused.
        shares = self.cut(7)
        assert shares.keys() == {(5, 1000, 6, 1001, 1001, 1001, 7), (6, 1001, 1001, 1001, 7, 1002, 8)}
        assert abs(shares[(6, 1001, 1001, 1001, 7, 1002, 8)] - 2 / 3) < 0.07
        # But not further than that: from S2 they do not fit into 5.
        assert self.cut(5).keys() == {(5, 1000, 6, 1001, 1001), (6, 1001, 1001, 1001, 7), (7, 1002, 8)}

    def test_budget_0(self):
        assert list(self.cut(0)) == [()]

    def test_a_lone_sentinel_is_the_closing_one(self):
        assert parts(one("caption", "dog", 5, 1, keep=["all"]))[1].tolist() == [SENTINELS[0]]


def test_codes_need_no_text_vocabulary():
    mask = masking({"codes": INFO["codes"]}, tokenizer=None)
    whole = [30, 39, 33, 33, 31, EOS]
    for seed in range(50):
        budgets = Budgets({"codes": 6}, {"codes": 12}, 0)
        inputs, targets = parts(mask.apply({"codes": SAMPLE["codes"]}, budgets, np.random.default_rng(seed))["codes"])
        assert max([*inputs, *targets]) < 40 and targets[0] == SENTINELS[0]
        assert merge_spans(inputs, targets, SENTINELS[:8]) == whole


def test_codes_without_room_for_sentinels_hold_codes_only(caplog):
    mask = masking({"codes": {"type": "seq_token", "max_tokens": 6, "vocab_size": 10}}, tokenizer=None)
    assert "codes: vocab_offset 0" in caplog.text and "at least 9" in caplog.text
    for seed in range(30):
        budgets = Budgets({"codes": 6}, {"codes": 12}, 0)
        inputs, targets = parts(mask.apply({"codes": SAMPLE["codes"]}, budgets, np.random.default_rng(seed))["codes"])
        assert sorted([*inputs, *targets]) == sorted(SAMPLE["codes"])


def test_dropped_vectors_become_one_zero_vector():
    found = set()
    for seed in range(200):
        row = one("t5_caption", SAMPLE["t5_caption"], 4, 4, seed)
        inputs, _ = parts(row)
        number = [int(vector[0]) // 3 + 1 if vector.any() else 0 for vector in inputs]
        assert [n for n in number if n] == sorted(n for n in number if n)
        assert not any(a == b == 0 for a, b in zip(number, number[1:]))  # noqa: B905
        assert row["tensor"].shape == inputs.shape and row["tensor"].dtype == np.float32, "zeros behind are the batch's"
        found.add(tuple(number))
    assert (1, 2, 3, 4) in found and (0,) in found and (1, 0, 4) in found
    assert len(parts(one("t5_caption", np.ones((9, 3), np.float32), 5, 0, keep=["all"]))[0]) == 5  # max_tokens
    assert one("t5_caption", SAMPLE["t5_caption"], 0, 0)["input_mask"].all()
    assert one("t5_caption", np.zeros((0, 3), np.float32), 3, 0)["input_mask"].all()


@pytest.mark.parametrize("keep", ["random", "binary", "all"])
def test_a_text_without_tokens_is_not_read_and_nothing_is_drawn_for_it_but_how_much_to_keep(keep):
    budgets, used, plain = (
        Budgets({"caption": 0}, {"caption": 0}, 0),
        np.random.default_rng(0),
        np.random.default_rng(0),
    )
    row = masking({"caption": INFO["caption"] | {"keep": [keep]}}).apply({"caption": object()}, budgets, used)[
        "caption"
    ]
    assert row["input_mask"].all() and row["target_mask"].all() and not row["tensor"].any()
    keep_probability(keep, plain)
    assert used.random() == plain.random()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("tok_rgb@32", [0, 1, 2, 10], "token id 10 lies outside the vocabulary of 10"),
        ("tok_rgb@32", [0, 1, -2, 3], "token id -2 lies outside"),
        ("tok_rgb@32", [0, 1, 2], "expected 4 tokens, found 3"),
        ("tok_rgb@32", [0.0, 1, 2, 3], "expected token ids, not values of type float64"),
        ("codes", [3, 10], "token id 10 lies outside the vocabulary of 10"),
        ("caption", 7, "expected a string or a list of strings, not 7"),
        ("caption", ["dog", None], "expected a string or a list of strings"),
    ],
)
def test_values_that_break_the_contract(name, value, message):
    value = np.array(value) if isinstance(value, list) and None not in value else value
    with pytest.raises(DataError, match=f"^modality {name}: {message}"):
        one(name, value, 4, 4)


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"max_tokens": None}, {}, "modality caption: its number of tokens is unknown"),
        ({"keep": ["some"]}, {}, "modality caption: keep must be one of random, all, binary, not 'some'"),
        ({"keep": ["all", "all"]}, {}, "modality caption: keep needs one value per component of the mixture, 1, not 2"),
        ({"vocab_size": 30}, {}, r"modality caption: the text vocabulary has \d+ ids, but vocab_size is 30"),
        ({"max_tokens": 1000}, {}, "modality caption: max_tokens 1000 needs 501 sentinels"),
        ({"type": None}, {}, "modality caption: 'type' is required"),
        (
            {"input_alphas": [1.0, 2.0]},
            {},
            r"one value per component of the mixture, but there are lists of \[1, 2\] values",
        ),
        ({}, {"tokenizer": None}, "modality caption: a text needs a vocabulary; pass text_tokenizer"),
        ({}, {"inputs": (5, 3)}, "input_tokens_range must be"),
        ({}, {"sampling_weights": [1, 1]}, "sampling_weights must be 1 numbers"),
    ],
)
def test_settings_that_do_not_fit(change, options, message):
    entry = {key: value for key, value in (INFO["caption"] | change).items() if key != "type" or value}
    with pytest.raises(UserError, match=message):
        masking({"caption": entry}, **options)
