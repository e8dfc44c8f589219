"""Tokenizers of images with random codebooks, and a model for them."""

from pathlib import Path

import torch
import yaml

from fourm.models import FM
from fourm.utils.config import load_yaml
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

SUPERRES = {
    **{name: MODALITIES[name] for name in (f"rgb@{SIZE}", f"tok_rgb@{SIZE}", f"tok_depth@{SIZE}", "caption")},
    **{f"tok_{name}@{2 * SIZE}": _GRID | {"input_size": 2 * SIZE} for name in ("rgb", "depth")},
}
"""Of a model that upsamples."""


def toy_tokenizer(modality: str, patch: int = PATCH) -> PatchCodebook:
    generator = torch.Generator().manual_seed(0)
    classes = len(CLASSES) if modality == "semseg" else None
    tokenizer = PatchCodebook(
        PatchCodebookConfig(modality, VOCAB, patch, CHANNELS[modality], SIZE, one_hot_classes=classes)
    )
    tokenizer.codebook.copy_(torch.rand(tokenizer.codebook.shape, generator=generator) * 2 - 1)
    return tokenizer


def toy_model(modalities: dict = MODALITIES) -> FM:
    torch.manual_seed(0)
    targets = [name for name in modalities if not name.startswith("rgb")]
    model = FM(
        {
            "domains_in": [*modalities],
            "domains_out": targets,
            "modalities": modalities,
            "dim": 32,
            "encoder_depth": 1,
            "decoder_depth": 1,
            "num_heads": 2,
            "act_layer": "SiLU",
            "gated_mlp": True,
        }
    )
    randomise_(model)
    return model.eval()


def published_model(data_config: str, folder: Path) -> None:
    """A run with the modalities of a published data configuration, the width of a toy."""
    path = Path(__file__).parents[2] / f"cfgs/default/4m/data/cc12m/{data_config}.yaml"
    dataset = load_yaml(path)["train"]["datasets"]["cc12m"]
    shape = {"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "mlp_ratio": 2}
    domains = {f"domains_{way}": dataset[f"{way}_domains"].split("-") for way in ("in", "out")}
    FM({**domains, **shape}).save_pretrained(folder)
    vocabulary = "fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json"
    (folder / "config.yaml").write_text(yaml.safe_dump({"text_tokenizer_path": vocabulary}))
