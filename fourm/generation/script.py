"""The command ``run_generation.py``: a configuration → a folder of results and a contact sheet.

Sample i draws with seed ``seed + i`` whatever the batch and the process, so an interrupted command that is given again
makes what is missing, and the same. Results say what they were made from: those of other inputs or models are made again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.data_config import split_domains
from fourm.data.folders import Folders
from fourm.data.layout import existing_folders
from fourm.data.modality_info import Modality
from fourm.data.raw_sample import BadSample, OpenFiles
from fourm.generation.inputs import find_modality
from fourm.generation.options import GenerationOptions, parse
from fourm.generation.origins import digest_of_inputs, digest_of_models
from fourm.generation.plotting import plot
from fourm.generation.prompts import check_prompts, read_prompts
from fourm.generation.results import check_result, origin_of, read_result, write_result
from fourm.generation.sampler import Sampler
from fourm.generation.settings import COLUMNS
from fourm.generation.stages import Stage, generate
from fourm.utils.device import share_gpus
from fourm.utils.errors import DataError, UserError
from fourm.utils.files import atomic_path, check_file
from fourm.utils.plugin import load_plugin
from fourm.utils.ranks import torchrun_ranks
from fourm.utils.urls import redact

SETTINGS, SHEET = "settings.json", "sheet.png"
_PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_TABLES = {".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".md", ".parquet"}


# What a folder of results may be continued with: everything else changes them.
_FREE = {
    "output_dir", "batch_size", "sheet_samples", "device", "compile", "num_samples", "model_config", "data_config", "sr_config",
    "plugin",
}  # fmt: skip


class Job(NamedTuple):
    """One result to make.

    Attributes:
        inputs: modality → value; or "" → a sample of a folder.
        models: digest of what makes it.
    """

    name: str
    seed: int
    inputs: Mapping[str, Any]
    models: str = ""

    def origin(self) -> dict[str, Any]:
        """What its result depends on, beside the settings in ``settings.json``."""
        return {"seed": self.seed, "inputs": digest_of_inputs(self.inputs), "models": self.models}

    def is_done(self, out: Path) -> bool:
        """Whether there is a result of just this."""
        before = origin_of(out / self.name)
        return before is not None and before == self.origin()


def run(options: GenerationOptions, rank: int = 0, world_size: int = 1) -> None:
    """Make the results that are missing, every ``world_size``-th from ``rank`` on.

    Raises:
        UserError: options or data that do not suit the models.
    """
    out = Path(options.output_dir)
    _check_output(out)
    stages = load_stages(options)
    every = jobs(options, {name: stages[0].sampler.inputs[name] for name in stages[0].conditions})
    models = digest_of_models(stages)
    every = [job._replace(models=models) for job in every]
    mine = every[rank::world_size]
    pending = [job for job in mine if not job.is_done(out)]
    for job in pending:
        check_result(out / job.name)
    _check_settings(out, options)
    with tqdm(total=len(mine), initial=len(mine) - len(pending), unit=" samples", disable=None) as bar:
        for start in range(0, len(pending), options.batch_size):
            batch = pending[start : start + options.batch_size]
            results = generate(stages, [_read(job) for job in batch], [job.seed for job in batch])
            for job, result in zip(batch, results, strict=True):
                write_result(out / job.name, result, job.origin())
            bar.update(len(batch))
    others = (job for index, job in enumerate(every) if index % world_size != rank)
    if all(job.is_done(out) for job in others):  # the last process sees them all
        shown = [read_result(out / job.name) for job in every[: options.sheet_samples]]
        with atomic_path(out / SHEET) as path:
            plot(shown).savefig(path)
        print(f"{len(every)} samples: {out}\ncontact sheet: {out / SHEET}")


def load_stages(options: GenerationOptions) -> list[Stage]:
    """The models, with modalities by their full names; whatever does not suit one of them is said now, not hours later.

    Raises:
        UserError: it does not.
    """
    stages: list[Stage] = []
    known: list[str] = []
    dtype = None if options.dtype == "float32" else getattr(torch, options.dtype)
    for prefix, part in options.stages().items():
        sampler = Sampler.load(
            part.model, part.tokenizers, part.text_tokenizer, options.class_names, options.device, dtype,
            like=stages[-1].sampler if stages else None, compile=options.compile,
        )  # fmt: skip
        readable = {
            name: sampler.inputs[name] for name in (known if stages else sampler.inputs) if name in sampler.inputs
        }
        if not readable:
            raise UserError(f"{prefix}model: {part.model} reads none of {', '.join(known)}, which is all that there is")
        names = _split(part.cond_domains or [*readable], readable, f"{prefix}cond_domains")
        conditions = tuple(find_modality(name, readable, "an input") for name in names)
        targets = _split(part.target_domains, sampler.targets, f"{prefix}target_domains")
        settings = {key: value for key in COLUMNS if (value := getattr(part, key)) is not None}
        settings["cfg_grow_conditioning"] = part.cfg_grow_conditioning
        try:
            schedule = sampler.schedule(dict.fromkeys(conditions, 0), targets, **settings)
        except UserError as error:
            raise UserError(f"{part.model}: {error}") from error
        targets = tuple(dict.fromkeys(step["target_domain"] for step in schedule))
        stages.append(Stage(sampler, conditions, targets, settings | {"top_k": part.top_k, "top_p": part.top_p}))
        known += [name for name in (*conditions, *targets) if name not in known]
    return stages


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
        return _prompts(check_prompts(data, "data"), conditions)
    path = Path(str(data))
    if path.is_file() and path.suffix.lower() == ".txt":
        return _prompts(read_prompts(path), conditions)
    if path.is_file() and path.suffix.lower() in _TABLES:
        raise UserError(f"data: {path} is neither a picture nor a .txt file with a prompt per line")
    pictures = [path] if path.is_file() else sorted(path.glob("*"))
    if path.is_dir():
        pictures = [p for p in pictures if p.suffix.lower() in _PICTURES and not p.name.startswith(".") and p.is_file()]
    if pictures:
        (image,) = _only(conditions, "img", "pictures")
        return [(name, {image: picture}) for name, picture in unique_names(pictures).items()]
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


def _prompts(prompts: Sequence[str], conditions: Mapping[str, Modality]) -> list[tuple[str, Mapping[str, Any]]]:
    (text,) = _only(conditions, "seq", "prompts")
    return [(f"{index:05d}", {text: prompt}) for index, prompt in enumerate(prompts)]


def unique_names(pictures: Sequence[Path]) -> dict[str, Path]:
    """The files of a folder by their stems, or by their whole names where these are not unique."""
    stems = Counter(picture.stem.casefold() for picture in pictures)  # some disks do not tell A from a
    taken = {SETTINGS, SHEET, *(picture.name.casefold() for picture in pictures)}
    names = [p.name if stems[p.stem.casefold()] > 1 or p.stem.casefold() in taken else p.stem for p in pictures]
    names = [f"{name}_" if name in (SETTINGS, SHEET) else name for name in names]
    return dict(zip(names, pictures, strict=True))


def _read(job: Job) -> Mapping[str, Any]:
    """The values of a job; those of a folder are read only now."""
    if "" not in job.inputs:
        return job.inputs
    try:
        return job.inputs[""].values(OpenFiles(), keep_pixels=False)
    except BadSample as error:
        raise DataError(f"data: {error}") from error


def _only(conditions: Mapping[str, Modality], modality_type: str, what: str) -> Sequence[str]:
    if [modality.type for modality in conditions.values()] != [modality_type]:
        needed = "one text" if modality_type == "seq" else "one modality of images"
        raise UserError(f"data: {what} need {needed} in cond_domains, not {', '.join(conditions)}")
    return [*conditions]


def _split(names: str | Sequence[str], known: Mapping[str, Modality], where: str) -> tuple[str, ...]:
    """Names joined by ``-``, short ones too."""
    short = {name.split("@")[0].removeprefix("tok_") for name in known} | {name.split("@")[0] for name in known}
    return split_domains(names, {*known, *short}, where)


def _check_output(out: Path) -> None:
    """See, before any model is loaded, whether results can go to ``out``, and nothing is lost there.

    Raises:
        UserError: they cannot.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"output_dir: {out} is a file: give the path of a folder")
    for name in (SETTINGS, SHEET):
        check_file(out / name)
    if (out / SHEET).exists() and not (out / SETTINGS).exists():
        raise UserError(
            f"output_dir: {out / SHEET} is there and is no contact sheet: choose another folder, or remove it"
        )


def _check_settings(out: Path, options: GenerationOptions) -> None:
    """Results of other settings must not get mixed.

    Raises:
        UserError: ``out`` was made with others.
    """
    current = {key: value for key, value in options.flat().items() if key not in _FREE}
    current = json.loads(json.dumps(redact(current), default=str))
    record = out / SETTINGS
    if record.exists():
        before = redact(_read_settings(record))
        for key in {**current, **before}:
            if before.get(key) != current.get(key):
                raise UserError(
                    f"{out} was made with {key} {before.get(key)}, not {current.get(key)}: choose another output_dir, or "
                    "remove it"
                )
    else:
        with atomic_path(record) as path:
            path.write_text(json.dumps(current, indent=1) + "\n", encoding="utf-8")


def _read_settings(record: Path) -> dict[str, Any]:
    try:
        content = json.loads(record.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{record} does not hold the settings of results: choose another output_dir, or remove it")
    return content


def main(argv: list[str] | None = None) -> None:
    """The command; started by torchrun, each process takes its share of the samples, and a GPU of its own if there are enough."""
    rank, world_size, local_rank = torchrun_ranks()
    share_gpus(local_rank)
    options = parse(argv)
    load_plugin(options.plugin)
    run(options, rank, world_size)
