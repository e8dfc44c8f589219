"""Files with the weights of learned tokenizers: what is in them, and a tokenizer made of it.

A file decides over shapes: ``config.json`` beside it may be silent or wrong about them. Published files hold more than a class
needs, such as the decoder for one who only encodes.
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
from fourm.utils.checkpoints import CONFIG, WEIGHTS, layout
from fourm.utils.errors import UserError
from fourm.utils.finite import check_finite
from fourm.utils.weight_files import parse_header

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class WeightsFile:
    """An open file.

    Attributes:
        header: what stands beside the tensors: a configuration, training options, or nothing.
        shapes: name → shape of each tensor.
        tensor: name → tensor.
    """

    path: Path
    header: dict[str, Any]
    shapes: Shapes
    tensor: Callable[[str], Tensor]


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """Open a ``.safetensors`` or a ``.pth`` file; of the latter nothing but tensors and options is read.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
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


def _read_pickle(path: Path) -> WeightsFile:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options beside published weights
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError,
            MemoryError) as error:  # fmt: skip
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
    """The local copy of the weights in a repository of the hub; its ``config.json`` is beside them, if there is one.

    Args:
        options: of ``hf_hub_download``: revision, cache_dir, token …

    Raises:
        UserError: there are none, or the hub cannot be reached.
    """
    try:
        path = Path(hf_hub_download(repository, WEIGHTS, **options))
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(repository, CONFIG, **options)
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"'{repository}' is no file, no folder, and not on the hub: {_brief(error)}") from error
    return path


def load_model(cls: Any, file: WeightsFile, config: Mapping[str, Any], device: str | torch.device = "cpu") -> Any:
    """The tokenizer of class ``cls`` in a file, in evaluation mode and in float32; what it does not need is not read.

    Args:
        config: as far as it is known.

    Raises:
        UserError: a tensor is missing, has another shape, or values that are not finite.
    """

    def build(config: dict[str, Any]) -> Any:
        return cls(config | cls.config_of_file(config, file.shapes))

    known = {key: value for key, value in config.items() if key != "ckpt_path"}
    model: Any = layout(known, replace(cls.model_format(), build=build), file.path)
    weights = {}
    for name, tensor in model.state_dict().items():
        source = next((other for other in model.names_in_file(name) if other in file.shapes), name)
        found = file.shapes.get(source)
        if found != tuple(tensor.shape):
            what = f"no {name}" if found is None else f"{name} of shape {found}, not {tuple(tensor.shape)}"
            raise UserError(
                f"{file.path}: these are not the weights of its {cls.__name__} configuration: there is {what}"
            )
        weights[name] = file.tensor(source).to(device, tensor.dtype, copy=True)
        check_finite(name, weights[name], file.path)
    model.load_state_dict(weights, assign=True)
    model.training_facts = read_facts(file.path)
    return model.to(device).eval()


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
