"""Which class reads which tokenizer folder. A new kind of tokenizer is one line in ``TOKENIZERS``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fourm.utils.config import build
from fourm.utils.errors import UserError, did_you_mean
from fourm.vq.feature_codebook import FeatureCodebook
from fourm.vq.patch_codebook import PatchCodebook
from fourm.vq.tokenizer import CONFIG, WEIGHTS, ImageTokenizer

TOKENIZERS: dict[str, type[ImageTokenizer]] = {cls.kind: cls for cls in (PatchCodebook, FeatureCodebook)}
"""By the ``type`` in ``config.json``."""


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """The tokenizer that :meth:`ImageTokenizer.save` wrote, in evaluation mode.

    Raises:
        UserError: a file is missing or damaged, or of a type that is not registered.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS, device=str(device))
    except OSError as error:
        raise UserError(f"{folder} is not a tokenizer folder ({CONFIG} and {WEIGHTS}): {error}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}: a file of this tokenizer is damaged: {error}") from error
    type_name = content.pop("type", None) if isinstance(content, dict) else None
    if not isinstance(type_name, str) or type_name not in TOKENIZERS:
        raise UserError(
            f"{folder / CONFIG}: unknown tokenizer type '{type_name}'{did_you_mean(str(type_name), TOKENIZERS)}"
        )
    cls = TOKENIZERS[type_name]
    config = build(cls.Config, content, str(folder / CONFIG))
    try:
        tokenizer = cls(config).to(device)
        tokenizer.load_state_dict(weights)
    except (RuntimeError, MemoryError) as error:  # sizes that nothing can have, too
        raise UserError(f"{folder / WEIGHTS} does not fit {CONFIG}: {' '.join(str(error).split())[:500]}") from error
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{folder / WEIGHTS}: {name} holds values that are not finite; fit the tokenizer again")
    return tokenizer.eval()
