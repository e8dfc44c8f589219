"""Schedules follow the formulae of the method; invalid ones are refused with the reason."""

import math

import pytest

from fourm.generation.schedules import (
    build_chained_generation_schedules,
    check_schedule,
    cosine_schedule,
    linear_schedule,
    temperatures,
)
from fourm.utils.errors import UserError


def build(**changes):
    arguments = {
        "cond_domains": ["rgb@224"],
        "target_domains": ["tok_depth@224", "caption"],
        "tokens_per_target": [196, 256],
        "autoregression_schemes": ["roar", "autoregressive"],
        "decoding_steps": [3, 1],
        "token_decoding_schedules": ["linear", "linear"],
        "temps": [2.0, 0.5],
        "temp_schedules": ["linear", "constant"],
        "cfg_scales": [3.0, 1.0],
        "cfg_schedules": ["constant", "constant"],
    }
    return build_chained_generation_schedules(**arguments | changes)


@pytest.mark.parametrize(
    ("steps", "tokens", "expected"),
    [(4, 10, [3, 3, 2, 2]), (3, 196, [66, 65, 65]), (1, 7, [7]), (6, 4, [1, 1, 1, 1])],
)
def test_linear_token_schedule(steps, tokens, expected):
    assert linear_schedule(steps, tokens) == expected


def test_cosine_token_schedule_by_its_formula():
    share = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]
    first = [round(196 * (share[i] - share[i + 1])) for i in range(7)]
    assert cosine_schedule(8, 196) == [*first, 196 - sum(first)] == [7, 21, 32, 38, 38, 32, 21, 7]
    assert cosine_schedule(1, 5) == [5]


def test_cosine_token_schedule_never_decodes_more_than_there_are():
    for tokens in range(1, 40):
        for steps in range(1, 30):
            counts = cosine_schedule(steps, tokens)
            assert (sum(counts), len(counts), min(counts) >= 0) == (tokens, steps, True)


def test_constant_and_linear_temperatures():
    assert temperatures("constant", 2.0, [4, 3, 1]) == [2.0, 2.0, 2.0]
    assert temperatures("linear", 2.0, [4, 3, 1]) == pytest.approx([2.0, 1.0, 0.25])
    assert temperatures("linear", 0.0, [1, 1]) == [1e-9, 1e-9]


def test_onex_temperatures_by_their_formula():
    counts = [4, 3, 2, 1]
    x = [1 + 99 * i / 9 for i in range(10)]
    u = [value**-0.5 for value in x]
    u = [(value - u[-1]) / (u[0] - u[-1]) for value in u]
    decoded = [0.4, 0.7, 0.9, 1.0]
    expected = [0.5 + (3.0 - 0.5) * (1 - decoded[s]) * u[s] for s in range(4)]
    assert temperatures("onex:0.5:0.5", 3.0, counts) == pytest.approx(expected)
    assert expected[0] == pytest.approx(2.0) and expected[-1] == 0.5
    assert temperatures("onex:0.5:0.5", 3.0, [1, 0, 0]) == [0.5] * 3


def test_a_chain_of_targets_with_growing_conditioning():
    steps = build(cfg_grow_conditioning=True)
    assert [step["num_tokens"] for step in steps] == [66, 65, 65, 256]
    assert [step["temperature"] for step in steps] == pytest.approx([2.0, 2 - 2 * 66 / 196, 2 - 2 * 131 / 196, 0.5])
    assert [step["cfg_cond_domains"] for step in steps] == [["rgb@224"]] * 3 + [["rgb@224", "tok_depth@224"]]
    assert {**steps[3], "num_tokens": 0} == {
        "target_domain": "caption",
        "scheme": "autoregressive",
        "num_tokens": 0,
        "temperature": 0.5,
        "cfg_scale": 1.0,
        "cfg_cond_domains": ["rgb@224", "tok_depth@224"],
    }
    assert build()[3]["cfg_cond_domains"] == ["rgb@224"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoregression_schemes": ["roar", "maskgit"]}, "caption is a sequence .* autoregressive, not maskgit"),
        ({"autoregression_schemes": ["autoregressive", "autoregressive"]}, "is an image .* maskgit or roar"),
        (
            {"autoregression_schemes": ["halten", "autoregressive"]},
            "with halton, maskgit or roar, not halten .*'halton'",
        ),
        ({"target_domains": ["tok_dept@224", "caption"]}, "'tok_dept@224' cannot be generated .*tok_depth@224"),
        ({"target_domains": ["rgb@224", "caption"]}, "rgb@224 does not consist of tokens"),
        ({"cond_domains": ["rbg@224"]}, "cond_domains: unknown modality 'rbg@224'"),
        ({"tokens_per_target": [197, 256]}, "tok_depth@224 has 196 positions, fewer than the 197 tokens"),
        ({"tokens_per_target": [196, 257]}, "caption has 256 positions"),
        ({"cond_domains": []}, "guidance of tok_depth@224 needs cond_domains"),
        ({"temps": [1.0]}, "temps must have one entry for each of the 2 target_domains"),
        ({"token_decoding_schedules": ["sqrt", "linear"]}, "'sqrt' of tok_depth@224 is none of linear, cosine"),
        ({"temp_schedules": ["onex", "constant"]}, "'onex' is none of constant, linear and onex:MIN:POWER"),
        ({"cfg_schedules": ["cosine", "constant"]}, "'cosine' of tok_depth@224"),
        ({"decoding_steps": [0, 1]}, "decoding_steps of tok_depth@224 must be at least 1 and at most 100000, not 0"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_a_step_that_lacks_something_is_named():
    with pytest.raises(UserError, match="lacks num_tokens, temperature"):
        check_schedule([{"target_domain": "caption", "scheme": "autoregressive"}], {})
