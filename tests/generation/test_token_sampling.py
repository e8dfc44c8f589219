"""Tokens are drawn with the right frequencies, from the permitted ones, with the random numbers of their sample."""

import pytest
import torch

from fourm.generation.token_sampling import SampleNoise, TokenSampler, sample_seeds
from fourm.utils.errors import UserError

PROBABILITIES = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])


def drawn(sampler, temperature=1.0, n=4001):
    """Frequency of each token for evenly spaced numbers."""
    logits = PROBABILITIES.log().repeat(n, 1)
    ids, confidence = sampler(logits, temperature, (torch.arange(n) + 0.5) / n)
    assert confidence.isfinite().all()
    return ids.bincount(minlength=5) / n


def close(probabilities):
    return pytest.approx(probabilities, abs=2e-3)


def test_tokens_come_as_often_as_they_are_likely():
    assert drawn(TokenSampler()).tolist() == close(PROBABILITIES.tolist())


def test_the_temperature_flattens_what_is_left():
    squared = PROBABILITIES[[1, 3]] ** 2 / (PROBABILITIES[[1, 3]] ** 2).sum()
    assert drawn(TokenSampler(top_k=2), 0.5).tolist() == close([0, squared[0].item(), 0, squared[1].item(), 0])


@pytest.mark.parametrize("sampler", [TokenSampler(top_k=2), TokenSampler(top_k=0.4), TokenSampler(top_p=0.5)])
def test_only_the_likeliest_are_drawn(sampler):
    assert drawn(sampler).tolist() == close([0, 4 / 7, 0, 3 / 7, 0])


def test_the_smallest_of_filters_keeps_one():
    for sampler in (TokenSampler(top_k=0.01), TokenSampler(top_p=0.01), TokenSampler(top_k=1)):
        assert drawn(sampler).tolist() == [0, 1, 0, 0, 0]


def test_temperature_0_takes_the_likeliest_and_says_how_likely_it_is():
    ids, confidence = TokenSampler(top_p=0.5)(PROBABILITIES.log()[None], 0, torch.tensor([0.99]))
    assert (ids.item(), confidence.item()) == (1, pytest.approx(0.4))


@pytest.mark.parametrize("vocabulary", [5, 128, 384, 390])
def test_of_tokens_that_are_equally_likely_temperature_0_takes_the_first(vocabulary):
    logits = torch.randint(4, (40, vocabulary)).float()
    first = [row.index(max(row)) for row in logits.tolist()]
    probabilities = logits.softmax(-1)[range(40), first]
    tokens, confidence = TokenSampler()(logits, 0.0, torch.zeros(40))
    assert tokens.tolist() == first
    assert torch.equal(confidence, probabilities)


def test_a_sample_has_its_own_numbers():
    many, alone = SampleNoise(sample_seeds(5, 3)), SampleNoise(sample_seeds(7, 1))
    for _ in range(2):
        torch.testing.assert_close(many.uniform(4)[2:], alone.uniform(4), rtol=0, atol=0)
    assert sample_seeds([4, 9], 2) == [4, 9]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (sample_seeds(generator, 2) for generator in generators)
    assert first == again != other
    assert sample_seeds(None, 2) != sample_seeds(None, 2)


@pytest.mark.parametrize("options", [{"top_k": 1.5}, {"top_k": -1}, {"top_p": 1.1}])
def test_filters_outside_their_range_are_errors(options):
    with pytest.raises(UserError, match="top_"):
        TokenSampler(**options)


def test_a_seed_too_few_is_an_error():
    with pytest.raises(UserError, match="2 seeds for a batch of 3"):
        sample_seeds([1, 2], 3)
