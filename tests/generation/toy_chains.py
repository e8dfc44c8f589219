"""Chains of targets that toy models generate: models, inputs and schedules."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from fourm.models.generate import (
    GenerationSampler,
    build_chained_generation_schedules,
    init_empty_target_modality,
    init_full_input_modality,
)
from tests.models.toy_models import DECLARATIONS, SWIGLU, toy_model

S1, S2, EOS = 5, 6, 3
ROOM = 11
SPECIAL = ["[PAD]", "[UNK]", "[SOS]", "[EOS]", *(f"[S_{i}]" for i in range(6))]
TOKENIZER = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + [f"w{i}" for i in range(10, 50)])}))
TOKENIZER.pre_tokenizer = WhitespaceSplit()
MODALITIES = {**DECLARATIONS, "codes": {"type": "seq_token", "vocab_size": 30, "max_tokens": 5, "vocab_offset": 10}}
MODELS = ["gelu", "swiglu_qknorm_registers"]


def chain_model(name):
    """Make one of :data:`MODELS`."""
    options = {} if name == "gelu" else {**SWIGLU, "qk_norm": True, "num_register_tokens": 3}
    model = toy_model(4, **options, modalities=MODALITIES, share_embedding=name == "gelu").eval()
    model.decoder_embeddings["text"].to_logits.weight.data[S2] *= 2  # samples end, at different times
    return model


def generate(model, batch, schedule, **options):
    return GenerationSampler(model).generate(batch, schedule, text_tokenizer=TOKENIZER, **options)


def inputs(model, batch_size=4, seed=0):
    """Return pixels, vectors and codes; the number of pixels that are inputs differs between samples."""
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


def make_schedule(model, targets, schemes, tokens, steps, scales=1.0, temperature=0.0, cond=("pixels",), **options):
    n = len(targets)
    return build_chained_generation_schedules(
        cond,
        targets,
        tokens,
        schemes,
        steps,
        ["linear"] * n,
        [temperature] * n,
        ["constant"] * n,
        [scales] * n,
        ["constant"] * n,
        modality_info=model.modality_info,
        **options,
    )


def valid(entry, index=0):
    return entry["tensor"].flatten(1)[index][~entry["input_mask"][index]].tolist()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[m][k], b[m][k]) for m in a for k in a[m])
