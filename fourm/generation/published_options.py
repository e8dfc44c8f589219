"""Keys of the published generation files that have other names here, or no meaning.

The published files name a tokenizer per modality by keys of their own, and name the run and its output folder after the
files. ``renamed`` and ``without_published`` convert such keys to those of
:class:`fourm.generation.options.GenerationOptions`, so that both kinds of files can be combined.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fourm.utils.options import option
from fourm.utils.paths import InputPath

log = logging.getLogger("fourm")

_TOKENIZERS = {
    "rgb_tok_id": ("rgb",),
    "depth_tok_id": ("depth",),
    "normal_tok_id": ("normal",),
    "edges_tok_id": ("canny_edge", "sam_edge"),
    "semseg_tok_id": ("semseg",),
    "clip_tok_id": ("clip",),
    "dinov2_tok_id": ("dinov2",),
    "imagebind_tok_id": ("imagebind",),
    "dinov2_glob_tok_id": ("dinov2_global",),
    "imagebind_glob_tok_id": ("imagebind_global",),
    "sam_instance_tok_id": ("sam_instance",),
    "human_poses_tok_id": ("human_poses",),
}
"""Keys of tokenizers, and the kinds of modalities that they serve."""
_NAMES = {"data_path": "data", "text_tok_path": "text_tokenizer", "num_log_images": "sheet_samples"}
"""Published name → name here."""
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_ALL_SAMPLES = 200  # more rows make a contact sheet that is too high for matplotlib and for most viewers
_AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class PublishedOptions:
    """Keys of the published files"""

    rgb_tok_id: InputPath | None = option("tokenizer of RGB: folder, .safetensors file, or id on the hub", None)
    depth_tok_id: InputPath | None = option("tokenizer of depth", None)
    normal_tok_id: InputPath | None = option("tokenizer of normals", None)
    edges_tok_id: InputPath | None = option("tokenizer of Canny and SAM edges", None)
    semseg_tok_id: InputPath | None = option("tokenizer of segmentations", None)
    clip_tok_id: InputPath | None = option("tokenizer of CLIP features", None)
    dinov2_tok_id: InputPath | None = option("tokenizer of DINOv2 features", None)
    imagebind_tok_id: InputPath | None = option("tokenizer of ImageBind features", None)
    dinov2_glob_tok_id: InputPath | None = option("tokenizer of global DINOv2 features", None)
    imagebind_glob_tok_id: InputPath | None = option("tokenizer of global ImageBind features", None)
    sam_instance_tok_id: InputPath | None = option("tokenizer of SAM instances", None)
    human_poses_tok_id: InputPath | None = option("tokenizer of human poses", None)
    data_path: Any = option("the same as data", None)
    text_tok_path: InputPath | None = option("the same as text_tokenizer", None)
    num_log_images: Any = option("the same as sheet_samples; 'all' is possible", None)
    name: str = option("name of the settings; 'auto' is that of their files", _AUTO)
    data_name: str = option("name of the data; 'auto' is that of their file", _AUTO)
    image_size: int | None = option("ignored: it follows from the modalities", None)
    image_size_metrics: int | None = option("ignored: no metrics are computed", None)
    log_wandb: bool = option("ignored: results are files", False)
    wandb_project: str | None = option("ignored", None)
    wandb_entity: str | None = option("ignored", None)
    wandb_run_name: str | None = option("ignored", None)
    wandb_mode: str | None = option("ignored", None)
    save_all_outputs: bool = option("ignored: all results are written", False)
    num_workers: int | None = option("ignored: files are read when they are needed", None)
    dist_gen: bool = option("ignored: torchrun distributes the samples", False)
    s3_endpoint: str | None = option("ignored: results are local files", None)
    s3_path: str | None = option("ignored", None)


_WITHOUT_EFFECT = ("log_wandb", "dist_gen", "s3_path")
"""Ignored keys whose users expect something to happen."""


def renamed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of one file, or of the command line, and drop those that configure Weights & Biases."""
    known = {item.name for item in fields(PublishedOptions)}
    result = {
        _NAMES.get(key, key): value
        for key, value in content.items()
        if key in known or not str(key).startswith("wandb_")  # keys of a YAML file may be numbers
    }
    if result.get("sheet_samples") == "all":
        result["sheet_samples"] = _ALL_SAMPLES
    if isinstance(dtype := result.get("dtype"), str):
        result["dtype"] = _DTYPES.get(dtype, dtype)
    return result


def without_published(content: Mapping[str, Any], files: Mapping[str, str | None]) -> dict[str, Any]:
    """Replace the keys of :class:`PublishedOptions` by those that are used.

    Args:
        content: All keys, already converted to their types.
        files: The paths of ``config``, ``data_config``, ``gen_config`` and ``sr_config``.

    Returns:
        Keys of :class:`fourm.generation.options.GenerationOptions`. Of the tokenizers, only those of modalities that
        are read or generated are left.
    """
    known = {item.name for item in fields(PublishedOptions)}
    result = {key: value for key, value in content.items() if key not in known}
    domains = (str(content.get(key) or "") for key in ("cond_domains", "target_domains", "sr_target_domains"))
    used = {name.split("@")[0].removeprefix("tok_") for names in domains for name in names.split("-")}
    tokenizers = {
        kind: content[key] for key, kinds in _TOKENIZERS.items() for kind in kinds if content.get(key) and kind in used
    }
    if tokenizers and not isinstance(content.get("tokenizers"), str):
        result["tokenizers"] = {**(content.get("tokenizers") or {}), **tokenizers}
    for key in _WITHOUT_EFFECT:
        if content.get(key):
            log.warning("%s has no effect here: results are written to output_dir", key)
    if Path(str(content.get("output_dir", ""))).name == _AUTO:
        result["output_dir"] = str(Path(content["output_dir"]).parent / Path(*_names(content, files)))
    data = content.get("data")
    if isinstance(data, str) and not Path(data).exists() and Path(f"{data}.tsv").is_file():
        result["data"] = f"{data}.tsv"
    return result


def _names(content: Mapping[str, Any], files: Mapping[str, str | None]) -> list[str]:
    """Return the names of the models, the data and the settings."""
    stems = {key: Path(path).stem for key, path in files.items() if path}
    settings = "+".join(stems[key] for key in ("gen_config", "sr_config") if key in stems)
    names = (
        stems.get("config", ""),
        stems.get("data_config", "") if content.get("data_name", _AUTO) == _AUTO else content["data_name"],
        settings if content.get("name", _AUTO) == _AUTO else content["name"],
    )
    return [name for name in names if name] or [_AUTO]
