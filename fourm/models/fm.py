"""A 4M model from a configuration, as in YAML files, checkpoints and on the hub: its keys, their checks, and ``FM``."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fourm.data.modality_info import Modality, resolve_modalities
from fourm.models import decoder_embeddings, encoder_embeddings
from fourm.models.fourm import FourM
from fourm.models.hub import Hub4M, trunk_options
from fourm.models.modality_embedding import ModalityEmbedding
from fourm.models.model_card import Tables
from fourm.utils.config import Range, check_keys, convert_arguments, convert_fields
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.memory import check_memory
from fourm.utils.options import option


@dataclass(kw_only=True)
class _ConfigKeys:
    """The keys of a hub configuration that :class:`FourM` does not take, or takes as another type."""

    domains_in: list[str]
    domains_out: list[str]
    image_size: int = option("side in pixels", 224, at_least=1, at_most=100_000)
    patch_size: int = option("side in pixels", 16, at_least=1, at_most=10_000)
    act_layer: str = option("class in torch.nn", "GELU")
    norm_bias: bool = True
    modalities: dict[str, Any] = option("declarations", {})
    share_embedding: bool = False


_SIZE, _RATE = Range(at_least=1, at_most=2**16), Range(at_least=0, below=1)
_RANGES = {
    "dim": _SIZE,
    "num_heads": _SIZE,
    "encoder_depth": Range(at_least=1, at_most=1000),
    "decoder_depth": Range(at_least=1, at_most=1000),
    "mlp_ratio": Range(above=0, at_most=100),
    "drop_path_rate_encoder": _RATE,
    "drop_path_rate_decoder": _RATE,
    "num_register_tokens": Range(at_least=0, at_most=100_000),
    "use_act_checkpoint": Range(at_least=0, at_most=1000),
    "init_std": Range(at_least=0, at_most=1000),
    "pos_temperature": Range(above=0, at_most=1e9),
}
_NOT_IN_CONFIGS = {"self", "encoder_embeddings", "decoder_embeddings", "modality_info", "norm_layer"}
_EXTRA_KEYS = tuple(field.name for field in dataclasses.fields(_ConfigKeys))
CONFIG_KEYS = (
    *(key for key in inspect.signature(FourM.__init__).parameters if key not in _NOT_IN_CONFIGS | {"act_layer"}),
    *_EXTRA_KEYS,
)
_MAX_PARAMETERS = 10**12


def check_config(config: Mapping[str, Any], where: str = "model config") -> dict[str, Any]:
    """Check a complete or partial hub configuration and convert its values to their types.

    Raises:
        UserError: If a key is unknown, or a value has the wrong type or is out of range.
    """
    check_keys(config, CONFIG_KEYS, where)
    extra = {key: value for key, value in config.items() if key in _EXTRA_KEYS}
    trunk = {key: value for key, value in config.items() if key not in _EXTRA_KEYS}
    values = convert_arguments(FourM, trunk, where, _RANGES) | convert_fields(_ConfigKeys, extra, where)
    return {key: value for key, value in values.items() if config[key] is not None}


def _check_memory(options: Mapping[str, Any], modalities: Iterable[Modality]) -> None:
    """Refuse a model that does not fit into the memory of this machine, because the system would kill the process.

    Raises:
        UserError: If the model is too large.
    """
    defaults = inspect.signature(FourM.__init__).parameters
    dim, encoder, decoder, ratio = (
        options.get(key, defaults[key].default) for key in ("dim", "encoder_depth", "decoder_depth", "mlp_ratio")
    )
    parameters = dim * dim * (encoder * (4 + 2 * ratio) + decoder * (8 + 2 * ratio))
    for modality in modalities:
        patch = (modality.num_channels or 0) * (modality.patch_size or 0) ** 2
        parameters += dim * max(modality.vocab_size or 0, patch, modality.max_tokens or 0)
    if parameters > _MAX_PARAMETERS:
        raise UserError(
            f"model config: about {parameters:.1e} parameters are more than any model has; lower 'dim' or the depths"
        )
    if torch.get_default_device().type == "cpu":
        check_memory("model config", parameters, "lower 'dim' or the depths")


class FM(FourM, Hub4M, tags=["any-to-any"], pipeline_tag="any-to-any"):
    """A 4M model from a hub configuration, with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``.

    Args:
        config: Any argument of :class:`FourM` (``act_layer`` by its name in ``torch.nn``) and

            * ``domains_in``, ``domains_out``: modalities that can be inputs, and targets
            * ``image_size``, ``patch_size``: sizes of images whose table entry does not set them
            * ``norm_bias``: whether norms learn a bias
            * ``modalities``: declarations of modalities that are not in the table, or differ from it
            * ``share_embedding``: whether ``to_logits`` is tied to ``token_emb``, as in training (published files are
              untied)

    Raises:
        UserError: If the configuration is incomplete or invalid, or the model does not fit into memory.
    """

    summary = (
        "A 4M model: one transformer that takes any subset of its input modalities and predicts any of its target "
        "modalities ([4M](https://arxiv.org/abs/2312.06647), [4M-21](https://arxiv.org/abs/2406.09406))."
    )
    config_keys = CONFIG_KEYS

    def __init__(self, config: dict):
        options = check_config(config)
        try:
            domains_in, domains_out = options.pop("domains_in"), options.pop("domains_out")
        except KeyError as missing:
            raise UserError(f"model config: the key {missing} is required") from None
        declarations = options.pop("modalities", None)
        modalities = resolve_modalities([*domains_in, *domains_out], declarations, "model config")
        sizes = {key: options.pop(key, default) for key, default in (("image_size", 224), ("patch_size", 16))}
        share = options.pop("share_embedding", False)
        _check_memory(options, modalities.values())
        super().__init__(
            {name: build_embedding(modalities[name], "encoder", sizes) for name in domains_in},
            {name: build_embedding(modalities[name], "decoder", sizes, share_embedding=share) for name in domains_out},
            modalities,
            **trunk_options(options),
        )
        self.config = copy.deepcopy(config)

    def model_facts(self) -> Tables:
        rows = [
            {
                "modality": name,
                "type": modality["type"],
                "input": name in self.config["domains_in"],
                "target": name in self.config["domains_out"],
                "vocabulary": modality["vocab_size"],
                "maximum tokens": modality["max_tokens"],
            }
            for name, modality in self.modality_info.items()
        ]
        return super().model_facts() | {"Modalities": rows}

    def usage(self, repo_id: str) -> str:
        return (
            f"{super().usage(repo_id)}\n\n"
            "# With its image tokenizers, it generates any of its target modalities from any of its inputs:\n"
            "from fourm.generation import Sampler\n\n"
            f'sampler = Sampler.load("{repo_id}", tokenizers="FOLDER_OF_TOKENIZERS")'
        )


def custom_embeddings(base: type[ModalityEmbedding] = ModalityEmbedding) -> dict[str, type[ModalityEmbedding]]:
    """Return the embedding classes, by name, that are defined outside this package and have been imported."""
    classes = {}
    for cls in base.__subclasses__():
        if cls.__module__.split(".")[0] != __name__.split(".")[0]:
            classes[cls.__name__] = cls
        classes |= custom_embeddings(cls)
    return classes


_EMBEDDING_RANGES = dict.fromkeys(
    (
        "vocab_size",
        "max_length",
        "max_sincos_pos_emb",
        "dim_tokens",
        "num_channels",
        "patch_size",
        "image_size",
        "orig_emb_dim",
        "bottleneck_dim",
    ),
    Range(at_least=1, at_most=10**8),
)


def build_embedding(modality: Modality, side: str, sizes: Mapping[str, int], **options: Any) -> ModalityEmbedding:
    """Build the embedding module that the modality table names.

    Args:
        modality: The modality to embed.
        side: ``encoder`` or ``decoder``.
        sizes: ``image_size`` and ``patch_size`` of images whose table entry does not set them.
        options: Further arguments of the module.

    Raises:
        UserError: If the modality cannot be used on this side, the class is unknown, or its options are invalid.
    """
    class_name = modality[f"{side}_embedding"]
    if class_name is None:
        raise UserError(f"modality {modality.name} cannot be {'an input' if side == 'encoder' else 'a target'}")
    classes = vars({"encoder": encoder_embeddings, "decoder": decoder_embeddings}[side]) | custom_embeddings()
    if class_name not in classes:
        raise UserError(
            f"modality {modality.name}: there is no {side} embedding '{class_name}'"
            f"{did_you_mean(class_name, classes)}; if it is your own, 'plugin' must name its module"
        )
    if modality.type == "img":
        options |= {"image_size": modality.input_size or sizes["image_size"]}
        options |= {"patch_size": modality.patch_size or sizes["patch_size"]}
    if modality.is_pixels:
        options["num_channels"] = modality.num_channels
    elif modality.type != "seq_emb":
        options["vocab_size"] = modality.vocab_size
    cls = classes[class_name]
    where = f"modality {modality.name}: embedding_options"
    declared = convert_arguments(cls, modality.embedding_options, where, _EMBEDDING_RANGES)
    return cls(**options | declared)
