"""The analytic count against what PyTorch counts while a step runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fourm.models import FM, StepFlops
from tests.models.toy_models import SWIGLU, toy_batch, toy_config, toy_model

BOTTLENECK = {"orig_emb_dim": 10, "max_length": 6, "use_bottleneck": True, "bottleneck_dim": 8}
VARIANTS = {
    "gelu": {},
    "swiglu": SWIGLU,
    "swiglu, qk_norm": {**SWIGLU, "qk_norm": True},
    "registers": {"num_register_tokens": 3},
    "tied, deeper decoder": {"share_embedding": True, "decoder_depth": 3},
    "recomputed activations": {"use_act_checkpoint": True},
}


def counted(model, batch, selection, tokens) -> int:
    """Operations of a step as PyTorch counts them; it does not know the CPU's fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, *tokens, selection=selection)[0].backward()
    return counter.get_total_flops()


def analytic(model, size, selection, tokens) -> float:
    return StepFlops(model)(size, *tokens, selection.encoder.counts, selection.decoder.counts)


@pytest.mark.parametrize("tokens", [(20, 16), (9, 5)], ids=["with padding", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_count_is_exactly_that_of_the_step(variant, tokens):
    model = toy_model(**VARIANTS[variant])
    batch = toy_batch(model)
    selection = model.select_tokens(batch, *tokens)
    total = counted(model, batch, selection, tokens)
    if variant == "recomputed activations":  # are not the model's
        assert total > 1.2 * analytic(model, 3, selection, tokens)
        model.use_act_checkpoint = False
        total = counted(model, batch, selection, tokens)
    assert analytic(model, 3, selection, tokens) == total


def test_packed_tokens_are_counted_without_padding():
    model = toy_model(num_register_tokens=3)
    batch = toy_batch(model)
    batch["text"]["input_mask"][0] = batch["grid"]["target_mask"][1] = True
    selection = model.select_tokens(batch, 20, 16, pack=True)
    parts = selection.encoder, selection.decoder
    slots = [part.modality.shape[1] for part in parts]
    flops = StepFlops(model)(3, *slots, *(part.counts for part in parts), tuple(part.num_computed for part in parts))
    assert all(part.packed for part in parts) and flops == counted(model, batch, selection, (20, 16))


def test_vectors_through_a_bottleneck():
    config = toy_config()
    config["modalities"] = config["modalities"] | {
        "vectors": {"type": "seq_emb", "max_tokens": 6, "embedding_options": BOTTLENECK}
    }
    model = FM(config)
    batch = toy_batch(model)
    selection = model.select_tokens(batch, 20, 16)
    assert selection.encoder.counts["vectors"] and analytic(model, 3, selection, (20, 16)) == counted(
        model, batch, selection, (20, 16)
    )


def test_a_model_without_memory_is_counted_alike():
    with torch.device("meta"):
        ghost = FM(toy_config())
    model = toy_model()
    arguments = (8, 20, 16, {"pixels": 30, "text": 50}, {"grid": 60, "codes": 7})
    assert StepFlops(ghost)(*arguments) == StepFlops(model)(*arguments) > 0
