"""Loads tokenizers from folders, files, stores and the Hugging Face hub. :data:`TOKENIZERS` lists the codebooks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fourm.utils.checkpoints import CHECKSUMS, newest_checkpoint
from fourm.utils.config import build
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.finite import check_finite
from fourm.utils.model_store import download_if_remote, find_model
from fourm.vq import vqvae
from fourm.vq.feature_codebook import FeatureCodebook
from fourm.vq.patch_codebook import PatchCodebook
from fourm.vq.tokenizer import CONFIG, WEIGHTS, ImageTokenizer
from fourm.vq.weights import WeightsFile, download, load_model, open_weights

TOKENIZERS: dict[str, type[ImageTokenizer]] = {cls.kind: cls for cls in (PatchCodebook, FeatureCodebook)}
"""The classes of codebooks by the ``type`` in their ``config.json``. The class of a learned tokenizer follows from its
weights instead."""

_PUBLISHED = re.compile(r"4M_tokenizers_(.+?)_\d+k_")
_MODALITIES = {"edge": "canny_edge", "semseg": "semseg_coco", "human-poses": "human_poses", "sam-instance": "sam_mask"}
"""Modalities by their names in those of published tokenizers, where the two differ."""

_RENAMED = {
    "quantizer_type": "quant_type",
    "encoder_type": "enc_type",
    "decoder_type": "dec_type",
    "quantizer_ema_decay": "ema_decay",
    "input_size": "image_size",
    "input_size_max": "image_size",
    "input_size_enc": "image_size_enc",
    "input_size_dec": "image_size_dec",
    "input_size_sd": "image_size_sd",
    "use_xformer": "enable_xformer",
    "domain": "modality",
}
"""Maps the names of training options to those of the constructor."""


def load_tokenizer(place: str | Path, device: str | torch.device = "cpu", encoder_only: bool = False) -> ImageTokenizer:
    """Load a codebook or a learned tokenizer, in evaluation mode.

    Args:
        place: A folder with ``config.json`` and ``model.safetensors``, a run folder (the newest checkpoint is used
            while the run is unfinished), a ``.safetensors`` file with the configuration in its header, a published
            ``.pth`` file, the ``s3://`` URL of one of these, or an id on the Hugging Face hub.
        device: The device of the tokenizer.
        encoder_only: Load only the encoder and the quantizer of a learned tokenizer.

    Raises:
        UserError: A file is missing or damaged, or the type of the tokenizer is not registered.
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
        return load_model(vqvae.VQ if encoder_only else learned_class(opened.shapes), opened, config, device)


def find_weights(place: str | Path) -> Path:
    """Return the file with the weights of a tokenizer, after downloading it if it is in a store or on the hub.

    Returns:
        A file for :func:`fourm.vq.weights.open_weights`; for an unfinished run, the ``checksums.json`` of its newest
        checkpoint.

    Raises:
        UserError: There is no tokenizer at this place.
    """
    path = Path(download_if_remote(place, find_model))
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file() and (path / CONFIG).is_file():
        return path / WEIGHTS
    if (path / CHECKSUMS).is_file() or (path / "checkpoints").is_dir():
        return newest_checkpoint(path) / CHECKSUMS
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(place)):
        raise UserError(
            f"{place} is not a tokenizer folder ({CONFIG} and {WEIGHTS}), nor a run with checkpoints, nor an id on the "
            "Hugging Face hub"
        )
    return download(str(place))


def learned_class(names: Iterable[str]) -> type[vqvae.VQ]:
    """Return the class of a learned tokenizer whose weights have these names."""
    roots = {name.partition(".")[0] for name in names}
    if "vae" in roots:
        return vqvae.VQControlNet
    if "decoder" not in roots:
        return vqvae.VQ
    return vqvae.VQVAE if "post_quant_proj" in roots else vqvae.DiVAE


def constructor_options(training: Mapping[str, Any]) -> dict[str, Any]:
    """Convert training options to constructor options; the weights determine the remaining sizes and channels."""
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
        raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error


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
    except (RuntimeError, MemoryError) as error:  # also for impossible sizes
        raise UserError(f"{weights.path} does not fit {CONFIG}: {' '.join(str(error).split())[:500]}") from error
    for name, tensor in tensors.items():
        check_finite(name, tensor, weights.path)
    return tokenizer.eval()
