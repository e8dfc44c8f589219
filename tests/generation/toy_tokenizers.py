"""Tokenizers of images with random codebooks, and a model for them."""

import torch

from fourm.models import FM
from fourm.vq import PatchCodebook, PatchCodebookConfig
from tests.models.toy_models import randomise_

SIZE, PATCH, VOCAB = 32, 8, 20
CHANNELS = {"rgb": 3, "depth": 1, "normal": 3, "semseg": 1, "canny_edge": 1}
CLASSES = ("ground", "cup", "duck")

_GRID = {"type": "img", "vocab_size": VOCAB, "input_size": SIZE, "patch_size": PATCH}
_TEXT = {"type": "seq", "vocab_size": 4400, "max_tokens": 24}
MODALITIES = {
    f"rgb@{SIZE}": {"type": "img", "num_channels": 3, "input_size": SIZE, "patch_size": PATCH, "path": "rgb"},
    **{f"tok_{name}@{SIZE}": _GRID for name in (*CHANNELS, "clip")},
    **dict.fromkeys(("caption", "det", "metadata", "color_palette"), _TEXT),
}


def toy_tokenizer(modality: str) -> PatchCodebook:
    generator = torch.Generator().manual_seed(0)
    classes = len(CLASSES) if modality == "semseg" else None
    tokenizer = PatchCodebook(
        PatchCodebookConfig(modality, VOCAB, PATCH, CHANNELS[modality], SIZE, one_hot_classes=classes)
    )
    tokenizer.codebook.copy_(torch.rand(tokenizer.codebook.shape, generator=generator) * 2 - 1)
    return tokenizer


def toy_model() -> FM:
    torch.manual_seed(0)
    targets = [name for name in MODALITIES if not name.startswith("rgb")]
    model = FM(
        {
            "domains_in": [*MODALITIES], "domains_out": targets, "modalities": MODALITIES, "dim": 32, "encoder_depth": 1,
            "decoder_depth": 1, "num_heads": 2, "act_layer": "SiLU", "gated_mlp": True,
        }
    )  # fmt: skip
    randomise_(model)
    return model.eval()
