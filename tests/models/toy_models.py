"""A model of six toy modalities, one of every kind, and batches for it."""

import torch

from benchmarks.embed_all import synthetic_batch
from fourm.models import FM

DECLARATIONS = {
    "pixels": {"type": "img", "num_channels": 3, "input_size": 16, "patch_size": 4},
    "grid": {"type": "img", "vocab_size": 40, "input_size": 16, "patch_size": 4},
    "global": {
        "type": "img",
        "vocab_size": 20,
        "input_size": 16,
        "patch_size": 8,
        "embedding_options": {"sincos_pos_emb": False},
    },
    "text": {"type": "seq", "vocab_size": 50, "max_tokens": 12},
    "codes": {"type": "seq_token", "vocab_size": 30, "max_tokens": 5},
    "vectors": {"type": "seq_emb", "max_tokens": 6, "embedding_options": {"orig_emb_dim": 10, "max_length": 6}},
}
TARGETS = ["grid", "global", "text", "codes"]


def toy_config(**overrides):
    return {
        "domains_in": [*DECLARATIONS],
        "domains_out": TARGETS,
        "modalities": DECLARATIONS,
        "dim": 32,
        "encoder_depth": 2,
        "decoder_depth": 2,
        "num_heads": 4,
        **overrides,
    }


SWIGLU = {
    "qkv_bias": False,
    "proj_bias": False,
    "mlp_bias": False,
    "norm_bias": False,
    "act_layer": "SiLU",
    "gated_mlp": True,
}


def toy_model(seed=0, **overrides):
    torch.manual_seed(seed)
    model = FM(toy_config(**overrides))
    randomise_(model)
    return model


def randomise_(model, scale=0.15):
    """Add noise to every parameter, including those that start at 0 or 1, so that tests notice if one is ignored."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def toy_batch(model, size=3, inputs=3, targets=4, seed=0):
    return synthetic_batch(model.modality_info, size, inputs, targets, seed)
