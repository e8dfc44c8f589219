"""The keys of ``run_generation.py``: those of one stage, and all.

A configuration may name others (``model_config``, ``data_config``, ``sr_config``), whose keys it overrides; the command line
overrides all. The second stage has the keys of the first, with ``sr_`` before them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fourm.utils.config import check_keys, convert_fields, load_yaml, make, resolve_options
from fourm.utils.options import flat_options, option, option_group, parse_overrides
from fourm.utils.paths import AnyPath, InputPath, expand_path


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """A model, what it generates, and from what."""

    model: InputPath = option("run folder, folder with a model, s3:// URL of one of these, or id on the hub")
    tokenizers: InputPath | dict[str, InputPath] | None = option(
        "folder with a tokenizer per modality of images, or modality → folder or hub id", None
    )
    text_tokenizer: InputPath | None = option("text vocabulary (default: that of the run)", None)
    cond_domains: str | None = option("of what is known, joined by '-' (default: all that the model reads)", None)
    target_domains: str = option("modalities to generate, in this order, joined by '-'")
    tokens_per_target: Any = option(
        "tokens of each target; from here on: one value, or one per target joined by '-'", None
    )
    autoregression_schemes: Any = option("maskgit, roar (images) or autoregressive (sequences)", None)
    decoding_steps: Any = option("steps of each image", None)
    token_decoding_schedules: Any = option("linear or cosine", None)
    temps: Any = option("temperatures; 0 = the likeliest token", None)
    temp_schedules: Any = option("constant, linear or onex:MIN:POWER", None)
    cfg_scales: Any = option("guidance; 1 = none", None)
    cfg_schedules: Any = option("constant", None)
    cfg_grow_conditioning: bool = option("finished targets guide those after them", True)
    top_k: int | float = option(
        "only the likeliest tokens: a count, or a share of the vocabulary", 0.0, at_least=0, at_most=10**8
    )
    top_p: float = option("only the likeliest tokens that have this probability together", 0.0, at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(StageOptions):
    """The first stage, what it is given, and where the results go."""

    cond_domains: str = option("modalities that are given, joined by '-'")
    data: InputPath | list[str] = option(
        "folder with a folder per modality, folder of pictures, one picture, or prompts: a list or a .txt"
    )
    output_dir: AnyPath = option("where the results go")
    class_names: list[str] = option("of the class ids of segmentations", [])
    model_config: InputPath | None = option("YAML file with further keys of the models", None)
    data_config: InputPath | None = option("YAML file with further keys of the data", None)
    sr_config: InputPath | None = option("YAML file with further keys of the second stage, without their 'sr_'", None)
    num_samples: int | None = option("the first so many samples of the data (default: all)", None, at_least=1)
    num_variations: int = option("results per sample, with other seeds", 1, at_least=1, at_most=10**6)
    seed: int = option("of the first result", 0, at_least=0, at_most=2**62)
    batch_size: int = option("results at once", 8, at_least=1, at_most=10**6)
    sheet_samples: int = option("rows of the contact sheet", 12, at_least=1, at_most=10_000)
    plugin: str = option("Python module of your own modalities: my_package.my_modalities", "")
    device: str = option("'auto' = cuda where there is one, else cpu", "auto")
    dtype: Literal["float32", "bfloat16", "float16"] = option("precision", "float32")
    compile: bool = option("torch.compile the blocks", False)
    sr: StageOptions | None = option_group(
        "second stage: a super-resolution model goes on from what is given and the tokens of the first; tokenizers and "
        "vocabulary are those of the first where it has no others",
        StageOptions,
    )

    def __post_init__(self) -> None:
        resolve_options(self)

    def stages(self) -> dict[str, StageOptions]:
        """The stages in their order, by what their keys begin with."""
        return {"": self} if self.sr is None else {"": self, "sr_": self.sr}

    def flat(self) -> dict[str, Any]:
        """All keys as they are written."""
        values = dataclasses.asdict(self)
        second = values.pop("sr") or {}
        return {**values, **{f"sr_{key}": value for key, value in second.items()}}


def parse(argv: list[str] | None = None) -> GenerationOptions:
    """Files that a configuration names < the configuration < the command line.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a required key that is missing.
    """
    overrides = parse_overrides(GenerationOptions, argv, "Generate with a 4M model.", config_file=True)
    path = overrides.pop("config", None)
    path = expand_path(path, "command line: 'config'") if path else None
    content = (_read(load_yaml(path), path, path) if path else {}) | _read(overrides, "command line", None)
    for key in ("data_config", "model_config", "sr_config"):
        if named := content.get(key):
            prefix = "sr_" if key == "sr_config" else ""
            further = {f"{prefix}{name}": value for name, value in load_yaml(named).items()}
            content = _read(further, named, named) | content
    where = path or "command line"
    second = {name: content.pop(f"sr_{name}") for name in flat_options(StageOptions) if f"sr_{name}" in content}
    if second:
        content["sr"] = make(StageOptions, second, f"{where}: second stage, keys with sr_")
    return make(GenerationOptions, content, where)


def _read(content: Mapping[str, Any], where: str, config: str | None) -> dict[str, Any]:
    """Converted values by their flat keys; files are also looked for beside ``config``."""
    check_keys(content, flat_options(GenerationOptions), where)
    second = {key.removeprefix("sr_"): value for key, value in content.items() if _is_second(key)}
    first = {key: value for key, value in content.items() if not _is_second(key)}
    values = convert_fields(GenerationOptions, first, where, config)
    second = convert_fields(StageOptions, second, f"{where}: second stage, keys with sr_", config)
    return {**values, **{f"sr_{key}": value for key, value in second.items()}}


def _is_second(key: str) -> bool:
    return key.startswith("sr_") and key.removeprefix("sr_") in flat_options(StageOptions)
