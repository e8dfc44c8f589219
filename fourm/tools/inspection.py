"""Inspect a data set slice by slice; the reports of the slices are added up.

A :class:`DataSlice` is one shard with all its modalities, a file of records, or some of the keys of folders. A run
would skip or stop at a bad sample. The inspection counts it and continues with its other modalities.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.data_config import DatasetConfig, build_sample_transform
from fourm.data.decoding import EncodedImage
from fourm.data.folders import Folders
from fourm.data.layout import CROP_SETTINGS, shard_patterns, split_data_path, wanted_names
from fourm.data.modality_info import Modality
from fourm.data.modality_transforms import UnreadableValue
from fourm.data.object_arrays import ObjectArray
from fourm.data.raw_sample import BadSample, Member, OpenFiles, RawSample, join
from fourm.data.record_files import local_files
from fourm.data.records import Record, Records
from fourm.data.sample_dataset import Source, build_masking
from fourm.data.shards import Shards
from fourm.data.transforms.image import same_frame
from fourm.utils.errors import DataError, UserError
from fourm.utils.seeds import generator
from fourm.utils.tokenizer import TextEncoder
from fourm.utils.tokenizer.special_tokens import UNK_ID
from fourm.utils.urls import redact_url

MISSING, SHARD, FILE, CONTRACT, SHAPES, UNKNOWN = (
    "missing",
    "unreadable shard",
    "unreadable file",
    "broken contract",
    "different shapes",
    "unknown words",
)
"""Kinds of problems, in addition to the reasons of :class:`BadSample`."""

_MAX_EXAMPLES = 3
_KEYS_PER_SLICE = 64  # for folders


class _Addable:
    """Base class of dataclasses that are added up field by field."""

    def add(self, other: Any) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            own, added = getattr(self, item.name), getattr(other, item.name)
            if isinstance(own, Counter):
                own.update(added)
            elif isinstance(own, set):
                own |= added
            elif isinstance(own, dict):
                for key, value in added.items():
                    if key in own:
                        own[key].add(value)
                    else:
                        own[key] = value
            elif isinstance(own, list):
                own += added[: _MAX_EXAMPLES - len(own)]
            else:
                setattr(self, item.name, own + added)


@dataclass
class Problem(_Addable):
    """The number of occurrences of a problem, and some examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Content(_Addable):
    """The content of the files of one modality.

    Attributes:
        files: Extension → number of files.
        dtypes: Data type → number of arrays.
        crops: Number of stored crops → number of files.
        ids: Token ids that occur.
        sizes: (height, width) → number of images.
        lengths: Number of tokens of a text before truncation → number of texts.
        unknown: Number of unknown tokens in texts.
    """

    files: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    crops: Counter[int] = field(default_factory=Counter)
    ids: set[int] = field(default_factory=set)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    unknown: int = 0


@dataclass
class Report(_Addable):
    """The results of an inspection.

    Attributes:
        shards: Number of inspected shards or files; folders count as one.
        keys: Number of keys that occur in some modality.
        complete: Number of keys whose samples can be used.
        present: Modality → number of keys that it has.
        samples: Number of samples that were read.
        bad: Number of these samples with problems.
        problems: (modality, kind, description with numbers replaced by N) → occurrences.
        content: Modality → content of its files.
        tokens: Number of ``input`` and ``target`` tokens of the masked samples.
    """

    shards: int = 0
    keys: int = 0
    complete: int = 0
    present: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    bad: int = 0
    problems: dict[tuple[str, str, str], Problem] = field(default_factory=dict)
    content: dict[str, Content] = field(default_factory=dict)
    tokens: Counter[str] = field(default_factory=Counter)

    def problem(self, modality: str, kind: str, description: str, where: str, count: int = 1) -> None:
        """Add a problem; problems whose descriptions differ only in numbers are counted together."""
        problem = Problem(count, [f"{where}: {description}" if description else where])
        self.add(Report(problems={(modality, kind, re.sub(r"\d[\d.]*", "N", description)): problem}))


class DataSlice(NamedTuple):
    """A shard, a file, or every ``step``-th key of folders from the ``start``-th on.

    Attributes:
        data_path: Location of the slice.
        start: Index of the first key of folders.
        step: Distance of the keys of folders.
        max_samples: Number of samples to read, chosen at random; None = all.
    """

    data_path: str
    start: int = 0
    step: int = 1
    max_samples: int | None = None


_Join: TypeAlias = tuple[dict[str, dict[str, Member]], list[tuple[str, str]]]
"""Modality → key → member, and warnings as (modality, message)."""


class _WarningCollector(BadSampleLedger):
    """Collects warnings, and tolerates any number of bad samples."""

    def __init__(self) -> None:
        super().__init__("", 1.0)
        self.messages: list[str] = []

    def warn(self, subject: str, message: str) -> None:
        self.messages.append(message)


def choose_slices(dataset: DatasetConfig, max_samples: int | None, max_shards: int = 32) -> tuple[list[DataSlice], int]:
    """Choose the slices to inspect.

    Args:
        dataset: The data set.
        max_samples: Number of samples to read, chosen at random from evenly spaced shards; None = all samples of all
            shards.
        max_shards: Maximum number of shards to read samples from.

    Returns:
        The slices, and the total number of shards (1 for folders).

    Raises:
        UserError: The data set cannot be read at all.
    """
    if dataset.type == "huggingface" or dataset.use_wds:
        paths = _record_files(dataset) if dataset.type == "huggingface" else _shard_paths(dataset)
        count = len(paths) if max_samples is None else max(min(max_shards, max_samples, len(paths)), 1)
        chosen = [paths[i * len(paths) // count] for i in range(count)]
        share = None if max_samples is None else math.ceil(max_samples / count)
        return [DataSlice(path, max_samples=share) for path in chosen], len(paths)
    ledger = _WarningCollector()
    total = len(_open(dataset, dataset.data_path, wanted_names(dataset.modalities), ledger).all(ledger))
    slices = math.ceil(min(total, max_samples or total) / _KEYS_PER_SLICE)
    share = None if max_samples is None else math.ceil(min(total, max_samples) / slices)
    return [DataSlice(dataset.data_path, index, slices, share) for index in range(slices)], 1


def _shard_paths(dataset: DatasetConfig) -> list[str]:
    """Return a path per shard, with the folders of its tars in brackets."""
    _open(dataset, dataset.data_path, wanted_names(dataset.modalities), _WarningCollector())
    pattern, folders = split_data_path(dataset.data_path)
    bracket = "" if folders is None else f"[{','.join(folders)}]"
    return [path.replace("\0", bracket) for path in shard_patterns(pattern, folders or ())]


def _record_files(dataset: DatasetConfig) -> list[str]:
    paths = local_files(dataset.data_path)
    assert paths is not None, "a data set on the hub has no slices"
    if not any(Path(path).is_file() for path in paths):
        raise UserError(f"data_path {dataset.data_path}: there is no {paths[0]}")
    return paths


def _open(dataset: DatasetConfig, data_path: str, wanted: Mapping[str, str], ledger: BadSampleLedger) -> Source:
    """Open the ``wanted`` modalities (with their default folders) of a slice of a data set."""
    location = (data_path, wanted, dataset.modality_name_map)
    if not dataset.use_wds:
        return Folders(*location, ledger)
    known = wanted_names(dataset.modalities)
    return Shards(*location, remote=dataset.remote, known=[*known, *known.values()])


class Inspector:
    """Reads slices of a data set.

    Args:
        dataset: The data set.
        text_tokenizer: The vocabulary or its path.

    Raises:
        UserError: The settings of the data set are inconsistent.
    """

    def __init__(self, dataset: DatasetConfig, text_tokenizer: Any):
        self._dataset = dataset
        self._wanted = wanted_names(dataset.modalities)
        self._encode = TextEncoder(text_tokenizer)
        self._transform = build_sample_transform(dataset, training=True)
        self._masking = build_masking(dataset, text_tokenizer)
        self._presence = dataset.presence
        self._files = OpenFiles()
        # Only the latest shard or folder is kept, because the slices of a folder follow each other.
        self._joined: tuple[str, _Join] = "", ({}, [])

    def inspect(self, data_slice: DataSlice) -> Report:
        """Join a slice by key and read its samples, or read a file of records."""
        if self._dataset.type == "huggingface":
            return self._inspect_records(data_slice)
        return self._inspect_members(data_slice)

    def _inspect_records(self, data_slice: DataSlice) -> Report:
        """Count all records of a file, and read some that are chosen by reservoir sampling, because it may be large."""
        modalities, report, rng = self._dataset.modalities, Report(1), generator("check", data_slice.data_path)
        chosen: list[Record] = []
        lines = 0
        try:
            source = Records(data_slice.data_path, list(modalities), self._dataset.modality_name_map, self._presence)
            for lines, record in enumerate(source.once(), 1):
                if data_slice.max_samples is None:
                    self._read(record, report)
                elif len(chosen) < data_slice.max_samples:
                    chosen.append(record)
                else:
                    index = int(rng.integers(lines))
                    if index < data_slice.max_samples:
                        chosen[index] = record
        except UserError as error:
            report.problem(", ".join(modalities), FILE, "", str(error))
        for record in chosen:
            self._read(record, report)
        report.keys = report.samples
        report.complete = round(lines * report.complete / max(report.samples, 1))
        return report

    def _columns(self, record: Record, report: Report) -> dict[str, Any]:
        """Return the values of a record that a run would use, and count those that it has."""
        try:
            row = record.row()
        except BadSample as error:
            report.problem(", ".join(self._wanted), error.reason, "", str(error).removeprefix(f"{error.reason}: "))
            return {}
        available = record.available(row)
        report.present.update({name: int(name in available) for name in self._wanted})
        for name in self._wanted:
            if name in available:
                report.content.setdefault(name, Content()).files[record.extension] += 1
            elif self._dataset.missing == "error":
                report.problem(name, MISSING, "", record.missing_column_message(name, row))
        usable = self._presence.usable(available, self._wanted)
        if usable:
            report.complete += 1
        return {name: available[name] for name in usable}

    def _inspect_members(self, data_slice: DataSlice) -> Report:
        if self._joined[0] != data_slice.data_path:
            self._joined = data_slice.data_path, self._join(data_slice.data_path)
        indexes, warnings = self._joined[1]
        keys = dict.fromkeys(key for index in indexes.values() for key in index)
        samples, _ = join(indexes, self._presence)
        report = Report()
        if data_slice.start == 0:
            report = Report(1, len(keys), len(samples), Counter({name: len(index) for name, index in indexes.items()}))
            for name, message in warnings:
                report.problem(name, SHARD, "", message)
            for name, index in indexes.items():
                absent = [key for key in keys if key not in index]
                if absent and self._dataset.missing == "error":
                    where = f"{redact_url(data_slice.data_path)}: no {self._wanted[name]} for key '{absent[0]}'"
                    report.problem(name, MISSING, "", where, len(absent))
        chosen = samples[data_slice.start :: data_slice.step]
        if data_slice.max_samples is not None and data_slice.max_samples < len(chosen):
            rng = generator("check", data_slice.data_path, data_slice.start)
            chosen = [chosen[i] for i in sorted(rng.permutation(len(chosen))[: data_slice.max_samples])]
        for sample in chosen:
            self._read(sample, report)
        return report

    def _join(self, data_path: str) -> _Join:
        """Index each modality separately, so that the gaps of one do not hide samples of another."""
        indexes: dict[str, dict[str, Member]] = {}
        warnings = []
        for name, folder in self._wanted.items():
            ledger = _WarningCollector()
            indexes[name] = {}
            try:
                samples = _open(self._dataset, data_path, {name: folder}, ledger).all(ledger)
                indexes[name] = {sample.key: sample.members[name] for sample in samples}
            except UserError as error:
                ledger.messages = ledger.messages or [str(error)]  # warnings explain the error
            warnings += [(name, message) for message in ledger.messages]
        return indexes, warnings

    def _read(self, sample: RawSample, report: Report) -> None:
        problems_before = sum(problem.count for problem in report.problems.values())
        raw = self._columns(sample, report) if isinstance(sample, Record) else self._members(sample, report)
        self._use(sample, self._drop_different_shapes(sample, raw, report), report)
        report.samples += 1
        if sum(problem.count for problem in report.problems.values()) > problems_before:
            report.bad += 1

    def _members(self, sample: RawSample, report: Report) -> dict[str, Any]:
        """Return the values of the readable members, and report the others."""
        raw = {}
        for name, member in sample.members.items():
            report.content.setdefault(name, Content()).files[member.extension] += 1
            try:
                value = RawSample(sample.key, {name: member}).values(self._files, keep_pixels=False)[name]
                raw[name] = value[:] if isinstance(value, ObjectArray) else value  # the entries of all crops
            except BadSample as error:
                report.problem(name, error.reason, "", str(error).removeprefix(f"{error.reason}: "))
            except DataError as error:
                report.problem(name, CONTRACT, "", str(error))
            except Exception as error:  # an entry of an object array is corrupt
                report.problem(name, "corrupt member", "", f"{sample.where(name)}: {error}")
            else:
                _add_content(raw[name], self._dataset.modalities.get(name), report.content[name])
        return raw

    def _drop_different_shapes(self, sample: RawSample, raw: dict[str, Any], report: Report) -> dict[str, Any]:
        """Drop images whose aspect ratio differs from the main image, because a shared crop would not match."""
        main = raw.get(self._dataset.main_augment_domain or "")
        if not isinstance(main, EncodedImage):
            return raw
        others = {name: value for name, value in raw.items() if isinstance(value, EncodedImage)}
        differing = [name for name, value in others.items() if not same_frame(value.shape, main.shape)]
        for name in differing:
            size = "{}x{}".format(*others[name].shape)
            description = f"{size} pixels, but {main.shape[0]}x{main.shape[1]} in the main modality"
            report.problem(name, SHAPES, description, sample.where(name))
        return {name: value for name, value in raw.items() if name not in differing}

    def _use(self, sample: RawSample, raw: dict[str, Any], report: Report) -> None:
        """Transform and mask a sample like a run; after each problem, try again without the modality that caused it.

        Without the main image only tokens can be inspected, and without the stored crops nothing.
        """
        modalities, main = self._dataset.modalities, self._dataset.main_augment_domain
        while CROP_SETTINGS in raw or CROP_SETTINGS not in self._wanted:
            if main is not None and main not in raw:
                raw = {name: raw[name] for name in raw if name == CROP_SETTINGS or modalities[name].pretokenized}
            lacking = self._transform.lacking(raw)
            for name in lacking:
                report.present[name] -= 1
                if self._dataset.missing == "error":
                    report.problem(name, MISSING, "the value is null or empty", sample.where(name))
            if lacking:
                if self._dataset.missing != "allow":
                    report.complete -= 1
                raw = {name: value for name, value in raw.items() if name not in lacking}
                raw = {name: raw[name] for name in self._presence.usable(raw, self._wanted)}
            if raw.keys() <= {CROP_SETTINGS}:
                return
            rng = generator("check", sample.key)
            try:
                values = self._transform(raw, rng)
                masked = self._masking(values, rng)
            except (DataError, UnreadableValue) as error:
                name = error.modality or ""
                kind = CONTRACT if isinstance(error, DataError) else "corrupt value"
                report.problem(name if name in raw else CROP_SETTINGS, kind, error.detail, sample.where(name))
                if name not in raw or name == CROP_SETTINGS:
                    return
                del raw[name]
                continue
            for entry in masked.values():
                report.tokens["input"] += int((~entry["input_mask"]).sum())
                report.tokens["target"] += int((~entry["target_mask"]).sum())
            for name, value in values.items():
                if modalities[name].type == "seq":
                    ids = self._encode(value if isinstance(value, str) else " ".join(value))
                    report.content[name].lengths[len(ids)] += 1
                    report.content[name].unknown += ids.count(UNK_ID)
            return


def _add_content(value: Any, modality: Modality | None, content: Content) -> None:
    """Add the value of a file to ``content``; ``modality`` is None for the stored crops."""
    if isinstance(value, EncodedImage):
        content.sizes[value.shape] += 1
    elif isinstance(value, np.ndarray):
        content.dtypes[str(value.dtype)] += 1
        if modality is None or modality.pretokenized:
            content.crops[len(value) if value.ndim else 0] += 1
        if modality is not None and modality.vocab_size and value.dtype.kind in "iu":
            content.ids.update(np.unique(value).tolist())
