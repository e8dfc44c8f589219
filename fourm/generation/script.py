"""The command ``run_generation.py``: a configuration → a folder of results and a contact sheet.

The configuration may name others (``model_config``, ``data_config``), whose keys it overrides; the command line overrides
all. Sample i draws with seed ``seed + i`` whatever the batch and the process, so an interrupted command that is given again
makes what is missing, and the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.data_config import split_domains
from fourm.data.folders import Folders
from fourm.data.layout import existing_folders
from fourm.data.modality_info import Modality
from fourm.data.raw_sample import BadSample, OpenFiles
from fourm.generation.inputs import find_modality
from fourm.generation.plotting import plot
from fourm.generation.results import RESULT, read_result, write_result
from fourm.generation.sampler import Sampler
from fourm.generation.settings import COLUMNS
from fourm.utils.config import build, load_yaml
from fourm.utils.errors import DataError, UserError
from fourm.utils.files import atomic_path
from fourm.utils.options import option, parse_overrides

SETTINGS, SHEET = "settings.json", "sheet.png"
_PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class GenerationOptions:
    """The keys of a configuration and of the command line."""

    model: str = option("run folder, folder with a model, or id on the hub")
    data: Any = option(
        "folder with a folder per modality, folder of pictures, one picture, or prompts: a list or a .txt"
    )
    cond_domains: str = option("modalities that are given, joined by '-'")
    target_domains: str = option("modalities to generate, in this order, joined by '-'")
    output_dir: str = option("where the results go")
    tokenizers: Any = option("folder with a tokenizer per modality of images, or modality → folder or hub id", None)
    text_tokenizer: str | None = option("text vocabulary (default: that of the run)", None)
    class_names: list[str] = option("of the class ids of segmentations", [])
    model_config: str | None = option("YAML file with further keys of the model", None)
    data_config: str | None = option("YAML file with further keys of the data", None)
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
    top_k: Any = option("only the likeliest tokens: a count, or a share of the vocabulary", 0.0)
    top_p: float = option("only the likeliest tokens that have this probability together", 0.0)
    num_samples: int | None = option("the first so many samples of the data (default: all)", None)
    num_variations: int = option("results per sample, with other seeds", 1)
    seed: int = option("of the first result", 0)
    batch_size: int = option("results at once", 8)
    sheet_samples: int = option("rows of the contact sheet", 12)
    device: str = option("'auto' = cuda where there is one, else cpu", "auto")
    dtype: Literal["float32", "bfloat16", "float16"] = option("precision", "float32")

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_variations", "batch_size", "sheet_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"'{name}' must be at least 1, not {value}")


# What a folder of results may be continued with: everything else changes them.
_FREE = {"output_dir", "batch_size", "sheet_samples", "device", "num_samples", "model_config", "data_config"}


def parse(argv: list[str] | None = None) -> GenerationOptions:
    """Files that a configuration names < the configuration < the command line."""
    overrides = parse_overrides(GenerationOptions, argv, "Generate with a 4M model.", config_file=True)
    path = overrides.pop("config", None)
    content = (load_yaml(path) if path else {}) | overrides
    for key in ("data_config", "model_config"):
        if content.get(key):
            content = load_yaml(content[key]) | content
    return build(GenerationOptions, content, path or "command line")


class Job(NamedTuple):
    """One result to make."""

    name: str
    seed: int
    inputs: Mapping[str, Any]


def run(options: GenerationOptions, rank: int = 0, world_size: int = 1) -> None:
    """Make the results that are missing, every ``world_size``-th from ``rank`` on.

    Raises:
        UserError: options or data that do not suit the model.
    """
    sampler = Sampler.load(
        options.model, options.tokenizers, options.text_tokenizer, options.class_names, options.device,
        None if options.dtype == "float32" else getattr(torch, options.dtype),
    )  # fmt: skip
    find = partial(find_modality, known=sampler.inputs, role="an input")
    conditions = [find(name) for name in _split(options.cond_domains, sampler.inputs, "cond_domains")]
    targets = _split(options.target_domains, sampler.targets, "target_domains")
    out = Path(options.output_dir)
    every = jobs(options, {name: sampler.inputs[name] for name in conditions})
    _check_settings(out, options)
    mine = every[rank::world_size]
    pending = [job for job in mine if not (out / job.name / RESULT).exists()]
    settings = {key: value for key in COLUMNS if (value := getattr(options, key)) is not None}
    with tqdm(total=len(mine), initial=len(mine) - len(pending), unit=" samples", disable=None) as bar:
        for start in range(0, len(pending), options.batch_size):
            batch = pending[start : start + options.batch_size]
            results = sampler(
                [_read(job) for job in batch], targets, [job.seed for job in batch], options.top_k, options.top_p,
                options.cfg_grow_conditioning, **settings,
            )  # fmt: skip
            for job, result in zip(batch, results, strict=True):
                write_result(out / job.name, result)
            bar.update(len(batch))
    finished = [job for job in every if (out / job.name / RESULT).exists()]
    if len(finished) == len(every):  # the last process sees them all
        shown = [read_result(out / job.name) for job in every[: options.sheet_samples]]
        with atomic_path(out / SHEET) as path:
            plot(shown).savefig(path)
        print(f"{len(every)} samples: {out}\ncontact sheet: {out / SHEET}")


def jobs(options: GenerationOptions, conditions: Mapping[str, Modality]) -> list[Job]:
    """All results, in the order of the data and then of the variations.

    Args:
        conditions: the modalities that are given.
    """
    samples = _samples(options.data, conditions)[: options.num_samples]
    many = options.num_variations > 1
    return [
        Job(f"{key}-{variation}" if many else key, options.seed + index * options.num_variations + variation, inputs)
        for index, (key, inputs) in enumerate(samples)
        for variation in range(options.num_variations)
    ]


def _samples(data: Any, conditions: Mapping[str, Modality]) -> list[tuple[str, Mapping[str, Any]]]:
    """Key and inputs of every sample."""
    if isinstance(data, (list, tuple)):
        (text,) = _only(conditions, "seq", "prompts")
        return [(f"{index:05d}", {text: str(prompt)}) for index, prompt in enumerate(data)]
    path = Path(str(data))
    if path.is_file() and path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        return _samples([line for line in lines if line.strip()], conditions)
    pictures = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix.lower() in _PICTURES)
    if pictures:
        (image,) = _only(conditions, "img", "pictures")
        return [(picture.stem, {image: picture}) for picture in pictures]
    if not path.is_dir():
        raise UserError(
            f"data: there is neither a file nor a folder {data}; a list of prompts is written [one, another]"
        )
    wanted = {name: modality.path or name for name, modality in conditions.items()}
    ledger = BadSampleLedger("data", max_bad_fraction=1.0)
    names = sorted({wanted[name] for name in wanted} & {*existing_folders(path)})
    if not names:
        raise UserError(f"data: {path} has no folder {' or '.join(wanted.values())}, and no pictures")
    return [(sample.key, {"": sample}) for sample in Folders(str(path), wanted, None, ledger).all(ledger)]


def _read(job: Job) -> Mapping[str, Any]:
    """The values of a job; those of a folder are read only now."""
    if "" not in job.inputs:
        return job.inputs
    try:
        return job.inputs[""].values(OpenFiles(), keep_pixels=False)
    except BadSample as error:
        raise DataError(f"data: {error}") from error


def _only(conditions: Mapping[str, Modality], kind: str, what: str) -> Sequence[str]:
    if [modality.type for modality in conditions.values()] != [kind]:
        needed = "one text" if kind == "seq" else "one modality of images"
        raise UserError(f"data: {what} need {needed} in cond_domains, not {', '.join(conditions)}")
    return [*conditions]


def _split(names: str, known: Mapping[str, Modality], where: str) -> tuple[str, ...]:
    """Names joined by ``-``, short ones too."""
    short = {name.split("@")[0].removeprefix("tok_") for name in known} | {name.split("@")[0] for name in known}
    return split_domains(names, {*known, *short}, where)


def _check_settings(out: Path, options: GenerationOptions) -> None:
    """Results of other settings must not get mixed.

    Raises:
        UserError: ``out`` was made with others.
    """
    current = {key: value for key, value in dataclasses.asdict(options).items() if key not in _FREE}
    current = json.loads(json.dumps(current, default=str))
    record = out / SETTINGS
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        for key, value in current.items():
            if before.get(key) != value:
                raise UserError(
                    f"{out} was made with {key} {before.get(key)}, not {value}: choose another output_dir, or remove it"
                )
    else:
        with atomic_path(record) as path:
            path.write_text(json.dumps(current, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """The command; started by torchrun, each process takes its share of the samples, and a GPU of its own."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    run(parse(argv), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
