"""Registry of the 26 models of the papers, which are built from one table of sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fourm.models.fm import check_config
from fourm.utils.config import convert
from fourm.utils.errors import UserError, did_you_mean

_SIZES = {  # width, depth of encoder and decoder each, attention heads
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
    """Return the hub configuration of a named model, for ``FM(model_config(...))``, or ``FMViT`` for ``fm_vit_`` names.

    Args:
        name: One of :data:`MODEL_NAMES`.
        domains_in, domains_out: Modalities that can be inputs, and targets; ignored for a ViT.
        image_size, patch_size: Sizes of images whose table entry does not set them.
        modalities: Declarations of modalities that are not in the table.
        overrides: Any other key of the configuration, such as ``dim`` or ``num_register_tokens``.

    Raises:
        UserError: If the name or a key is unknown; the message suggests the nearest one.
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
    """Count the parameters of the trunk, as the papers do, and of the embedding modules; tied ones count once."""
    parts = {"trunk": 0, "embeddings": 0}
    for name, parameter in model.named_parameters():
        is_embedding = name.startswith(("encoder_embeddings.", "decoder_embeddings."))
        parts["embeddings" if is_embedding else "trunk"] += parameter.numel()
    return parts
