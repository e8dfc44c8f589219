"""Read checkpoints and export models, independently of what was trained and without any training code.

A checkpoint is a folder that contains

* shards, which ``torch.distributed.checkpoint`` writes as safetensors files, with tensors called ``model/PARAMETER``
  and ``ema/PARAMETER`` (see :mod:`fourm.train.checkpoint`). A parameter with several names is stored under the first
  one only
* ``config.json``: the configuration of the model
* ``state.json``: the state of the run
* ``checksums.json``: name → [bytes, CRC-32] of every other file. It is written last

An exported model consists of ``config.json`` and ``model.safetensors``, which stores every parameter under each of its
names.
"""

from __future__ import annotations

import json
import logging
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
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
"""Patterns of all files in a checkpoint; a folder that contains other files is never replaced."""
_BATCH_BYTES = 2**30  # of tensors that are in memory at the same time
_SAFETENSORS_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class ModelFormat:
    """The on-disk format of one type of model.

    Attributes:
        title: Name of the type in messages, for example ``4M model``.
        build: Builds the model from its configuration.
        marks: Keys that identify the type: a configuration with one of them belongs to it.
        published: Converts the configuration to the one that is saved beside exported weights.
    """

    title: str
    build: Callable[[dict[str, Any]], nn.Module]
    marks: frozenset[str]
    published: Callable[[dict[str, Any]], dict[str, Any]] = dict


def checksum(file: Path) -> list[int]:
    """Return [bytes, CRC-32] of a file."""
    size, crc = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**22):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return [size, crc]


def read_checksums(checkpoint: Path) -> dict[str, list[int]]:
    """Read ``checksums.json`` and check the sizes of the files.

    Returns:
        File name → [bytes, CRC-32].

    Raises:
        UserError: If a file is missing or has a different size.
    """
    try:
        files = json.loads((checkpoint / CHECKSUMS).read_bytes())
        for name, (expected_size, _) in files.items():
            size = (checkpoint / name).stat().st_size
            if size != expected_size:
                raise UserError(f"checkpoint {checkpoint} is damaged: {name} has {size} bytes, not {expected_size}")
        if CONFIG not in files or any(Path(name).name != name for name in files):
            raise ValueError(f"{CHECKSUMS} does not list the files of a checkpoint")
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged, or from an earlier version: {error}") from error
    return files


def verify(checkpoint: Path, share: slice = slice(None)) -> None:
    """Compare the files, or a ``share`` of them in alphabetical order, with their checksums.

    Raises:
        UserError: If a file is damaged.
    """
    for name, expected in sorted(read_checksums(checkpoint).items())[share]:
        if checksum(checkpoint / name) != expected:
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} has changed since it was written")


def complete_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in ``folder`` whose files all have the right size, newest first; warn about the others."""
    complete = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_checksums(path)
            complete.append(path)
        except UserError as error:
            log.warning("%s; trying the checkpoint before it", error)
    return complete


def newest_checkpoint(folder: Path) -> Path:
    """Return ``folder`` itself if it is a checkpoint, and otherwise the newest checkpoint of the run in that folder.

    Raises:
        UserError: If there is no complete checkpoint.
    """
    if (folder / CHECKSUMS).exists():
        return folder
    checkpoints = complete_checkpoints(folder / "checkpoints")
    if not checkpoints:
        raise UserError(f"{folder} contains no model ({CONFIG} and {WEIGHTS}) and no complete checkpoint")
    return checkpoints[0]


def read_weights(
    checkpoint: Path, model_format: ModelFormat, ema: bool = False
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Read a model's configuration and its state dict, of which at most 1 GiB is in memory at any time.

    Args:
        checkpoint: Folder of the checkpoint.
        model_format: The type of the model.
        ema: Whether to read the exponential moving average of the parameters instead of the parameters.

    Returns:
        The configuration, and an iterator over (name, tensor).

    Raises:
        UserError: If the checkpoint is damaged or has no moving average. The iterator raises it for values that are not
            finite.
    """
    verify(checkpoint)
    config = _read_config(checkpoint)
    metadata = read_metadata(checkpoint)
    if ema and not any(name.startswith(EMA) for name in metadata):
        raise UserError(f"checkpoint {checkpoint} has no moving average of the weights: the run did not set model_ema")
    names = _canonical_names(layout(config, model_format, checkpoint))
    sources = {name: EMA + first if ema and EMA + first in metadata else MODEL + first for name, first in names}
    for source in sources.values():
        if source not in metadata:
            raise UserError(f"checkpoint {checkpoint} lacks {source}: its {CONFIG} belongs to a different model")
    return config, read_tensors(checkpoint, sources, metadata)


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Return name → metadata for every tensor of a checkpoint.

    Raises:
        UserError: If a shard cannot be read.
    """
    try:
        return dict(_reader(checkpoint).read_metadata().state_dict_metadata)
    except Exception as error:  # of any type, because the reader parses untrusted headers
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {checkpoint} cannot be read: {type(error).__name__}: {reason}") from error


def _read_config(checkpoint: Path) -> dict[str, Any]:
    try:
        config = json.loads((checkpoint / CONFIG).read_bytes())
        if isinstance(config, dict):
            return config
        raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {checkpoint}: {CONFIG} is not the configuration of a model: {error}") from error


def export_model(
    checkpoint: Path,
    folder: Path,
    model_format: ModelFormat,
    ema: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json``, as the model's ``save_pretrained`` does.

    Args:
        metadata: Further entries of the header of the weights.

    Raises:
        UserError: If :func:`read_weights` or :func:`check_export` fails.
    """
    check_export(folder, model_format)
    config, weights = read_weights(checkpoint, model_format, ema)
    tensors = layout(config, model_format, checkpoint).state_dict()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(folder / WEIGHTS) as path, path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in weights:
            file.write(tensor.to(tensors[name].dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
        write_config(folder, model_format.published(config))  # only after all weights have been read and written


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``, before the weights, so that :func:`check_export` recognizes a partial export."""
    with atomic_path(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2, sort_keys=True))


def check_export(folder: Path, model_format: ModelFormat) -> None:
    """Check that a model may be written to ``folder``, which may contain other files.

    Raises:
        UserError: If the folder cannot be written to, or contains the weights or ``config.json`` of something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give the path of a folder")
    for name in (CONFIG, WEIGHTS):
        check_file(folder / name)
    try:
        config = json.loads((folder / CONFIG).read_bytes()) if (folder / CONFIG).exists() else None
    except (ValueError, RecursionError):
        config = None
    replaceable = isinstance(config, dict) and bool(model_format.marks & config.keys())
    for name in (CONFIG, WEIGHTS):
        if (folder / name).exists() and not replaceable:
            raise UserError(
                f"{folder} contains '{name}', which does not belong to a {model_format.title}: choose another folder, "
                "or move it"
            )


def layout(config: dict[str, Any], model_format: ModelFormat, checkpoint: Path) -> nn.Module:
    """Build the model on the meta device, without memory for its weights.

    Raises:
        UserError: If ``config`` does not describe a model; a matching checksum does not mean that the file can be
            trusted.
    """
    try:
        with torch.device("meta"):
            return model_format.build(config)
    except UserError as error:
        raise UserError(f"checkpoint {checkpoint}: {CONFIG}: {error}") from error
    except Exception as error:  # of any type, because the values may be anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {checkpoint}: {CONFIG} is not the configuration of a model: {type(error).__name__}: {reason}"
        ) from error


def _canonical_names(model: nn.Module) -> Iterable[tuple[str, str]]:
    """Return every name in the model's state dict together with the first name of the same tensor."""
    tensors = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    return [(name, first.setdefault(id(tensor), name)) for name, tensor in tensors.items()]


def _reader(checkpoint: Path) -> HuggingFaceStorageReader:
    import torch.distributed.checkpoint as dcp  # takes as long as torch to import, and tokenizers need none of it

    return dcp.HuggingFaceStorageReader(str(checkpoint))


def read_tensors(checkpoint: Path, sources: dict[str, str], metadata: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in the order of ``sources``.

    Args:
        checkpoint: Folder of the checkpoint.
        sources: Maps names to the names in the checkpoint.
        metadata: The result of :func:`read_metadata`.

    Raises:
        UserError: If a value is not finite.
    """
    from torch.distributed.checkpoint import load

    end = 0
    batch_of = {}
    for name, source in sources.items():
        end += metadata[source].size.numel() * metadata[source].properties.dtype.itemsize
        batch_of[name] = end // _BATCH_BYTES
    for _, group in groupby(sources, key=batch_of.__getitem__):
        names = list(group)
        tensors = {
            source: torch.empty(metadata[source].size, dtype=metadata[source].properties.dtype)
            for source in {sources[name] for name in names}
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about running in a single process
            load(tensors, storage_reader=_reader(checkpoint), no_dist=True)
        for name in names:
            check_finite(sources[name], tensors[sources[name]], checkpoint)
            yield name, tensors[sources[name]]
