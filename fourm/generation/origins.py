"""Digests of the inputs and models of a result, to detect results that were made from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourm.data.raw_sample import OpenFiles
from fourm.generation.defaults import Defaults
from fourm.generation.stages import Stage

_VALUES_PER_TENSOR = 16  # few are enough, because training changes all of them


def digest_of_inputs(inputs: Mapping[str, Any]) -> str:
    """Compute a digest of the content of files and texts.

    Args:
        inputs: Maps each modality to a file or text, or "" to a sample of a folder.

    Raises:
        OSError: If a file cannot be read.
    """
    parts: dict[str, bytes] = {}
    for name, value in inputs.items():
        if isinstance(value, Path):
            parts[name] = value.read_bytes()
        elif isinstance(value, str):
            parts[name] = value.encode()
        else:
            files = OpenFiles()
            parts |= {member: files.read(source) for member, source in value.members.items() if source is not None}
    return _digest(*(part for name in sorted(parts) for part in (name.encode(), parts[name])))


def digest_of_models(stages: Sequence[Stage]) -> str:
    """Compute a digest of the models and tokenizers, from a few values of each tensor, vocabularies and defaults."""
    parts = []
    for sampler in (stage.sampler for stage in stages):
        modules: list[nn.Module] = [sampler.generation.model]
        modules += [tokenizer for _, tokenizer in sorted(sampler.tokenizers.items())]
        parts += [_module_bytes(module) for module in modules]
        vocabulary = sampler.text_tokenizer
        parts.append(b"" if vocabulary is None else vocabulary.to_str().encode())
        if sampler.defaults != Defaults():
            own = replace(sampler.defaults, tokenizers=None, text_tokenizer=None)  # without paths
            parts.append(json.dumps(asdict(own)).encode())
    return _digest(*parts)


def _module_bytes(module: nn.Module) -> bytes:
    # Names are left out, because compiled blocks have other names for the same tensors.
    return b"".join(_tensor_bytes(tensor) for tensor in module.state_dict().values())


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().flatten()
    step = max(len(flat) // _VALUES_PER_TENSOR, 1)
    return flat[::step][:_VALUES_PER_TENSOR].double().cpu().numpy().tobytes()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]
