"""The command ``run_generation.py``, which writes a folder of results and a contact sheet.

Sample i uses the seed ``seed + i`` in every batch and process, so running an interrupted command again generates the
missing results, exactly as they would have been. Each result records what it was made from; if the inputs or models
have changed, it is generated again.
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
from fourm.data.folders import Folders
from fourm.data.layout import existing_folders
from fourm.data.modality_info import Modality
from fourm.data.raw_sample import BadSample, OpenFiles
from fourm.generation.defaults import read_defaults
from fourm.generation.inputs import find_modality, split_names
from fourm.generation.options import GenerationOptions, parse
from fourm.generation.origins import digest_of_inputs, digest_of_models
from fourm.generation.plotting import plot
from fourm.generation.prompts import check_prompts, read_prompt_table, read_prompts
from fourm.generation.results import check_result, origin_of, read_result, write_result
from fourm.generation.sampler import Sampler
from fourm.generation.settings import COLUMNS
from fourm.generation.stages import Stage, generate
from fourm.utils.device import choose_device, share_gpus
from fourm.utils.errors import DataError, UserError
from fourm.utils.files import atomic_path, check_file
from fourm.utils.memory import keep_freed_memory
from fourm.utils.plugin import load_plugin
from fourm.utils.ranks import torchrun_ranks
from fourm.utils.urls import redact
from fourm.vq import load_tokenizer

SETTINGS, SHEET = "settings.json", "sheet.png"
_PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_TABLES = {".json", ".jsonl", ".csv", ".yaml", ".yml", ".md", ".parquet"}


# Options that may change when a folder of results is continued, because they do not change the results.
_MAY_CHANGE = {
    "output_dir",
    "batch_size",
    "sheet_samples",
    "device",
    "compile",
    "num_samples",
    "model_config",
    "data_config",
    "gen_config",
    "sr_config",
    "plugin",
}


class Job(NamedTuple):
    """One result to generate.

    Attributes:
        name: Name of its folder.
        seed: Seed of its random numbers.
        inputs: Maps each modality to its value, or "" to a sample of a folder.
        models: Digest of the models.
    """

    name: str
    seed: int
    inputs: Mapping[str, Any]
    models: str = ""

    def origin(self) -> dict[str, Any]:
        """Return what the result depends on, in addition to ``settings.json``."""
        return {"seed": self.seed, "inputs": digest_of_inputs(self.inputs), "models": self.models}

    def is_done(self, out: Path) -> bool:
        """Return whether a result of the same origin exists."""
        existing = origin_of(out / self.name)
        return existing is not None and existing == self.origin()


def run(options: GenerationOptions, rank: int = 0, world_size: int = 1) -> None:
    """Generate the missing results; this process takes every ``world_size``-th one, starting at ``rank``.

    Raises:
        UserError: If the options or data do not fit the models.
    """
    out = Path(options.output_dir)
    _check_output(out)
    if choose_device(options.device).type == "cpu":
        keep_freed_memory()
    stages = load_stages(options)
    models = digest_of_models(stages)
    inputs = {name: stages[0].sampler.inputs[name] for name in stages[0].conditions}
    all_jobs = [job._replace(models=models) for job in jobs(options, inputs)]
    own_jobs = all_jobs[rank::world_size]
    pending = [job for job in own_jobs if not job.is_done(out)]
    for job in pending:
        check_result(out / job.name)
    _check_settings(out, options)
    with tqdm(total=len(own_jobs), initial=len(own_jobs) - len(pending), unit=" samples", disable=None) as bar:
        for start in range(0, len(pending), options.batch_size):
            batch = pending[start : start + options.batch_size]
            results = generate(stages, [_read(job) for job in batch], [job.seed for job in batch])
            for job, result in zip(batch, results, strict=True):
                write_result(out / job.name, result, job.origin())
            bar.update(len(batch))
    others = (job for index, job in enumerate(all_jobs) if index % world_size != rank)
    if all(job.is_done(out) for job in others):  # the process that finishes last draws the sheet
        results = [read_result(out / job.name) for job in all_jobs[: options.sheet_samples]]
        with atomic_path(out / SHEET) as path:
            plot(results).savefig(path)
        print(f"{len(all_jobs)} samples: {out}\ncontact sheet: {out / SHEET}")


def load_stages(options: GenerationOptions) -> list[Stage]:
    """Load the models of all stages, and check all options against them before anything is generated.

    Returns:
        The stages, with modalities by their full names.

    Raises:
        UserError: If the options do not fit the models.
    """
    stages: list[Stage] = []
    known: list[str] = []
    dtype = None if options.dtype == "float32" else getattr(torch, options.dtype)
    for prefix, part in options.stages().items():
        defaults = read_defaults(part.model)
        for key in ("target_domains",) if stages else ("cond_domains", "target_domains"):
            if not getattr(part, key) and not getattr(defaults, key):
                raise UserError(f"the key '{prefix}{key}' is required")
        sampler = Sampler.load(
            part.model,
            part.tokenizers,
            part.text_tokenizer,
            options.class_names,
            options.device,
            dtype,
            like=stages[-1].sampler if stages else None,
            compile=options.compile,
            detokenizer=options.detokenizer(),
        )
        if options.activate_controlnet and not stages:
            sampler.tokenizers = {
                **sampler.tokenizers,
                "rgb": load_tokenizer(str(options.controlnet_id), choose_device(options.device)),
            }
        readable = {
            name: sampler.inputs[name] for name in (known if stages else sampler.inputs) if name in sampler.inputs
        }
        if not readable:
            raise UserError(f"{prefix}model: {part.model} reads none of {', '.join(known)}, the only known modalities")
        given = part.cond_domains or (None if stages else defaults.cond_domains) or [*readable]
        names = split_names(given, readable, f"{prefix}cond_domains")
        conditions = tuple(find_modality(name, readable, "an input") for name in names)
        targets: Sequence[str] = sampler.remaining_targets(conditions)
        if part.target_domains:
            targets = split_names(part.target_domains, sampler.targets, f"{prefix}target_domains")
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
    """Return all results to generate, in the order of the data and then of the variations.

    Args:
        options: The options.
        conditions: The input modalities.

    Raises:
        UserError: If the data do not contain the input modalities.
    """
    count = options.num_variations
    return [
        Job(f"{key}-{variation}" if count > 1 else key, options.seed + index * count + variation, inputs)
        for index, (key, inputs) in enumerate(_samples(options.data, conditions)[: options.num_samples])
        for variation in range(count)
    ]


def _samples(data: Any, conditions: Mapping[str, Modality]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the key and the inputs of every sample."""
    if isinstance(data, (list, tuple)):
        return _prompts(check_prompts(data, "data"), conditions)
    path = Path(str(data))
    if path.is_file() and path.suffix.lower() == ".txt":
        return _prompts(read_prompts(path), conditions)
    if path.is_file() and path.suffix.lower() == ".tsv":
        return _prompts(read_prompt_table(path), conditions)
    if path.is_file() and path.suffix.lower() in _TABLES:
        raise UserError(f"data: {path} is neither a picture nor a file with prompts (.txt or .tsv)")
    pictures = [path] if path.is_file() else sorted(path.glob("*"))
    if path.is_dir():
        pictures = [p for p in pictures if p.suffix.lower() in _PICTURES and not p.name.startswith(".") and p.is_file()]
    if pictures:
        image = _only_condition(conditions, "img", "pictures")
        return [(name, {image: picture}) for name, picture in unique_names(pictures).items()]
    if not path.is_dir():
        raise UserError(
            f"data: there is neither a file nor a folder {data}; a list of prompts is written [one, another], and a "
            "table of prompts is a .tsv file with a column Prompt"
        )
    folders = {name: modality.path or name for name, modality in conditions.items()}
    ledger = BadSampleLedger("data", max_bad_fraction=1.0)
    if not {*folders.values()} & {*existing_folders(path)}:
        raise UserError(f"data: {path} has no folder {' or '.join(folders.values())}, and no pictures")
    return [(sample.key, {"": sample}) for sample in Folders(str(path), folders, None, ledger).all(ledger)]


def _prompts(prompts: Sequence[str], conditions: Mapping[str, Modality]) -> list[tuple[str, Mapping[str, Any]]]:
    text = _only_condition(conditions, "seq", "prompts")
    return [(f"{index:05d}", {text: prompt}) for index, prompt in enumerate(prompts)]


def unique_names(pictures: Sequence[Path]) -> dict[str, Path]:
    """Return the files of a folder by their stems, or by their full names if the stems are not unique."""
    stems = Counter(picture.stem.casefold() for picture in pictures)  # file systems may ignore case
    taken = {SETTINGS, SHEET, *(picture.name.casefold() for picture in pictures)}
    names = [p.name if stems[p.stem.casefold()] > 1 or p.stem.casefold() in taken else p.stem for p in pictures]
    names = [f"{name}_" if name in (SETTINGS, SHEET) else name for name in names]
    return dict(zip(names, pictures, strict=True))


def _read(job: Job) -> Mapping[str, Any]:
    """Return the input values of a job; the files of a folder are read only now."""
    if "" not in job.inputs:
        return job.inputs
    try:
        return job.inputs[""].values(OpenFiles(), keep_pixels=False)
    except BadSample as error:
        raise DataError(f"data: {error}") from error


def _only_condition(conditions: Mapping[str, Modality], modality_type: str, data: str) -> str:
    """Return the name of the only condition, which must be of this type."""
    if [modality.type for modality in conditions.values()] != [modality_type]:
        needed = "one text" if modality_type == "seq" else "one modality of images"
        raise UserError(f"data: {data} need {needed} in cond_domains, not {', '.join(conditions)}")
    return next(iter(conditions))


def _check_output(out: Path) -> None:
    """Check, before any model is loaded, that results can be written to ``out`` and would not overwrite other files.

    Raises:
        UserError: If they cannot.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"output_dir: {out} is a file; give the path of a folder")
    for name in (SETTINGS, SHEET):
        check_file(out / name)
    if (out / SHEET).exists() and not (out / SETTINGS).exists():
        raise UserError(
            f"output_dir: {out / SHEET} exists and is not a contact sheet; choose another folder, or remove it"
        )


def _check_settings(out: Path, options: GenerationOptions) -> None:
    """Check that ``out`` contains no results of other settings, and record the settings there.

    Raises:
        UserError: If the results in ``out`` were made with other settings.
    """
    current = {key: value for key, value in options.flat().items() if key not in _MAY_CHANGE}
    current = json.loads(json.dumps(redact(current), default=str))
    record = out / SETTINGS
    if record.exists():
        recorded = redact(_read_settings(record))
        for key in {**current, **recorded}:
            if recorded.get(key) != current.get(key):
                raise UserError(
                    f"{out} was made with {key} {recorded.get(key)}, not {current.get(key)}; choose another "
                    "output_dir, or remove it"
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
        raise UserError(f"{record} does not contain the settings of results; choose another output_dir, or remove it")
    return content


def main(argv: list[str] | None = None) -> None:
    """Run the command. Under torchrun, each process generates its share of the samples, on its own GPU if possible."""
    rank, world_size, local_rank = torchrun_ranks()
    share_gpus(local_rank)
    options = parse(argv)
    load_plugin(options.plugin)
    run(options, rank, world_size)
