"""Packed batches, whose padding is not computed, train a model like padded ones."""

import pytest
import torch

from benchmarks.embed_all import saved_bytes
from tests.models.toy_models import SWIGLU, toy_batch, toy_model

PACKED = {
    "swiglu": SWIGLU,
    "registers, recomputed": {"num_register_tokens": 2, "use_act_checkpoint": True},
    "qk-norm, causal": {"qk_norm": True, "decoder_causal_mask": True, "share_embedding": True},
    "stochastic depth": {"drop_path_rate_encoder": 0.5, "drop_path_rate_decoder": 0.5},
}


@pytest.mark.parametrize("samples", ["equal", "unequal", "one is empty"])
@pytest.mark.parametrize("variant", PACKED)
def test_packed_batches_have_the_losses_and_gradients_of_padded_ones(variant, samples):
    model, twin = toy_model(**PACKED[variant]), toy_model(**PACKED[variant])
    batch = toy_batch(model)  # with 18 inputs in each sample
    batch["grid"]["target_mask"][0] = True
    if samples != "equal":
        batch["grid"]["input_mask"][1] = batch["vectors"]["input_mask"][2] = True
    if samples == "one is empty":
        for entry in batch.values():
            entry["input_mask"][1] = entry["target_mask"][2] = True
    encoder_masks = []
    model.encoder[0].register_forward_pre_hook(lambda block, inputs: encoder_masks.append(inputs[1]))

    def train(model, pack):
        generator = torch.Generator().manual_seed(7)
        selection = model.select_tokens(batch, 20, 30, generator, pack=pack)
        torch.manual_seed(0)
        loss, _ = model(batch, 20, 30, selection=selection)
        loss.backward()
        return selection, loss

    (packed, loss), (padded, expected) = train(model, pack=True), train(twin, pack=False)
    assert packed.encoder.modality.shape == (3, 18) and padded.encoder.modality.shape == (3, 20)
    assert packed.encoder.num_computed == {"equal": 54, "unequal": 48, "one is empty": 54}[samples]
    assert packed.decoder.packed == (samples != "one is empty") and not padded.decoder.packed
    assert encoder_masks
    assert all((mask is None) == (samples == "equal") for mask in encoder_masks), "only where something is masked"
    torch.testing.assert_close(loss, expected)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, msg=lambda m, name=name: f"{name}: {m}", rtol=1e-4, atol=1e-5
        )


def test_packed_batches_keep_no_more_for_the_backward_pass_than_padded_ones():
    model = toy_model()
    batch = toy_batch(model, size=8)
    batch["grid"]["input_mask"][1] = batch["grid"]["target_mask"][2] = True

    def kept(pack):
        selection = model.select_tokens(batch, 18, 18, torch.Generator().manual_seed(0), pack=pack)
        assert selection.encoder.packed == selection.decoder.packed == pack
        return saved_bytes(lambda: model(batch, 18, 18, selection=selection)[0], model)

    assert kept(pack=True) < kept(pack=False)
