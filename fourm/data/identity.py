"""Properties of the training data that determine a run, which are compared when the run resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from fourm.data.data_config import DataConfig, DatasetConfig
from fourm.data.folders import files_below
from fourm.data.layout import existing_folders, expand, is_remote, split_data_path, wanted_names
from fourm.data.record_files import local_files
from fourm.utils.urls import redact, redact_url

_NOT_COMPARED = {"data_path", "remote", "max_bad_fraction", "name", "modalities"}
_MAX_SIZES = 10_000  # of files whose sizes are compared, because these take longer to look up than names


def identity_of(data: DataConfig, text_tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Return the compared properties of the data and the vocabulary as JSON values; the data may be moved."""
    facts: dict[str, Any] = {f"weight of data set {name}": weight for name, weight in data.weights.items()}
    for name, dataset in data.train.items():
        for key, value in dataset_facts(dataset).items():
            facts[f"data set {name}: {key}"] = value
    digest = hashlib.sha256(json.dumps(sorted(text_tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
    return {"data": redact(facts), "vocabulary": {"text vocabulary": digest}}


def dataset_facts(dataset: DatasetConfig) -> dict[str, Any]:
    """Return the compared properties of a data set as JSON values."""
    facts = {
        field.name: _plain(getattr(dataset, field.name))
        for field in dataclasses.fields(dataset)
        if field.name not in _NOT_COMPARED
    }
    for name, modality in dataset.modalities.items():
        facts[f"modality {name}"] = _plain(modality)
    return facts | {"files": _files(dataset)}


def _files(dataset: DatasetConfig) -> str:
    """Summarise the names and, for local files, the sizes of the files, independent of their location."""
    if dataset.type != "multimodal":
        records = local_files(dataset.data_path)
        return (
            redact_url(dataset.data_path)
            if records is None
            else _digest("files", [_name_and_size(path) for path in records])
        )
    pattern, folders = split_data_path(dataset.data_path)
    if not dataset.use_wds:
        return _in_folders(dataset, pattern, folders)
    columns: list[str | None] = [*folders] if folders else [None]
    paths = [path for folder in columns for path in expand(pattern, folder)]
    remote = is_remote(dataset.data_path)
    return _digest("shards", [_name_and_size(path, remote) for path in paths])


def _in_folders(dataset: DatasetConfig, pattern: str, folders: list[str] | None) -> str:
    """Summarise the names of all files in the folders, and the sizes of some that are spread evenly over them."""
    if folders is None:
        pattern, folders = f"{pattern}/\0", existing_folders(pattern)
    wanted = wanted_names(dataset.modalities)
    read = {*wanted, *wanted.values(), *dataset.modality_name_map}
    roots = {folder: expand(pattern, folder)[0] for folder in sorted(folders) if folder in read}
    files = sorted(
        (f"{folder}/{name}", path)
        for folder, root in roots.items()
        if os.path.isdir(root)
        for name, path in files_below(root)
    )
    step = max(math.ceil(len(files) / _MAX_SIZES), 1)
    sizes = [f"{name} {os.stat(path).st_size}" for name, path in files[::step] if os.path.exists(path)]
    within = {name.rpartition("/")[0] for name, _ in files}
    return f"{len(within)} folders with {_digest('files', [name for name, _ in files], sizes)}"


def _name_and_size(path: str, remote: bool = False) -> str:
    size = 0 if remote or not os.path.exists(path) else os.stat(path).st_size
    return f"{path.rpartition('/')[2]} {size}"


def _digest(unit: str, lines: list[str], further_lines: list[str] | None = None) -> str:
    text = "".join(f"{line}\n" for line in [*lines, *(further_lines or ())])
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape"))
    return f"{len(lines)} {unit} {digest.hexdigest()[:12]}"


def _plain(value: Any) -> Any:
    """Convert a value for JSON; functions and other objects become their names, which contain no addresses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, frozenset, set)):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
