"""What a batch holds → its natural form: pictures, sentences, boxes, numbers.

One table, :data:`DECODERS`, says how each kind of modality is read. Nothing that a model writes is an error: what has no
meaning is left out, and :attr:`Decoded.dropped` counts it.

Shapes: h x w tokens, H x W pixels, C channels. Masks: True = masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fourm.data.collate import ModDict
from fourm.data.modality_info import Modality, as_modality
from fourm.data.modality_transforms import MODALITY_TRANSFORMS, ScalarTransform, transforms_for
from fourm.data.transforms.image import PixelTransform
from fourm.generation.sequences import SEQUENCES, read_words
from fourm.utils.errors import UserError
from fourm.vq import ImageTokenizer

Tokenizers = Mapping[str, ImageTokenizer]
"""By the modality of the images: ``rgb``, ``depth``, …"""


@dataclass(frozen=True)
class Decoded:
    """One modality of one sample.

    Attributes:
        kind: what ``value`` is, a key of ``fourm.generation.plotting.PLOTTERS``.
        value: see :data:`DECODERS`.
        dropped: how many tokens (of texts: words) have no meaning and were left out.
        names: of the classes, where ``value`` is class ids and they are known.
        tensor: what the model has read or written: ids (h, w) of an image, −1 where nothing is known, ids (L,) of a
            text, pixels as the model takes them. A result that is an input again is given as this.
    """

    kind: str
    value: Any
    dropped: int = 0
    names: tuple[str, ...] = ()
    tensor: Tensor | None = field(default=None, compare=False, repr=False)


def kind_of(modality: Modality) -> str:
    """What a modality shows: ``tok_depth@224`` → ``depth``, ``rgb@224`` → ``rgb``, ``caption`` → ``caption``."""
    return str(modality.transform).split("@")[0].removeprefix("tok_")


def decode(
    mod_dict: ModDict,
    modality_info: Mapping[str, Mapping[str, Any]],
    tokenizers: Tokenizers | None = None,
    text_tokenizer: Tokenizer | None = None,
) -> list[dict[str, Decoded]]:
    """Everything that a batch has as input, which after generation includes the targets.

    Args:
        modality_info: the model's modalities.
        tokenizers: of images; tokens without one stay a grid of ids.
        text_tokenizer: needed for texts.

    Returns:
        modality → :class:`Decoded`, for each sample.
    """
    read = {
        name: [
            decode_modality(
                tensor, mask.bool(), as_modality(name, modality_info[name]), tokenizers or {}, text_tokenizer
            )
            for tensor, mask in zip(entry["tensor"].cpu(), entry["input_mask"].cpu(), strict=True)
        ]
        for name, entry in mod_dict.items()
        if name in modality_info
    }
    return [dict(zip(read, values, strict=True)) for values in zip(*read.values(), strict=True)]


def decode_modality(
    tensor: Tensor, masked: Tensor, modality: Modality, tokenizers: Tokenizers, text_tokenizer: Tokenizer | None
) -> Decoded:
    """One modality of one sample.

    Args:
        tensor: ids (L,) or (h, w), or pixels (C, H, W).
        masked: (L,)
    """
    kind = kind_of(modality)
    if modality.is_pixels:
        transform = MODALITY_TRANSFORMS.get(str(modality.transform))
        statistics = transform.statistics if isinstance(transform, PixelTransform) else None
        return replace(decode_pixels(kind, tensor[None], statistics), tensor=tensor)
    if modality.type == "seq_emb":
        return Decoded("vectors", tensor[~masked].float().numpy(), tensor=tensor[~masked])
    if modality.transform == "scalar":
        transform, known = transforms_for({modality.name: modality})[modality.name], not bool(masked.any())
        assert isinstance(transform, ScalarTransform)
        value = transform.decode(int(tensor)) if known else None
        return Decoded("scalar", value, int(not known), tensor=tensor.flatten())
    if modality.type == "img":
        return _image(tensor.flatten(), masked, kind, tokenizers.get(kind))
    ids = tensor[~masked]
    if modality.type == "seq_token":
        return Decoded("tokens", ids[None].numpy() - modality.vocab_offset, tensor=ids)
    if text_tokenizer is None:
        raise UserError(f"{modality.name}: reading texts needs the text vocabulary; pass text_tokenizer")
    words, dropped = read_words(ids.tolist(), text_tokenizer)
    kind = kind if kind in SEQUENCES else "caption"
    value, unread = SEQUENCES[kind](words)
    return Decoded(kind, value, dropped + unread, tensor=ids)


def _image(ids: Tensor, masked: Tensor, kind: str, tokenizer: ImageTokenizer | None) -> Decoded:
    """Tokens that are not known yet, or that the tokenizer does not have, are missing in the picture."""
    side = round(len(ids) ** 0.5)
    width = side if side * side == len(ids) else len(ids)
    grid, missing = ids.view(-1, width), masked.view(-1, width)
    known = torch.where(missing, -1, grid)
    if tokenizer is None:
        return Decoded("tokens", known.numpy(), int(missing.sum()), tensor=known)
    missing = missing | (grid < 0) | (grid >= tokenizer.vocab_size)
    with torch.inference_mode():
        pixels = tokenizer.decode_tokens(grid.masked_fill(missing, 0)[None].long().to(tokenizer.device)).float().cpu()
    factors = (pixels.shape[-2] // grid.shape[0], pixels.shape[-1] // grid.shape[1])
    hidden = missing.repeat_interleave(factors[0], 0).repeat_interleave(factors[1], 1)
    pixels = (pixels.argmax(1, keepdim=True).float() if kind in CLASSES and pixels.shape[1] > 1 else pixels).clone()
    pixels[:, :, hidden] = torch.nan
    return replace(decode_pixels(kind, pixels, ((0.5,), (0.5,)), int(missing.sum())), tensor=known)


def decode_pixels(kind: str, pixels: Tensor, statistics: tuple | None, dropped: int = 0) -> Decoded:
    """Pixels (1, C, H, W), nan where they are missing, as :data:`DECODERS` gives them."""
    kind = kind if kind in DECODERS else "feature"
    image = pixels[0].permute(1, 2, 0).float().numpy()  # bfloat16 is unknown to numpy
    if statistics is not None and DECODERS[kind] in (_color, _grey):
        mean, std = (np.array(values, np.float32) for values in statistics)
        image = image * std + mean
    return Decoded(kind, DECODERS[kind](image), dropped)


def _color(image: np.ndarray) -> np.ndarray:
    return (np.nan_to_num(image, nan=0.5).clip(0, 1) * 255).round().astype(np.uint8)


def _grey(image: np.ndarray) -> np.ndarray:
    return np.nan_to_num(image[..., 0], nan=0.0).clip(0, 1)


def _normals(image: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(image, axis=-1, keepdims=True)
    return np.nan_to_num(image / np.maximum(length, 1e-6))


def _classes(image: np.ndarray) -> np.ndarray:
    return np.nan_to_num(image[..., 0], nan=-1).round().astype(np.int64)


DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rgb": _color,
    "depth": lambda image: image[..., 0],
    "normal": _normals,
    "semseg": _classes,
    "semseg_coco": _classes,
    "canny_edge": _grey,
    "sam_edge": _grey,
    "feature": lambda image: image,
}
"""Kind → how values (H, W, C) of a picture, colours in [0, 1], become

* rgb: (H, W, 3) uint8, grey where something is missing
* depth: (H, W) float, standardised; nan where something is missing
* normal: (H, W, 3) float of unit length, zeros where something is missing
* semseg: (H, W) class ids, −1 where something is missing
* edges: (H, W) float in [0, 1]
* feature, and whatever else has a tokenizer: (H, W, C) float

Tokens without a tokenizer are a grid (h, w) of ids, −1 where something is missing. What becomes of texts is in
:data:`fourm.generation.sequences.SEQUENCES`.
"""

CLASSES = ("semseg", "semseg_coco")
