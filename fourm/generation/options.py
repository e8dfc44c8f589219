"""Options of ``run_generation.py``.

A configuration may name other configurations (``model_config``, ``data_config``, ``gen_config``, ``sr_config``) and
override their keys; the command line overrides all of them. The second stage has the same keys as the first, prefixed
with ``sr_``. Keys of the published files that are called otherwise here are in
:mod:`fourm.generation.published_options`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fourm.generation.decoding import Detokenizer
from fourm.generation.prompts import check_prompts
from fourm.generation.published_options import PublishedOptions, renamed, without_published
from fourm.generation.settings import TargetSettings
from fourm.utils.config import check_keys, convert, convert_fields, load_yaml, make, resolve_options
from fourm.utils.errors import UserError
from fourm.utils.options import flat_options, option, option_group, parse_overrides
from fourm.utils.paths import PACKAGE, AnyPath, InputPath, expand_path, shipped
from fourm.vq.diffusion import DECODING_STEPS


@dataclass(frozen=True, kw_only=True)
class StageOptions(TargetSettings):
    """The model, inputs, targets and settings of one stage."""

    model: InputPath = option("run folder, folder with a model, s3:// URL of one of these, or id on the hub")
    tokenizers: InputPath | dict[str, InputPath] | None = option(
        "folder with one tokenizer per modality of images, or a mapping from modality to folder or hub id", None
    )
    text_tokenizer: InputPath | None = option("text vocabulary (default: that of the run)", None)
    cond_domains: str | None = option(
        "input modalities, joined by '-' (default: all known ones that the model reads)", None
    )
    target_domains: str | None = option(
        "modalities to generate, in this order, joined by '-' (default: those of the model's generation.yaml)", None
    )
    cfg_grow_conditioning: bool = option("let finished targets guide the targets after them", True)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(StageOptions):
    """The first stage, its data, and the output of both stages."""

    cond_domains: str | None = option(
        "input modalities, joined by '-' (default: those of the model's generation.yaml)", None
    )
    data: InputPath | list[str] = option(
        "folder with one folder per modality, folder of pictures, one picture, or prompts "
        "(a list, a .txt or a .tsv file)"
    )
    output_dir: AnyPath = option("folder of the results (default of prompts: generated/PROMPT-SEED)")
    class_names: list[str] = option("names of the classes of segmentations (default: the model's)", [])
    model_config: InputPath | None = option("YAML file with further keys of the models", None)
    data_config: InputPath | None = option("YAML file with further keys of the data", None, short="-dc")
    gen_config: InputPath | None = option("YAML file with further keys of the targets and settings", None, short="-gc")
    sr_config: InputPath | None = option(
        "YAML file with further keys of the second stage, with or without their 'sr_'", None, short="-src"
    )
    detokenizer_steps: int = option(
        "diffusion steps of tokenizers that decode by diffusion", DECODING_STEPS, at_least=1, at_most=1000
    )
    controlnet_id: InputPath | None = option(
        "ControlNet that decodes tokens of RGB: folder, file, or id on the hub", None
    )
    activate_controlnet: bool = option("decode tokens of RGB by the ControlNet", False)
    controlnet_guidance_scale: float = option("guidance of the ControlNet", 2.5, at_least=0, at_most=1000)
    controlnet_cond_scale: float = option("weight of the tokens in the ControlNet", 0.8, at_least=0, at_most=1000)
    num_samples: int | None = option("use only this many samples of the data (default: all)", None, at_least=1)
    num_variations: int = option("results per sample, with different seeds", 1, at_least=1, at_most=10**6)
    seed: int = option("seed of the first result", 0, at_least=0, at_most=2**62)
    batch_size: int = option("results generated at a time", 8, at_least=1, at_most=10**6)
    sheet_samples: int = option("maximum number of rows of the contact sheet", 12, at_least=1, at_most=10_000)
    plugin: str = option("Python module that defines your own modalities: my_package.my_modalities", "")
    device: str = option("device; 'auto' uses cuda if it is available, and the cpu otherwise", "auto")
    dtype: Literal["float32", "bfloat16", "float16"] = option("precision of the model", "float32")
    compile: bool = option("compile the blocks with torch.compile", False)
    sr: StageOptions | None = option_group(
        "second stage: a super-resolution model continues from the inputs and the tokens of the first stage, whose "
        "tokenizers and vocabulary it uses unless it has its own",
        StageOptions,
    )

    def __post_init__(self) -> None:
        resolve_options(self)
        if self.activate_controlnet and not self.controlnet_id:
            raise UserError("'activate_controlnet' needs a ControlNet; set 'controlnet_id'")

    def detokenizer(self) -> Detokenizer:
        """Return how images are decoded by diffusion."""
        return Detokenizer(self.detokenizer_steps, self.controlnet_guidance_scale, self.controlnet_cond_scale)

    def stages(self) -> dict[str, StageOptions]:
        """Return the stages in order, by the prefix of their keys."""
        return {"": self} if self.sr is None else {"": self, "sr_": self.sr}

    def flat(self) -> dict[str, Any]:
        """Return all options by their flat keys, as in YAML and on the command line."""
        values = dataclasses.asdict(self)
        second = values.pop("sr") or {}
        return {**values, **{f"sr_{key}": value for key, value in second.items()}}


DEMO_MODEL = PACKAGE / "trained" / "demo"
"""The folder of the packaged model."""


@dataclass(frozen=True, kw_only=True)
class AllOptions(GenerationOptions, PublishedOptions):
    """All keys of the command line and of files"""

    demo: bool = option("use the packaged model, with its settings", False)
    prompt: str | None = option("one prompt, instead of data", None)


def parse(argv: list[str] | None = None) -> GenerationOptions:
    """Parse the options: the command line overrides the configuration, which overrides the files that it names.

    Raises:
        UserError: If a key is unknown, a value has the wrong type, or a required key is missing.
    """
    overrides = parse_overrides(AllOptions, argv, "Generate with a 4M model.", config_file=True)
    path = overrides.pop("config", None)
    path = shipped(expand_path(path, "command line: 'config'")) if path else None
    content = (_read(load_yaml(path), path, path) if path else {}) | _read(overrides, "command line", None)
    files = {"config": path}
    for key in ("data_config", "model_config", "gen_config", "sr_config"):
        file = content.get(key)
        files[key] = file
        if file:
            defaults = load_yaml(file)
            if key == "sr_config":
                defaults = {f"sr_{str(name).removeprefix('sr_')}": value for name, value in defaults.items()}
            content = _read(defaults, file, file) | content
    content = without_published(content, files)
    where = path or "command line"
    if "output_dir" not in content and isinstance(content.get("data"), list):
        name = re.sub(r"\W+", "_", content["data"][0]).strip("_")[:60]
        content["output_dir"] = f"generated/{name or 'prompt'}-{content.get('seed', 0)}"
    second = {name: content.pop(f"sr_{name}") for name in flat_options(StageOptions) if f"sr_{name}" in content}
    if second:
        content["sr"] = make(StageOptions, second, f"{where}: second stage, keys with sr_")
    return make(GenerationOptions, content, where)


def _read(content: Mapping[str, Any], where: str, config: str | None) -> dict[str, Any]:
    """Convert the values of flat keys; paths may also be relative to the folder of ``config``."""
    content = renamed(content)
    check_keys(content, flat_options(AllOptions), where)
    content = _without_shortcuts(content, where)
    second = {key.removeprefix("sr_"): value for key, value in content.items() if _is_second(key)}
    first = {key: value for key, value in content.items() if not _is_second(key)}
    values = convert_fields(AllOptions, first, where, config)
    second = convert_fields(StageOptions, second, f"{where}: second stage, keys with sr_", config)
    return {**values, **{f"sr_{key}": value for key, value in second.items()}}


def _without_shortcuts(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Replace ``demo`` by its model and ``prompt`` by data."""
    for key, other in (("demo", "model"), ("prompt", "data")):
        if content.get(key) not in (None, False) and content.get(other) is not None:
            raise UserError(f"{where}: '{key}' and '{other}' exclude each other; leave out one of them")
    content = dict(content)
    if convert(content.pop("demo", None) or False, bool, f"{where}: 'demo'"):
        content["model"] = str(DEMO_MODEL)
    prompt = content.pop("prompt", None)
    if prompt is not None:
        content["data"] = check_prompts([prompt], where)
    return content


def _is_second(key: str) -> bool:
    return key.startswith("sr_") and key.removeprefix("sr_") in flat_options(StageOptions)
