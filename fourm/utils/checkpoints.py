"""Checkpoints of training runs and exported models on disk: their files, whatever was trained, without training code.

A checkpoint is a folder of

* shards, which ``torch.distributed.checkpoint`` writes as safetensors files; tensors are called ``model/PARAMETER`` and
  ``ema/PARAMETER`` (more in :mod:`fourm.train.checkpoint`). A parameter that has several names is there under its first
* ``config.json``: of the model
* ``state.json``: of the run
* ``checksums.json``: name → [bytes, CRC-32] of every other file. It is the last to be written

An exported model is ``config.json`` and ``model.safetensors``, with every parameter under each of its names.
"""

from __future__ import annotations

import json
import logging
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fourm.utils.errors import UserError
from fourm.utils.files import atomic_path, check_file
from fourm.utils.finite import check_finite

if TYPE_CHECKING:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

log = logging.getLogger("fourm")
CONFIG, WEIGHTS, STATE, CHECKSUMS = "config.json", "model.safetensors", "state.json", "checksums.json"
MODEL, EMA = "model/", "ema/"
CHECKPOINT_FILES = ("shard-*.safetensors", CONFIG, STATE, CHECKSUMS)
"""Patterns of all files in a checkpoint: a folder that holds others is not replaced by one."""
_AT_ONCE = 2**30  # bytes of tensors that are in memory together
_SAFETENSORS_TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class ModelFormat:
    """How models of one kind lie on disk.

    Attributes:
        title: For messages: ``4M model``.
        build: The model of a configuration.
        marks: A configuration with one of these keys is of this kind.
        published: The configuration as it stands beside exported weights.
    """

    title: str
    build: Callable[[dict[str, Any]], nn.Module]
    marks: frozenset[str]
    published: Callable[[dict[str, Any]], dict[str, Any]] = dict


def checksum(file: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    size = crc = 0
    with file.open("rb") as stream:
        while part := stream.read(2**22):
            size, crc = size + len(part), zlib.crc32(part, crc)
    return [size, crc]


def files_of(checkpoint: Path) -> dict[str, list[int]]:
    """The content of ``checksums.json``.

    Raises:
        UserError: a file is missing or has another size.
    """
    try:
        files = json.loads((checkpoint / CHECKSUMS).read_bytes())
        for name, (size, _) in files.items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                raise UserError(f"checkpoint {checkpoint} is damaged: {name} has {found} bytes, not {size}")
        if not {CONFIG} <= files.keys() or any(Path(name).name != name for name in files):
            raise ValueError(f"{CHECKSUMS} is no list of its files")
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged, or of an earlier version: {error}") from error
    return files


def verify(checkpoint: Path, share: slice = slice(None)) -> None:
    """Compare the files, or a ``share`` of them, with their checksums.

    Raises:
        UserError: one is damaged.
    """
    for name, expected in sorted(files_of(checkpoint).items())[share]:
        if checksum(checkpoint / name) != expected:
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} has changed since it was written")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder`` whose files all have their sizes, newest first; others are named in warnings."""
    complete = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            files_of(path)
            complete.append(path)
        except UserError as error:
            log.warning("%s; passed over", error)
    return complete


def newest_checkpoint(place: Path) -> Path:
    """``place`` itself if it is a checkpoint, else the newest one of the run in that folder.

    Raises:
        UserError: there is none.
    """
    if (place / CHECKSUMS).exists():
        return place
    found = complete_checkpoints(place / "checkpoints")
    if not found:
        raise UserError(f"{place} holds no model ({CONFIG} and {WEIGHTS}) and no complete checkpoint")
    return found[0]


def read_weights(
    checkpoint: Path, model_format: ModelFormat, ema: bool = False
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """The model's configuration and its state dict, which comes piece by piece: at most 1 GiB is in memory.

    Args:
        ema: the moving average of the parameters instead of the parameters.

    Raises:
        UserError: the checkpoint is damaged, or has no moving average. While reading: a value is not finite.
    """
    verify(checkpoint)
    config, known = _config(checkpoint), tensors_in(checkpoint)
    if ema and not any(name.startswith(EMA) for name in known):
        raise UserError(f"checkpoint {checkpoint} has no moving average of the weights: the run had no model_ema")
    names = _names(layout(config, model_format, checkpoint))
    sources = {name: EMA + first if ema and EMA + first in known else MODEL + first for name, first in names}
    for source in sources.values():
        if source not in known:
            raise UserError(f"checkpoint {checkpoint} lacks {source}: its {CONFIG} is of another model")
    return config, _read(checkpoint, sources, known)


def tensors_in(checkpoint: Path) -> dict[str, Any]:
    """Name → metadata of every tensor of a checkpoint.

    Raises:
        UserError: a shard cannot be read.
    """
    try:
        return dict(_reader(checkpoint).read_metadata().state_dict_metadata)
    except Exception as error:  # of whatever kind: the reader parses headers that anybody may have written
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {checkpoint} cannot be read: {type(error).__name__}: {reason}") from error


def _config(checkpoint: Path) -> dict[str, Any]:
    try:
        config = json.loads((checkpoint / CONFIG).read_bytes())
        if isinstance(config, dict):
            return config
        raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {checkpoint}: {CONFIG} is no configuration of a model: {error}") from error


def export_model(checkpoint: Path, folder: Path, model_format: ModelFormat, ema: bool = False) -> None:
    """Write ``model.safetensors`` and ``config.json``, as the model's ``save_pretrained`` does.

    Raises:
        UserError: as :func:`read_weights` and :func:`check_export`.
    """
    check_export(folder, model_format)
    config, weights = read_weights(checkpoint, model_format, ema)
    tensors = layout(config, model_format, checkpoint).state_dict()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(folder / WEIGHTS) as path, path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in weights:
            file.write(tensor.to(tensors[name].dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
        write_config(folder, model_format.published(config))  # not before all weights could be read and written


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``. It goes before the weights: by it :func:`check_export` knows a folder that was begun."""
    with atomic_path(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2, sort_keys=True))


def check_export(folder: Path, model_format: ModelFormat) -> None:
    """See whether a model may be written to ``folder``, beside whatever else is there.

    Raises:
        UserError: there are weights or a ``config.json`` of something else, or the folder cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give the path of a folder")
    for name in (CONFIG, WEIGHTS):
        check_file(folder / name)
    try:
        config = json.loads((folder / CONFIG).read_bytes()) if (folder / CONFIG).exists() else None
    except (ValueError, RecursionError):
        config = None
    own = isinstance(config, dict) and bool(model_format.marks & config.keys())
    for name in (CONFIG, WEIGHTS):
        if (folder / name).exists() and not own:
            raise UserError(
                f"{folder} holds '{name}', which is not of a {model_format.title}: choose another folder, or move it"
            )


def layout(config: dict[str, Any], model_format: ModelFormat, checkpoint: Path) -> nn.Module:
    """The model without memory for weights.

    Raises:
        UserError: ``config`` is of no model; a file whose checksum is right is not damaged, but anybody may have written it.
    """
    try:
        with torch.device("meta"):
            return model_format.build(config)
    except UserError as error:
        raise UserError(f"checkpoint {checkpoint}: {CONFIG}: {error}") from error
    except Exception as error:  # of whatever kind: its values can be of any type
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {checkpoint}: {CONFIG} is no configuration of a model: {type(error).__name__}: {reason}"
        ) from error


def _names(model: nn.Module) -> Iterable[tuple[str, str]]:
    """Every name of the model's state dict, with the first name of the same tensor."""
    tensors = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    return [(name, first.setdefault(id(tensor), name)) for name, tensor in tensors.items()]


def _reader(checkpoint: Path) -> HuggingFaceStorageReader:
    import torch.distributed.checkpoint as dcp  # takes as long as torch to import, and tokenizers need none of it

    return dcp.HuggingFaceStorageReader(str(checkpoint))


def _read(checkpoint: Path, sources: dict[str, str], known: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in the order of ``sources``, {name: name in the checkpoint}."""
    from torch.distributed.checkpoint import load

    end, part = 0, {}
    for name, source in sources.items():
        end += known[source].size.numel() * known[source].properties.dtype.itemsize
        part[name] = end // _AT_ONCE
    for _, group in groupby(sources, key=part.__getitem__):
        names = list(group)
        tensors = {
            source: torch.empty(known[source].size, dtype=known[source].properties.dtype)
            for source in {sources[name] for name in names}
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that this is a single process
            load(tensors, storage_reader=_reader(checkpoint), no_dist=True)
        for name in names:
            check_finite(sources[name], tensors[sources[name]], checkpoint)
            yield name, tensors[sources[name]]
