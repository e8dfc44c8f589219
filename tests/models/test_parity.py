"""Numbers of the published code: keys, shapes, losses and outputs on weights and inputs that anyone can reproduce."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fourm.data.modality_info import MODALITY_INFO
from fourm.models import FM, FMViT

PUBLISHED = json.loads((Path(__file__).parent / "parity.json").read_text())
TOLERANCE = 2e-4


def fill_(model):
    """Normal noise of 0.2, seeded by each parameter's name; weights of norms around one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            values = rng.standard_normal(tuple(parameter.shape), dtype=np.float32) * 0.2
            around = float(parameter.ndim == 1 and "norm" in name and name.endswith("weight"))
            parameter.copy_(torch.from_numpy(values + np.float32(around)))
    return model.eval()


def seven_modalities(size=2):
    """The batch of the published numbers; the order of the draws is part of it."""
    rng, batch = np.random.default_rng(3), {}
    for name in sorted(PUBLISHED["fm_7"]["config"]["domains_in"]):
        modality = MODALITY_INFO[name]
        is_text, is_pixels = modality.type == "seq", modality.is_pixels
        length = 2 * (modality.max_tokens + 1) if is_text else modality.max_tokens
        if is_text:
            tensor = np.zeros((size, length), np.int64)
        elif is_pixels:
            tensor = rng.standard_normal((size, 3, 224, 224)).astype(np.float32)
        else:
            tensor = rng.integers(0, modality.vocab_size, (size, length)).astype(np.int64)
        inputs, targets = np.ones((2, size, length), bool)
        attention = np.zeros((size, length), np.int32)
        for b in range(size):
            if is_text:
                n_in, n_out = int(rng.integers(4, 14)), int(rng.integers(6, 20))
                end = n_in + n_out
                tensor[b, :n_in] = rng.integers(204, 29999, n_in)
                tensor[b, n_in:end] = rng.integers(204, 29999, n_out)
                tensor[b, [n_in, end - 1]] = 5, 6
                inputs[b, :n_in] = targets[b, n_in:end] = False
                attention[b, n_in:end] = 1
            else:
                order, n_in, n_out = rng.permutation(length), int(rng.integers(5, 22)), int(rng.integers(5, 22))
                inputs[b, order[:n_in]] = False
                if not is_pixels:
                    chosen = order[n_in : n_in + n_out]
                    targets[b, chosen] = False
                    attention[b, chosen.min()] = n_out
        entry = {"tensor": tensor, "input_mask": inputs, "target_mask": targets, "decoder_attention_mask": attention}
        batch[name] = {key: torch.from_numpy(value) for key, value in entry.items()}
    return batch


@pytest.fixture(scope="module")
def model():
    return fill_(FM(PUBLISHED["fm_7"]["config"]))


@pytest.mark.parametrize("case", ["fm_7", "fm_21"])
def test_state_dict_has_the_published_keys_and_shapes(case):
    with torch.device("meta"):
        state = FM(PUBLISHED[case]["config"]).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == PUBLISHED[case]["shapes"]


@torch.no_grad()
def test_losses_are_the_published_ones(model):
    loss, per_modality = model(seven_modalities(), 512, 512)
    assert loss.item() == pytest.approx(PUBLISHED["fm_7"]["loss"], rel=TOLERANCE)
    assert {m: v.item() for m, v in per_modality.items()} == pytest.approx(PUBLISHED["fm_7"]["mod_loss"], rel=TOLERANCE)


@torch.no_grad()
def test_loss_with_48_encoder_tokens_is_the_published_one(model):
    expected = PUBLISHED["fm_7"]["loss_48_encoder_tokens"]
    assert model(seven_modalities(), 48, 512)[0].item() == pytest.approx(expected, rel=TOLERANCE)


@torch.no_grad()
def test_vit_is_the_published_one():
    published = PUBLISHED["fm_vit"]
    vit = fill_(FMViT(published["config"]))
    assert sorted(vit.state_dict()) == published["keys"]
    pixels = np.random.default_rng(5).standard_normal((2, 3, 224, 224)).astype(np.float32)
    output = vit(torch.from_numpy(pixels))
    assert list(output.shape) == published["output_shape"]
    expected = torch.tensor(published["output_first"])
    torch.testing.assert_close(output[0, :3, :6].flatten(), expected, rtol=TOLERANCE, atol=TOLERANCE)
