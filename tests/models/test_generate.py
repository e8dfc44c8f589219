"""Generation equals the method written down plainly, sample by sample, whatever the batch and the guidance."""

import pytest
import torch

from fourm.models.generate import (
    GenerationSampler,
    build_chained_generation_schedules,
    init_empty_target_modality,
    init_full_input_modality,
)
from fourm.models.generation_inputs import emptied
from tests.models import reference_generation as reference
from tests.models.toy_models import DECLARATIONS, SWIGLU, toy_model

S1, S2, EOS = 5, 6, 3
ROOM = 11


@pytest.fixture(scope="module", params=["gelu", "swiglu_qknorm_registers"])
def model(request):
    options = {} if request.param == "gelu" else {**SWIGLU, "qk_norm": True, "num_register_tokens": 3}
    return toy_model(4, **options, modalities=DECLARATIONS, share_embedding=True).eval()


def inputs(model, batch_size=4, seed=0):
    """Some pixels, a text and vectors, of other lengths in every sample."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "pixels": {"tensor": torch.randn(batch_size, 3, 16, 16, generator=generator)},
        "vectors": {"tensor": torch.randn(batch_size, 6, 10, generator=generator)},
        "codes": {"tensor": torch.randint(10, 30, (batch_size, 5), generator=generator)},
    }
    for name in batch:
        batch = init_full_input_modality(batch, model.modality_info, name, "cpu")
    masks = torch.rand(batch_size, 16, generator=generator) < torch.rand(batch_size, 1, generator=generator) * 0.8
    batch["pixels"]["input_mask"] = masks
    return batch


def one(batch, index):
    return {name: {k: value[index : index + 1] for k, value in entry.items()} for name, entry in batch.items()}


def with_target(model, batch, target, tokens):
    size = len(batch["pixels"]["tensor"])
    return init_empty_target_modality(batch, model.modality_info, target, size, tokens, "cpu")


def schedule(model, targets, schemes, tokens, steps, scales=1.0, temperature=0.0, cond=("pixels",), **options):
    n = len(targets)
    return build_chained_generation_schedules(
        cond, targets, tokens, schemes, steps, ["linear"] * n, [temperature] * n, ["constant"] * n,
        [scales] * n, ["constant"] * n, modality_info=model.modality_info, **options,
    )  # fmt: skip


def valid(entry, index=0):
    return entry["tensor"].flatten(1)[index][~entry["input_mask"][index]].tolist()


def conditions(model, batch, scale, domains=("pixels",)):
    if scale == 1.0:
        return [(1.0, batch)]
    return [(1 - scale, reference.emptied(model, batch, domains)), (scale, batch)]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_captions_are_those_of_the_plain_method(model, scale):
    batch = with_target(model, inputs(model), "text", ROOM + 1)
    steps = schedule(model, ["text"], ["autoregressive"], [ROOM], [1], scale)
    out = GenerationSampler(model).generate(batch, steps, seed=0)
    lengths = set()
    for b in range(4):
        expected = reference.write(model, conditions(model, one(inputs(model), b), scale), "text", [S1], ROOM, S2)
        assert valid(out["text"], b) == expected
        lengths.add(len(expected))
    assert lengths != {0}


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("scheme", "steps"), [("maskgit", 1), ("maskgit", 3), ("roar", 1), ("roar", 5)])
def test_images_are_those_of_the_plain_method(model, scheme, steps, scale):
    batch = with_target(model, inputs(model), "grid", 16)
    plan = schedule(model, ["grid"], [scheme], [16], [steps], scale)
    out = GenerationSampler(model).generate(batch, plan, seed=7)
    counts = [step["num_tokens"] for step in plan]
    for b in range(4):
        expected = reference.paint(
            model, conditions(model, one(inputs(model), b), scale), "grid", counts, 7 + b, scheme
        )  # fmt: skip
        assert out["grid"]["tensor"][b].tolist() == expected.tolist()
    assert not out["grid"]["input_mask"].any() and out["grid"]["target_mask"].all()
