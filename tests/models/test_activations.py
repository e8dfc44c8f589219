"""The formula against the bytes that autograd keeps while a step runs."""

import pytest
import torch
from torch import nn

from benchmarks.embed_all import saved_bytes, synthetic_batch
from fourm.models import FM, model_config
from fourm.models.activations import activation_bytes

TARGETS = ["tok_rgb@224", "caption"]
SLOTS = (48, 40)


def small_model(name, **overrides):
    torch.manual_seed(0)
    sizes = {"dim": 96, "num_heads": 4, "encoder_depth": 3, "decoder_depth": 3, "share_embedding": True}
    return FM(model_config(name, ["rgb@224", *TARGETS], TARGETS, **sizes | overrides))


@pytest.mark.parametrize(
    ("half", "residual_dtype"),
    [(False, None), (True, torch.float32), (True, torch.bfloat16)],
    ids=["float32", "bfloat16", "bfloat16 residual stream"],
)
@pytest.mark.parametrize("name", ["tiny_6e_6d_gelu", "tiny_6e_6d_swiglu_nobias", "base_12e_12d_swiglu_qknorm_nobias"])
def test_the_formula_is_what_autograd_keeps(name, half, residual_dtype):
    model = small_model(f"fm_{name}", num_register_tokens=2)
    model.residual_dtype = residual_dtype
    batch = synthetic_batch(model.modality_info, 8, 16, 20)
    selection = model.select_tokens(batch, *SLOTS)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(batch, *SLOTS, selection=selection)[0]

    parts = activation_bytes(model, 8, *SLOTS, selection.decoder.counts, half)
    logits = sum(count * model.decoder_embeddings[name].vocab_size for name, count in selection.decoder.counts.items())
    expected = sum(parts.values()) - logits * (2 if half else 4)  # logits are alive, but not kept for the backward pass
    if half:  # autocast's copies of the weights are parameters, not activations
        expected += 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert saved_bytes(loss, model) == pytest.approx(expected, rel=0.03)


def test_recomputing_keeps_a_block_and_the_inputs_of_the_others():
    few, many = (
        activation_bytes(
            small_model("fm_tiny_6e_6d_gelu", encoder_depth=depth, use_act_checkpoint=True), 8, *SLOTS, {}, False
        )
        for depth in (3, 4)
    )
    assert many["blocks"] - few["blocks"] == 8 * SLOTS[0] * 4 * 96
    kept = activation_bytes(small_model("fm_tiny_6e_6d_gelu"), 8, *SLOTS, {}, False)
    assert few["blocks"] < 0.4 * kept["blocks"] and few["rest"] == kept["rest"]
