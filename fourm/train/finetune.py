"""Initial weights from a run folder, a safetensors file, a hub id or a published ``.pth`` file."""

from __future__ import annotations

import argparse
import logging
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fourm.train.fsdp import set_shard
from fourm.utils import checkpoints
from fourm.utils.checkpoints import ModelFormat
from fourm.utils.errors import UserError
from fourm.utils.finite import check_finite

log = logging.getLogger("fourm")


def read_weights(source: str, model_format: ModelFormat) -> dict[str, Tensor]:
    """Read a state dict. Pickled files are read with ``weights_only``, so that they cannot run code.

    Args:
        source: A run folder, a folder with a model, a file or a hub id.
        model_format: The format of the models in checkpoints.

    Raises:
        UserError: The source does not exist, or cannot be read as weights.
    """
    path = Path(source)
    if path.is_dir() and not (path / "model.safetensors").exists():
        return dict(checkpoints.read_weights(checkpoints.newest_checkpoint(path), model_format)[1])
    if path.is_dir():
        path = path / "model.safetensors"
    try:
        if not path.exists() and path.suffix not in (".safetensors", ".pth") and not source.startswith((".", "/", "~")):
            path = Path(hf_hub_download(source, "model.safetensors"))
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files also hold the options of the run
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (HFValidationError, HfHubHTTPError, ConnectionError) as error:
        raise UserError(
            f"'finetune': '{source}' is neither a file nor a folder, and could not be loaded from the hub: "
            f"{_one_line(error)}"
        ) from error
    except FileNotFoundError:
        raise UserError(f"'finetune': {path} does not exist") from None
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        struct.error,
        MemoryError,
    ) as error:
        raise UserError(f"'finetune': {path} cannot be read as weights: {_one_line(error)}") from error
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(
            f"'finetune': {path} holds no weights; they must be a dictionary of tensors, alone or under 'model'"
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def load_weights(
    model: nn.Module,
    source: str,
    model_format: ModelFormat,
    select: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda weights, own: weights,
) -> None:
    """Load the tensors that ``model`` and the weights have in common, and log the others.

    Args:
        select: See :meth:`fourm.train.task.Task.select_weights`.

    Raises:
        UserError: A tensor has another shape or values that are not finite, or there is none in common.
    """
    own = model.state_dict()
    weights = select(read_weights(source, model_format), own)
    common = {name: tensor for name, tensor in weights.items() if name in own}
    for name, tensor in common.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"'finetune': {source}: {name} has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(own[name].shape)}; configure the model, sizes and vocabularies that the weights were trained "
                "with"
            )
    if not common:
        raise UserError(
            f"'finetune': {source} holds none of the tensors of the model; its first one is "
            f"{next(iter(weights), 'missing')}"
        )
    for name, tensor in common.items():
        check_finite(name, tensor, f"'finetune': {source}")
        set_shard(own[name], tensor)
    log.info("finetune: %d of %d tensors from %s", len(common), len(own), source)
    for description, names in (
        ("new in the model", own.keys() - common),
        ("not in the model", weights.keys() - common),
    ):
        if names:
            log.info("finetune: %s: %s", description, ", ".join(sorted({_module(name) for name in names})))


def _module(name: str) -> str:
    """``encoder_embeddings.caption.token_emb.weight`` → ``encoder_embeddings.caption``."""
    return ".".join(name.split(".")[: 2 if "embeddings" in name else 1])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
