"""The 26 model names of the papers, from one table of sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fourm.models.fm import check_config
from fourm.utils.config import convert
from fourm.utils.errors import UserError, did_you_mean

_SIZES = {  # width, depth of the encoder and of the decoder, attention heads
    "tiny": (384, 6, 6),
    "small": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xlarge": (2048, 24, 32),
}
_NO_BIAS = {"qkv_bias": False, "proj_bias": False, "mlp_bias": False, "norm_bias": False}
_SWIGLU = {"act_layer": "SiLU", "gated_mlp": True, "qk_norm": False}
_VARIANTS = {
    "gelu": {"act_layer": "GELU", "gated_mlp": False, "qk_norm": False},
    "swiglu_nobias": _NO_BIAS | _SWIGLU,
    "swiglu_qknorm_nobias": _NO_BIAS | _SWIGLU | {"qk_norm": True},
}


def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for size, (dim, depth, heads) in _SIZES.items():
        for variant, options in _VARIANTS.items():
            if variant == "swiglu_qknorm_nobias" and size in ("tiny", "small"):
                continue
            trunk = {"dim": dim, "encoder_depth": depth, "num_heads": heads, "mlp_ratio": 4.0, **options}
            table[f"fm_{size}_{depth}e_{depth}d_{variant}"] = trunk | {"decoder_depth": depth}
            table[f"fm_vit_{size}_{depth}e_{variant}"] = trunk
    return table


_TABLE = _table()
MODEL_NAMES = tuple(_TABLE)


def model_config(
    name: str,
    domains_in: Sequence[str] = (),
    domains_out: Sequence[str] = (),
    *,
    image_size: int = 224,
    patch_size: int = 16,
    modalities: Mapping[str, Mapping[str, Any]] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """The hub configuration of a named model: ``FM(model_config(...))``, or ``FMViT`` for a ``fm_vit_`` name.

    Args:
        domains_in, domains_out: modalities that can be inputs, and targets. A ViT has no use for them.
        image_size, patch_size: of images whose table entry leaves them open.
        modalities: declarations of modalities that are not in the table.
        overrides: any other key of the configuration, such as ``dim`` or ``num_register_tokens``.

    Raises:
        UserError: an unknown name or key, with the nearest one.
    """
    if name not in _TABLE:
        raise UserError(f"unknown model '{name}'{did_you_mean(name, MODEL_NAMES)}")
    overrides = check_config(overrides, f"model {name}")
    config = _TABLE[name] | {"image_size": image_size, "patch_size": patch_size} | overrides
    if not name.startswith("fm_vit_"):
        config |= {"domains_in": list(domains_in), "domains_out": list(domains_out)}
    if modalities:
        where = f"model {name}: 'modalities'"
        declared = convert(modalities, dict[str, Any], where)
        config["modalities"] = {key: convert(fields or {}, dict, f"{where}: {key}") for key, fields in declared.items()}
    return config


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of the trunk, as the papers count them, and of the embedding modules; a tied one counts once."""
    parts = {"trunk": 0, "embeddings": 0}
    for name, parameter in model.named_parameters():
        is_embedding = name.startswith(("encoder_embeddings.", "decoder_embeddings."))
        parts["embeddings" if is_embedding else "trunk"] += parameter.numel()
    return parts
