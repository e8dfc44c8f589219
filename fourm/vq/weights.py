"""Files with the weights of learned tokenizers, and how a tokenizer is built from them.

The shapes in a file override its ``config.json``, which may lack them or contradict them. Published files may hold more
tensors than a class needs, for example a decoder for a class that only encodes.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fourm.models.model_card import read_facts
from fourm.utils.checkpoints import CHECKSUMS, CONFIG, MODEL, WEIGHTS, layout, read_metadata, read_tensors, verify
from fourm.utils.errors import UserError
from fourm.utils.finite import check_finite
from fourm.utils.weight_files import parse_header

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class WeightsFile:
    """An open file of weights.

    Attributes:
        path: The path of the file.
        header: The configuration or the training options that the file holds beside its tensors; may be empty.
        shapes: The shape of each tensor by name.
        tensor: Returns the tensor with a name.
    """

    path: Path
    header: dict[str, Any]
    shapes: Shapes
    tensor: Callable[[str], Tensor]


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """Open a ``.safetensors`` file, a ``.pth`` file, or the checkpoint of a training run.

    Args:
        path: The file; for a checkpoint, its ``checksums.json``. Pickled files are read without running code in them.

    Raises:
        UserError: The file does not exist, or is damaged.
    """
    try:
        if path.name == CHECKSUMS:
            yield _read_checkpoint(path.parent)
            return
        if path.suffix != ".safetensors":
            yield _read_pickle(path)
            return
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            yield WeightsFile(path, parse_header(file.metadata() or {}), shapes, file.get_tensor)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or holds no weights: {_brief(error)}") from error


def _read_checkpoint(checkpoint: Path) -> WeightsFile:
    verify(checkpoint)
    metadata = read_metadata(checkpoint)
    sources = {name.removeprefix(MODEL): name for name in metadata if name.startswith(MODEL)}
    tensors = dict(read_tensors(checkpoint, sources, metadata))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return WeightsFile(checkpoint, {}, shapes, tensors.__getitem__)


def _read_pickle(path: Path) -> WeightsFile:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options beside published weights
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        MemoryError,
    ) as error:
        raise UserError(f"{path} cannot be read as weights: {_brief(error)}") from error
    content = content if isinstance(content, dict) else {}
    tensors = content.get("model", content.get("state_dict", content))
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} holds no weights: a dictionary of tensors, alone or under 'model' or 'state_dict'")
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in tensors.items()}
    options = content.get("args")
    header = dict(vars(options)) if isinstance(options, argparse.Namespace) else {}
    return WeightsFile(
        path, header, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__
    )


def download(repository: str, **options: Any) -> Path:
    """Download the weights of a repository on the hub, and its ``config.json`` if it has one.

    Args:
        repository: ``OWNER/NAME``.
        options: Options of ``hf_hub_download``, such as revision, cache_dir and token.

    Returns:
        The local path of the weights; ``config.json`` is in the same folder.

    Raises:
        UserError: The repository has no weights, or the hub cannot be reached.
    """
    try:
        path = Path(hf_hub_download(repository, WEIGHTS, **options))
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(repository, CONFIG, **options)
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"'{repository}' is neither a file nor a folder, and could not be loaded from the hub: {_brief(error)}"
        ) from error
    return path


def load_model(cls: Any, file: WeightsFile, config: Mapping[str, Any], device: str | torch.device = "cpu") -> Any:
    """Build the tokenizer in a file, in evaluation mode and in float32. Only the tensors that it needs are read.

    Args:
        cls: The class of the tokenizer.
        file: The open file.
        config: The configuration, which may be incomplete.
        device: The device of the tokenizer.

    Raises:
        UserError: A tensor is missing, has another shape, or has values that are not finite.
    """

    def build(config: dict[str, Any]) -> Any:
        return cls(config | cls.config_of_file(config, file.shapes))

    known = {key: value for key, value in config.items() if key != "ckpt_path"}
    model: Any = layout(known, replace(cls.model_format(), build=build), file.path)
    weights = {}
    for name, tensor in model.state_dict().items():
        source = next((other for other in model.names_in_file(name) if other in file.shapes), name)
        shape, expected = file.shapes.get(source), tuple(tensor.shape)
        if shape != expected:
            problem = f"no {name}" if shape is None else f"{name} of shape {shape}, not {expected}"
            raise UserError(
                f"{file.path}: these are not the weights of its {cls.__name__} configuration: there is {problem}"
            )
        weights[name] = file.tensor(source).to(device, tensor.dtype, copy=True)
        check_finite(name, weights[name], file.path)
    model.load_state_dict(weights, assign=True)
    model.training_facts = read_facts(file.path)
    return model.to(device).eval()


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
