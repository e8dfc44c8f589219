"""Tokenizers out of folders, files and the Hugging Face hub. A new kind of codebook is one line in ``TOKENIZERS``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fourm.utils.config import build
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.finite import check_finite
from fourm.vq import vqvae
from fourm.vq.feature_codebook import FeatureCodebook
from fourm.vq.patch_codebook import PatchCodebook
from fourm.vq.tokenizer import CONFIG, WEIGHTS, ImageTokenizer
from fourm.vq.weights import WeightsFile, download, load_model, open_weights

TOKENIZERS: dict[str, type[ImageTokenizer]] = {cls.kind: cls for cls in (PatchCodebook, FeatureCodebook)}
"""By the ``type`` in ``config.json``. Learned tokenizers have none: their weights tell which they are."""

_PUBLISHED = re.compile(r"4M_tokenizers_(.+?)_\d+k_")
_MODALITIES = {"edge": "canny_edge", "semseg": "semseg_coco", "human-poses": "human_poses", "sam-instance": "sam_mask"}
"""Names in those of published tokenizers → modalities, where they differ."""

_RENAMED = {
    "quantizer_type": "quant_type", "encoder_type": "enc_type", "decoder_type": "dec_type",
    "quantizer_ema_decay": "ema_decay", "input_size": "image_size", "input_size_max": "image_size",
    "input_size_enc": "image_size_enc", "input_size_dec": "image_size_dec", "input_size_sd": "image_size_sd",
    "use_xformer": "enable_xformer", "domain": "modality",
}  # fmt: skip
"""Training options → those of the constructor."""


def load_tokenizer(place: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """A codebook or a learned tokenizer, in evaluation mode.

    Args:
        place: a folder with ``config.json`` and ``model.safetensors``, a ``.safetensors`` file with the configuration in its
            header, a published ``.pth`` file, or an id on the Hugging Face hub.

    Raises:
        UserError: a file is missing or damaged, or of a type that is not registered.
    """
    weights = find_weights(place)
    file = weights.with_name(CONFIG)
    config = _read_config(file) if file.exists() else {}
    with open_weights(weights) as opened:
        if "type" in config:
            return _load_codebook(config, file, opened, device)
        config = config or (opened.header if weights.suffix == ".safetensors" else constructor_options(opened.header))
        if "modality" not in config and (name := _PUBLISHED.search(str(place))):
            config = config | {"modality": _MODALITIES.get(name[1], name[1])}
        return load_model(learned_class(opened.shapes), opened, config, device)


def find_weights(place: str | Path) -> Path:
    """The file of weights of a tokenizer, downloaded if it is on the hub.

    Raises:
        UserError: there is none.
    """
    path = Path(place)
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file() and (path / CONFIG).is_file():
        return path / WEIGHTS
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(place)):
        raise UserError(
            f"{place} is not a tokenizer folder ({CONFIG} and {WEIGHTS}), nor an id on the Hugging Face hub"
        )
    return download(str(place))


def learned_class(names: Iterable[str]) -> type[vqvae.VQ]:
    """The class of a learned tokenizer that has weights of these names."""
    roots = {name.partition(".")[0] for name in names}
    if "vae" in roots:
        return vqvae.VQControlNet
    if "decoder" not in roots:
        return vqvae.VQ
    return vqvae.VQVAE if "post_quant_proj" in roots else vqvae.DiVAE


def constructor_options(training: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a tokenizer that was trained with these options; sizes and channels follow from its weights."""
    options = dict(training)
    for name, value in training.items():
        if name in _RENAMED and value is not None:
            options[_RENAMED[name]] = value
    if "sam" in str(training.get("domain")) and (side := training.get("mask_size")):
        options |= {"image_size": side, "image_size_enc": side, "image_size_dec": side}
    return options


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
        raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: a file of this tokenizer is damaged: {error}") from error


def _load_codebook(
    config: Mapping[str, Any], file: Path, weights: WeightsFile, device: str | torch.device
) -> ImageTokenizer:
    options = dict(config)
    name = options.pop("type")
    if not isinstance(name, str) or name not in TOKENIZERS:
        raise UserError(f"{file}: unknown tokenizer type '{name}'{did_you_mean(str(name), TOKENIZERS)}")
    cls = TOKENIZERS[name]
    tensors = {name: weights.tensor(name).to(device) for name in weights.shapes}
    try:
        tokenizer = cls(build(cls.Config, options, str(file))).to(device)
        tokenizer.load_state_dict(tensors)
    except (RuntimeError, MemoryError) as error:  # sizes that nothing can have, too
        raise UserError(f"{weights.path} does not fit {CONFIG}: {' '.join(str(error).split())[:500]}") from error
    for name, tensor in tensors.items():
        check_finite(name, tensor, weights.path)
    return tokenizer.eval()
