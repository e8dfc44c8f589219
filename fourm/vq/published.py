"""The published way to load a tokenizer: training options and weights in a ``.pth`` file."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from fourm.utils.errors import UserError
from fourm.vq.registry import constructor_options, find_weights, learned_class, load_tokenizer
from fourm.vq.vqvae import VQ
from fourm.vq.weights import load_model, open_weights

log = logging.getLogger(__name__)


def get_image_tokenizer(
    tokenizer_id: str,
    tokenizers_root: str | Path = "./tokenizer_ckpts",
    encoder_only: bool = False,
    device: str | torch.device = "cpu",
    verbose: bool = True,
    return_None_on_fail: bool = False,
) -> tuple[VQ | None, argparse.Namespace | None]:
    """A learned tokenizer in evaluation mode, and the options that it was trained with.

    Args:
        tokenizer_id: of the file ``tokenizers_root/tokenizer_id.pth``, which is read without running anything in it; or
            whatever :func:`fourm.vq.load_tokenizer` takes.
        encoder_only: load a :class:`VQ`, which tokenizes.
        verbose: log what is loaded.
        return_None_on_fail: return ``(None, None)`` if it cannot be loaded.

    Raises:
        UserError: it cannot be loaded.
    """
    path = Path(tokenizers_root) / f"{tokenizer_id}.pth"
    try:
        if not path.exists():
            place = find_weights(tokenizer_id)
            model: Any = VQ.from_pretrained(place.parent) if encoder_only else load_tokenizer(tokenizer_id)
            return model.to(device), argparse.Namespace(**model.config)
        with open_weights(path) as file:
            cls = VQ if encoder_only else learned_class(file.shapes)
            model = load_model(cls, file, constructor_options(file.header), device)
    except UserError:
        if return_None_on_fail:
            return None, None
        raise
    if verbose:
        log.info("%s from %s", cls.__name__, path)
    return model, argparse.Namespace(**file.header)
