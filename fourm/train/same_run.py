"""Whether a checkpoint is gone on with as it was begun: what of the configuration, data and vocabulary is another now."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourm.data.data_config import DataConfig, DatasetConfig
from fourm.data.folders import files_below
from fourm.data.layout import existing_folders, expand, is_remote, split_data_path, wanted_names
from fourm.data.record_files import local_files
from fourm.train.config import TrainConfig, to_dict
from fourm.utils.errors import UserError
from fourm.utils.urls import shown, without_secrets

# What decides over the weights that come out. All other keys may change: paths, output, logging, checkpoints, stores,
# processes, evaluation, and the length of the run. The global batch and the layout of the data are looked at apart.
FIXED = (
    "seed", "model", "model_kwargs", "patch_size", "input_size", "num_register_tokens", "dtype", "epoch_size",
    "num_input_tokens", "num_target_tokens", "min_input_tokens", "min_target_tokens", "loss_type",
    "opt", "opt_eps", "opt_betas", "momentum", "model_ema_decay", "clip_grad", "skip_grad", "weight_decay",
    "weight_decay_end", "blr", "min_blr", "frozen_model_blr", "scheduler", "warmup_epochs", "warmup_steps", "warmup_tokens",
    "cooldown_epochs", "cooldown_steps", "cooldown_tokens", "frozen_model_epochs", "frozen_model_tokens",
    "frozen_embedding_domain",
)  # fmt: skip
_FREE_OF_DATA = {"data_path", "remote", "max_bad_fraction", "name", "modalities"}
_MOST_SIZES = 10_000  # of files, which take longer to look up than names do
_ABSENT = object()


def check_same_run(config: TrainConfig, saved: Mapping[str, Any], identity: Mapping[str, Any], where: Path) -> None:
    """Raise a :class:`UserError` that lists what has changed since a checkpoint, unless ``allow_changes`` is set.

    Args:
        saved: the state of the checkpoint; one of an earlier version says nothing of data and vocabulary.
        identity: :func:`identity_of` the run now.
    """
    if config.allow_changes:
        return
    before, now = saved["config"], json.loads(json.dumps(_of_config(to_dict(config))))
    before = _of_config(before)
    changes = _differences({key: before.get(key, _ABSENT) for key in FIXED}, now)
    for kind in ("data", "vocabulary"):
        if kind in saved.get("identity", {}):
            changes += _differences(without_secrets(saved["identity"][kind]), json.loads(json.dumps(identity[kind])))
    if changes:
        more = f"; and {len(changes) - 12} more" if len(changes) > 12 else ""
        raise UserError(
            f"checkpoint {where} is of a run with another configuration (then → now): {'; '.join(changes[:12])}{more}. Take "
            "these back; or choose another output_dir, with 'finetune' for its weights; or set --allow_changes to go on so"
        )


def check_vocabulary(config: TrainConfig, saved: Mapping[str, Any], identity: Mapping[str, Any], where: Path) -> None:
    """The same, of the text vocabulary alone, which weights mean nothing without."""
    known = saved.get("identity", {}).get("vocabulary")
    if known and known != identity["vocabulary"] and not config.allow_changes:
        raise UserError(
            f"checkpoint {where} was trained with another text vocabulary than {config.text_tokenizer_path}; set "
            "text_tokenizer_path to that one"
        )


def identity_of(data: DataConfig, text_tokenizer: Any) -> dict[str, dict[str, Any]]:
    """What of the data and the vocabulary is compared, for JSON: name → value. The folder of the data may be another."""
    facts: dict[str, Any] = {f"weight of data set {name}": weight for name, weight in data.weights.items()}
    for name, dataset in data.train.items():
        for key, value in _of_data_set(dataset).items():
            facts[f"data set {name}: {key}"] = value
    digest = hashlib.sha256(json.dumps(sorted(text_tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
    return {"data": without_secrets(facts), "vocabulary": {"text vocabulary": digest}}


def _of_data_set(dataset: DatasetConfig) -> dict[str, Any]:
    facts = {
        field.name: _plain(getattr(dataset, field.name))
        for field in dataclasses.fields(dataset) if field.name not in _FREE_OF_DATA
    }  # fmt: skip
    for name, modality in dataset.modalities.items():
        facts[f"modality {name}"] = _plain(modality)
    return facts | {"files": _files(dataset)}


def _files(dataset: DatasetConfig) -> str:
    """Of shards and files of records their names and, on disks, sizes; so of folders. Where they lie is free."""
    if dataset.type != "multimodal":
        records = local_files(dataset.data_path)
        return shown(dataset.data_path) if records is None else _digest("files", [_named(path) for path in records])
    pattern, folders = split_data_path(dataset.data_path)
    if not dataset.use_wds:
        return _in_folders(dataset, pattern, folders)
    columns: list[str | None] = [*folders] if folders else [None]
    paths = [path for folder in columns for path in expand(pattern, folder)]
    remote = is_remote(dataset.data_path)
    return _digest("shards", [_named(path, remote) for path in paths])


def _in_folders(dataset: DatasetConfig, pattern: str, folders: list[str] | None) -> str:
    """The names of all files of the modalities, and the sizes of some, which are spread evenly over them."""
    if folders is None:
        pattern, folders = f"{pattern}/\0", existing_folders(pattern)
    wanted = wanted_names(dataset.modalities)
    read = {*wanted, *wanted.values(), *dataset.modality_name_map}
    roots = {folder: expand(pattern, folder)[0] for folder in sorted(folders) if folder in read}
    files = sorted(
        (f"{folder}/{name}", path)
        for folder, root in roots.items() if os.path.isdir(root) for name, path in files_below(root)
    )  # fmt: skip
    every = max(-(-len(files) // _MOST_SIZES), 1)
    sizes = [f"{name} {os.stat(path).st_size}" for name, path in files[::every] if os.path.exists(path)]
    within = {name.rpartition("/")[0] for name, _ in files}
    return f"{len(within)} folders with {_digest('files', [name for name, _ in files], sizes)}"


def _named(path: str, remote: bool = False) -> str:
    size = 0 if remote or not os.path.exists(path) else os.stat(path).st_size
    return f"{path.rpartition('/')[2]} {size}"


def _digest(what: str, lines: list[str], more: list[str] | None = None) -> str:
    text = "".join(f"{line}\n" for line in [*lines, *(more or ())])
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape"))
    return f"{len(lines)} {what} {digest.hexdigest()[:12]}"


def _plain(value: Any) -> Any:
    """For JSON, short and without addresses of objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, frozenset, set)):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _of_config(values: Mapping[str, Any]) -> dict[str, Any]:
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    found = dict(values) | {"dtype": short.get(str(values.get("dtype")), values.get("dtype"))}
    if not found.get("model_ema"):
        found.pop("model_ema_decay", None)
    return found


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is another; keys that did not exist then are passed over."""
    found = []
    for key in [*before, *(key for key in now if key not in before and ": " in key)]:
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if old is not _ABSENT and new is _ABSENT and " " not in key:
            continue  # of a configuration
        if old != new and not (old is _ABSENT and " " not in key):
            found += _difference(key, old, new)
    return found


def _difference(key: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
        return [
            text
            for name in names
            for text in _difference(f"{key}.{name}", old.get(name, _ABSENT), new.get(name, _ABSENT))
        ]
    return [f"{key} {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = "none" if value is _ABSENT else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
