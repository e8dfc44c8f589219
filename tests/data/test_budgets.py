"""How tokens are divided among modalities: the law of the Dirichlet mixture, and its limits."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourm.data.budgets import BudgetSampler
from fourm.data.modality_info import Modality
from fourm.utils.errors import UserError


def modality(name, input_alphas=(1.0,), target_alphas=(1.0,), max_tokens=1000, kind="seq", **fields):
    return Modality(name, kind, max_tokens=max_tokens, input_alphas=input_alphas, target_alphas=target_alphas, **fields)


def sampler(*modalities, inputs=100, targets=100, **options):
    return BudgetSampler({m.name: m for m in modalities}, inputs, targets, **options)


def draws(sampler, count=4000, seed=0):
    rng = np.random.default_rng(seed)
    return [sampler.draw(rng) for _ in range(count)]


def table(budgets, side):
    return np.array([list(getattr(b, side).values()) for b in budgets])


def test_totals_are_used_up():
    found = draws(sampler(modality("a"), modality("b"), modality("c")), 500)
    assert (table(found, "input").sum(1) == 100).all() and (table(found, "target").sum(1) == 100).all()


def test_totals_are_uniform_with_both_ends():
    found = draws(sampler(modality("a"), modality("b"), inputs=(3, 6), targets=(0, 1)))
    for side, low, high in (("input", 3, 6), ("target", 0, 1)):
        totals = table(found, side).sum(1)
        assert (totals.min(), totals.max()) == (low, high)
        assert np.abs(np.bincount(totals - low) / len(totals) - 1 / (high - low + 1)).max() < 0.03


def test_means_and_variances_are_those_of_a_dirichlet_distribution():
    alphas = np.array([0.5, 1.0, 2.5])
    found = draws(
        sampler(*(modality(str(a), (a,), (a,)) for a in alphas), inputs=1000, targets=1000, max_tries=1), 8000
    )
    mean = alphas / alphas.sum()
    deviation = np.sqrt(mean * (1 - mean) / (alphas.sum() + 1))
    for side in ("input", "target"):
        shares = table(found, side) / 1000
        assert np.abs(shares.mean(0) - mean).max() < 0.012
        assert np.abs(shares.std(0) - deviation).max() < 0.012


def test_left_over_tokens_follow_the_alphas():
    # One token: the floor leaves it over, and the argmax of a fresh draw gets it. Beta(1, 3): P(x > 1/2) = 1/8.
    found = draws(sampler(modality("a", (1.0,)), modality("b", (3.0,)), inputs=1), 8000)
    assert abs(table(found, "input")[:, 0].mean() - 1 / 8) < 0.015


def test_alpha_0_gets_nothing():
    found = draws(
        sampler(modality("a", (0.0,), (0.5,)), modality("b", (0.5,), (0.0,)), modality("c", (0.5,), (0.5,))), 500
    )
    assert not table(found, "input")[:, 0].any() and not table(found, "target")[:, 1].any()
    assert table(found, "input")[:, 1].any() and table(found, "input")[:, 2].any()


def test_tiny_alphas_choose_one_modality():
    found = table(draws(sampler(modality("a", (0.0,)), modality("b", (0.0,))), 500), "input")
    assert ((found == 0) | (found == 100)).all() and 0.4 < (found[:, 0] == 100).mean() < 0.6


def test_components_are_drawn_by_weight_and_bring_their_alphas():
    mixture = (modality("a", (1.0, 0.0, 0.0), (1.0, 1.0, 1.0)), modality("b", (0.0, 1.0, 1.0), (1.0, 1.0, 1.0)))
    for weights, expected in ((None, (1 / 3, 1 / 3, 1 / 3)), ((2, 1, 1), (0.5, 0.25, 0.25)), ((0, 1, 0), (0, 1, 0))):
        found = draws(sampler(*mixture, sampling_weights=weights))
        counts = np.bincount([b.component for b in found], minlength=3) / len(found)
        assert np.abs(counts - expected).max() < 0.03
        assert all(b.input["a" if b.component == 0 else "b"] == 100 for b in found)


def test_max_tokens_limit_inputs_and_targets():
    small, text = modality("small", (5.0,), (5.0,), 30, "img"), modality("text", (1.0,), (1.0,), 40)
    found = draws(sampler(small, text), 500)
    inputs, targets = table(found, "input"), table(found, "target")
    assert (inputs <= [30, 40]).all() and (inputs.max(0) == [30, 40]).all()
    # An image's targets are what its inputs leave; a text may use its length twice.
    assert (targets[:, 0] <= 30 - inputs[:, 0]).all()
    assert (targets[:, 1][inputs[:, 1] == 40] == 40).any()


def test_budgets_are_drawn_again_until_they_reach_min_tokens():
    pair = (modality("a", (0.5,), (0.5,), min_tokens=30), modality("b", (0.5,), (0.5,)))
    found = table(draws(sampler(*pair, max_tries=1000), 500), "input")
    assert found[:, 0].min() >= 30
    # What is drawn again is the whole draw: the law is the one without a minimum, given that it is reached.
    free = table(draws(sampler(*(dataclasses.replace(m, min_tokens=0) for m in pair)), 4000), "input")
    assert abs(found[:, 0].mean() - free[free[:, 0] >= 30][:, 0].mean()) < 3


def test_the_last_of_max_tries_stands():
    pair = (modality("a", min_tokens=30), modality("b"))
    below = [(table(draws(sampler(*pair, max_tries=n), 2000), "input")[:, 0] < 30).mean() for n in (1, 2)]
    assert abs(below[0] - 0.3) < 0.04 and abs(below[1] - 0.09) < 0.03
    assert draws(sampler(modality("a", min_tokens=101), modality("b")), 1)


def test_one_modality_takes_all():
    (found,) = draws(sampler(modality("a", 0.0, 0.5, 70)), 1)  # alphas may be plain numbers
    assert (found.input, found.target, found.component) == ({"a": 70}, {"a": 70}, 0)


def test_a_modality_without_alphas_has_no_part():
    (found,) = draws(sampler(modality("a", (), ()), modality("b", (1.0, 2.0), (1.0, 2.0))), 1)
    assert found.input == {"a": 0, "b": 100}


modalities = st.lists(
    st.tuples(
        st.sampled_from(["img", "seq"]),
        st.integers(1, 60),
        st.sampled_from([0.0, 0.01, 0.5, 1.0, 1000.0]),
        st.sampled_from([0.0, 0.01, 0.5, 1.0, 1000.0]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(modalities, st.integers(0, 200), st.integers(0, 200), st.integers(0, 2**32))
def test_budgets_never_exceed_their_limits(entries, total_in, total_out, seed):
    table = [
        modality(str(i), (a_in,), (a_out,), most, kind, min_tokens=least)
        for i, (kind, most, a_in, a_out, least) in enumerate(entries)
    ]
    budgets = sampler(*table, inputs=total_in, targets=(0, total_out)).draw(np.random.default_rng(seed))
    assert sum(budgets.input.values()) <= total_in and sum(budgets.target.values()) <= total_out
    for m in table:
        n_in, n_out = budgets.input[m.name], budgets.target[m.name]
        assert 0 <= n_in <= m.max_tokens and 0 <= n_out <= m.max_tokens
        assert m.type == "seq" or n_in + n_out <= m.max_tokens


@pytest.mark.parametrize("weights", [(1, 2), (-1,), (0,)])
def test_sampling_weights_that_do_not_fit(weights):
    with pytest.raises(UserError, match="sampling_weights must be 1 numbers of at least 0"):
        sampler(modality("a"), sampling_weights=weights)


def test_mixtures_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr("fourm.data.budgets._MAX_CACHED_MIXTURES", 3)
    bounded, rng = sampler(*map(modality, "abcd")), np.random.default_rng(0)
    for present in ("ab", "bc", "cd", "ad", "ab", "abc", "d"):
        budgets = bounded.draw(rng, present)
        assert {name for name, count in budgets.input.items() if count} <= set(present)
        assert sum(budgets.input.values()) == 100 and len(bounded._mixtures) <= 3
