"""What a result was made from, in few characters: results of other inputs or other models are then told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourm.data.raw_sample import OpenFiles
from fourm.generation.stages import Stage

_NUMBERS = 16  # of each tensor; training changes all of them


def digest_of_inputs(inputs: Mapping[str, Any]) -> str:
    """Of the content of files and texts.

    Args:
        inputs: modality → file or text; or "" → a sample of a folder.

    Raises:
        OSError: a file cannot be read.
    """
    parts: dict[str, bytes] = {}
    for name, value in inputs.items():
        if isinstance(value, Path):
            parts[name] = value.read_bytes()
        elif isinstance(value, str):
            parts[name] = value.encode()
        else:
            files = OpenFiles()
            parts |= {member: files.read(place) for member, place in value.members.items() if place is not None}
    return _digest(*(part for name in sorted(parts) for part in (name.encode(), parts[name])))


def digest_of_models(stages: Sequence[Stage]) -> str:
    """Of the weights of models and tokenizers, a few of each tensor, and of the vocabularies."""
    parts = []
    for sampler in (stage.sampler for stage in stages):
        modules: list[nn.Module] = [sampler.generation.model]
        modules += [tokenizer for _, tokenizer in sorted(sampler.tokenizers.items())]
        parts += [_sketch(module) for module in modules]
        words = sampler.text_tokenizer
        parts.append(b"" if words is None else words.to_str().encode())
    return _digest(*parts)


def _sketch(module: nn.Module) -> bytes:
    # Compiled blocks have other names for the same tensors.
    return b"".join(_some(tensor) for tensor in module.state_dict().values())


def _some(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().flatten()
    return flat[:: max(len(flat) // _NUMBERS, 1)][:_NUMBERS].double().cpu().numpy().tobytes()


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:24]
