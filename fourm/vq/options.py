"""The options of learned tokenizers, which are the published constructor arguments and the keys of ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from fourm.utils.config import convert_fields
from fourm.utils.errors import UserError
from fourm.utils.options import Options, option
from fourm.vq.quantizers import fsq_codebook_size

T = TypeVar("T", bound="VQOptions")
_SIDE: Any = {"at_least": 1, "at_most": 2**16}
_WIDTH: Any = {"at_least": 1, "at_most": 2**20}


@dataclass(frozen=True, kw_only=True)
class VQOptions(Options):
    """Encoder and quantizer"""

    image_size: int = option("side length of the images in pixels", 224, **_SIDE)
    image_size_enc: int | None = option(
        "side length of the images that the encoder's position table is for", None, **_SIDE
    )
    n_channels: int = option("channels of the input; with n_labels, width of the class embedding", 3, **_WIDTH)
    n_labels: int | None = option("number of classes of class maps", None, **_WIDTH)
    enc_type: str = option("vit_{s,b,l}_enc, vit/B_3-Wi_192-H_6 or BottleneckMLP/B_6-Wi_1024", "vit_b_enc")
    patch_proj: bool = option("cut the input into patches; otherwise each position is a patch", True)
    post_mlp: bool = option("end the encoder and the decoder with an MLP", False)
    patch_size: int = option("side length of a patch in pixels", 16, **_SIDE)
    quant_type: Literal["lucid", "memcodes", "fsq"] = option("quantizer, see fourm.vq.quantizers", "lucid")
    codebook_size: int = option("number of codes", 16384, at_least=1, at_most=2**31)
    num_codebooks: int = option("memcodes: number of codebooks", 1, at_least=1, at_most=2**10)
    latent_dim: int = option("width of the latents", 32, **_WIDTH)
    levels: list[int] = option("fsq: levels per channel, which determine codebook_size and latent_dim", [])
    norm_codes: bool = option("lucid: compare latents and codes by their direction", True)
    norm_latents: bool = option("not supported", False)
    sync_codebook: bool = option("ignored: training always sums over its processes", True)
    ema_decay: float = option("lucid: share of the old codes in the new ones after a step", 0.99, at_least=0, at_most=1)
    threshold_ema_dead_code: float = option(
        "lucid: replace codes that fewer latents per step choose; 0 = never", 0.25, at_least=0
    )
    code_replacement_policy: str = option("lucid: how codes are replaced", "batch_random")
    commitment_weight: float = option(
        "lucid: weight of the loss that pulls latents to codes; fsq: into the range of its levels", 1.0, at_least=0
    )
    kmeans_init: bool = option("not supported", False)
    ckpt_path: str | None = option("file of initial weights", None)
    ignore_keys: list[str] = option(
        "prefixes of the names that are not loaded from ckpt_path",
        ["decoder", "loss", "post_quant_conv", "post_quant_proj", "encoder.pos_emb"],
    )
    freeze_enc: bool = option("do not train the encoder and the quantizer", False)
    undo_std: bool = option("convert ImageNet-standardised input to [-1, 1]", False)
    modality: str = option("domain that the tokenizer was trained on, or a key of MODALITY_TRANSFORMS", "")
    transform_options: dict = option("fields of the modality's transform that differ from the defaults", {})
    feature_network: str = option(
        "network of timm that extracted the training features; 'none' if they were read from files", ""
    )

    def check(self) -> None:
        used = {
            "norm_codes": True,
            "norm_latents": False,
            "kmeans_init": False,
            "num_codebooks": 1,
            "code_replacement_policy": "batch_random",
        }
        for name, value in used.items() if self.quant_type == "lucid" else ():
            if getattr(self, name) != value:
                raise UserError(
                    f"tokenizer: '{name}' {getattr(self, name)} is not supported: no published tokenizer has it; "
                    "leave it out"
                )
        if self.quant_type == "fsq":
            object.__setattr__(self, "codebook_size", fsq_codebook_size(self.levels))
            object.__setattr__(self, "latent_dim", len(self.levels))


@dataclass(frozen=True, kw_only=True)
class VQVAEOptions(VQOptions):
    """Encoder, quantizer and decoder"""

    dec_type: str = option("vit_{s,b,l}_dec, vit/B_3-Wi_192-H_6 or BottleneckMLP/B_6-Wi_1024", "vit_b_dec")
    out_conv: bool = option("end the decoder with convolutional blocks", False)
    image_size_dec: int | None = option(
        "side length of the images that the decoder's position table is for", None, **_SIDE
    )
    patch_size_dec: int | None = option("side length of the decoder's patches in pixels", None, **_SIDE)


def read_options(cls: type[T], given: Mapping[str, Any]) -> T:
    """Read the options of a tokenizer. Unknown options are ignored, because published files contain unused ones.

    Args:
        cls: The class of the options.
        given: The values by name; None stands for the default.

    Raises:
        UserError: A value has the wrong type or is out of its range.
    """
    hints = get_type_hints(cls)
    known = {
        item.name: given[item.name]
        for item in fields(cls)
        if item.name in given and (given[item.name] is not None or type(None) in get_args(hints[item.name]))
    }
    return cls(**convert_fields(cls, known, "tokenizer"))
