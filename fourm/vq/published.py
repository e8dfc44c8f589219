"""Loads tokenizers in the published way, from a ``.pth`` file with weights and training options."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from fourm.utils.errors import UserError
from fourm.vq.registry import constructor_options, learned_class, load_tokenizer
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
    """Load a learned tokenizer in evaluation mode, and the options that it was trained with.

    Args:
        tokenizer_id: Names the file ``tokenizers_root/tokenizer_id.pth``, which is read without running code in it. If
            there is no such file, any ``place`` of :func:`fourm.vq.load_tokenizer`.
        tokenizers_root: The folder of the files.
        encoder_only: Load a :class:`VQ`, which can only tokenize.
        device: The device of the tokenizer.
        verbose: Log the class and the file.
        return_None_on_fail: Return ``(None, None)`` if the tokenizer cannot be loaded.

    Raises:
        UserError: The tokenizer cannot be loaded.
    """
    path = Path(tokenizers_root) / f"{tokenizer_id}.pth"
    try:
        if not path.exists():
            tokenizer: Any = load_tokenizer(tokenizer_id, device, encoder_only)
            return tokenizer, argparse.Namespace(**tokenizer.config)
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
