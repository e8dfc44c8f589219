"""The moving average of the weights."""

import torch

from fourm.train.ema import EMA


def test_it_follows_the_weights_faster_at_first():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema, expected = EMA(model, 0.5), 0.0
    for step in range(1, 12):
        torch.nn.init.constant_(model.weight, float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        torch.testing.assert_close(ema.average["weight"].item(), expected)


def test_it_takes_the_place_of_the_weights_for_a_while():
    model = torch.nn.Linear(2, 2)
    weights = model.weight.clone()
    ema = EMA(model, 0.9)
    ema.average["weight"] += 1
    with ema.applied():
        torch.testing.assert_close(model.weight, weights + 1)
    torch.testing.assert_close(model.weight, weights)
    torch.testing.assert_close(ema.average["weight"], weights + 1)
