"""Converts the tokens of a batch to their natural form: pictures, sentences, boxes, numbers.

The table :data:`DECODERS` says how each kind of image is decoded. A model may generate anything, so tokens without a
meaning are not an error; they are dropped and counted in :attr:`Decoded.dropped`.

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
from torch.nn.functional import interpolate

from fourm.data.collate import ModDict
from fourm.data.modality_info import Modality, as_modality
from fourm.data.modality_transforms import MODALITY_TRANSFORMS, ScalarTransform, transforms_for
from fourm.data.transforms.image import PixelTransform
from fourm.generation.instances import decode_instances
from fourm.generation.poses import decode_poses
from fourm.generation.sequences import SEQUENCES, read_words
from fourm.utils.errors import UserError
from fourm.vq import ImageTokenizer
from fourm.vq.controlnet import VQControlNet
from fourm.vq.diffusion import DECODING_STEPS
from fourm.vq.divae import DiVAE

Tokenizers = Mapping[str, ImageTokenizer]
"""Maps kinds of modalities (``rgb``, ``depth``, ``human_poses``, …) to their tokenizers."""


@dataclass(frozen=True)
class Detokenizer:
    """How tokenizers that decode by diffusion sample images; others ignore it.

    The ``picture_options`` of a tokenizer override these options and the seed.

    Attributes:
        steps: Number of diffusion steps.
        guidance_scale, cond_scale: Of a ControlNet: how far to go beyond a prediction without tokens, and their weight.
        batch_size: Number of images that any tokenizer decodes at a time, which limits the memory that it needs.
    """

    steps: int = DECODING_STEPS
    guidance_scale: float = 2.5
    cond_scale: float = 0.8
    batch_size: int = 8

    def decode(self, tokenizer: ImageTokenizer, ids: Tensor, seed: int | None = None) -> Tensor:
        """Decode the tokens of images.

        Args:
            tokenizer: The tokenizer.
            ids: Ids (B, L), see :meth:`ImageTokenizer.to_grid`.
            seed: Seed of the first image, which those of the others follow. By default, the same tokens always give the
                same picture.

        Returns:
            What the tokenizer decodes, (B, C, H, W), on the CPU.
        """
        seeds = [0] * len(ids) if seed is None else [seed + index for index in range(len(ids))]
        parts = (slice(start, start + self.batch_size) for start in range(0, len(ids), self.batch_size))
        return torch.cat([self._decode(tokenizer, ids[part], seeds[part]) for part in parts])

    def _decode(self, tokenizer: ImageTokenizer, ids: Tensor, seeds: list[int]) -> Tensor:
        options: dict[str, Any] = {}
        if isinstance(tokenizer, (DiVAE, VQControlNet)):
            options = {"timesteps": self.steps, "seed": seeds}
        if isinstance(tokenizer, VQControlNet):
            options |= {"guidance_scale": self.guidance_scale, "cond_scale": self.cond_scale}
        return tokenizer.decode_pictures(tokenizer.to_grid(ids), **options)


DETOKENIZER = Detokenizer()


@dataclass(frozen=True)
class Decoded:
    """One modality of one sample.

    Attributes:
        kind: What ``value`` is: a key of ``IMAGES`` or ``PLOTTERS`` in :mod:`fourm.generation.plotting`.
        value: The decoded value, see :data:`DECODERS`.
        dropped: Number of tokens (words in texts) that have no meaning and were dropped.
        names: Names of the classes, if ``value`` consists of class ids and the names are known.
        tensor: What the model read or generated: ids (h, w) of an image, −1 where they are unknown, ids (L,) of a text,
            or normalised pixels. If the result is used as an input, the model gets this tensor.
    """

    kind: str
    value: Any
    dropped: int = 0
    names: tuple[str, ...] = ()
    tensor: Tensor | None = field(default=None, compare=False, repr=False)


def kind_of(modality: Modality) -> str:
    """Return the kind of a modality, which is ``depth`` for ``tok_depth@224`` and ``rgb`` for ``rgb@224``."""
    return str(modality.transform).split("@")[0].removeprefix("tok_")


def decode(
    mod_dict: ModDict,
    modality_info: Mapping[str, Mapping[str, Any]],
    tokenizers: Tokenizers | None = None,
    text_tokenizer: Tokenizer | None = None,
    detokenizer: Detokenizer = DETOKENIZER,
) -> list[dict[str, Decoded]]:
    """Decode all inputs of a batch, which include the targets after generation; images of a modality together.

    Args:
        mod_dict: The batch.
        modality_info: The modalities of the model.
        tokenizers: Tokenizers of images; tokens without a tokenizer stay a grid of ids.
        text_tokenizer: Text vocabulary, needed for texts.
        detokenizer: How images are decoded by diffusion.

    Returns:
        A dict from modality to :class:`Decoded` for each sample.

    Raises:
        UserError: If the batch contains texts and there is no text vocabulary.
    """
    decoded = {
        name: _decode_batch(
            entry["tensor"].cpu(),
            entry["input_mask"].cpu().bool(),
            as_modality(name, modality_info[name]),
            tokenizers or {},
            text_tokenizer,
            detokenizer,
        )
        for name, entry in mod_dict.items()
        if name in modality_info
    }
    return [dict(zip(decoded, values, strict=True)) for values in zip(*decoded.values(), strict=True)]


def _decode_batch(
    tensor: Tensor,
    masked: Tensor,
    modality: Modality,
    tokenizers: Tokenizers,
    text_tokenizer: Tokenizer | None,
    detokenizer: Detokenizer,
) -> list[Decoded]:
    if _has_tokenizer(modality):
        kind = kind_of(modality)
        return _images(tensor.flatten(1), masked, kind, tokenizers.get(kind), detokenizer)
    rows = zip(tensor, masked, strict=True)
    return [decode_modality(*row, modality, tokenizers, text_tokenizer, detokenizer) for row in rows]


def _has_tokenizer(modality: Modality) -> bool:
    """Return whether a modality consists of the ids of a tokenizer of images."""
    return modality.type == "img" and not modality.is_pixels and modality.transform != "scalar"


def decode_modality(
    tensor: Tensor,
    masked: Tensor,
    modality: Modality,
    tokenizers: Tokenizers,
    text_tokenizer: Tokenizer | None,
    detokenizer: Detokenizer = DETOKENIZER,
) -> Decoded:
    """Decode one modality of one sample: pictures by :data:`DECODERS`, texts by ``SEQUENCES`` and then :data:`CODES`.

    Args:
        tensor: Ids (L,) or (h, w), or pixels (C, H, W).
        masked: Mask (L,), True where a token is unknown.
        modality: The modality.
        tokenizers, text_tokenizer, detokenizer: See :func:`decode`.

    Raises:
        UserError: If the modality is a text and there is no text vocabulary.
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
    if _has_tokenizer(modality):
        return _images(tensor.view(1, -1), masked[None], kind, tokenizers.get(kind), detokenizer)[0]
    ids = tensor[~masked]
    if modality.type == "seq_token":
        return Decoded("tokens", ids[None].numpy() - modality.vocab_offset, tensor=ids)
    if text_tokenizer is None:
        raise UserError(f"{modality.name}: reading texts needs the text vocabulary; pass text_tokenizer")
    words, dropped = read_words(ids.tolist(), text_tokenizer)
    kind = kind if kind in SEQUENCES else "caption"
    value, unread = SEQUENCES[kind](words)
    undecoded = 0
    if kind in CODES and kind in tokenizers:
        value, undecoded = CODES[kind](value, tokenizers[kind])
    return Decoded(kind, value, dropped + unread + undecoded, tensor=ids)


def _images(
    ids: Tensor, masked: Tensor, kind: str, tokenizer: ImageTokenizer | None, detokenizer: Detokenizer
) -> list[Decoded]:
    """Decode images (B, L). Tokens that are unknown, or beyond those of the tokenizer, are missing in the pictures."""
    length = ids.shape[1]
    side = round(length**0.5)
    width = side if side * side == length else length
    known = torch.where(masked, -1, ids)
    grids = known.view(len(ids), -1, width)
    if tokenizer is None:
        rows = zip(grids, masked, strict=True)
        return [Decoded("tokens", grid.numpy(), int(row.sum()), tensor=grid) for grid, row in rows]
    if length % tokenizer.num_codebooks:
        raise UserError(
            f"the tokenizer of {kind} has {tokenizer.num_codebooks} codebooks, which {length} tokens do not fit"
        )
    unknown = (known < 0) | (known >= tokenizer.vocab_size)
    pixels = detokenizer.decode(tokenizer, known.masked_fill(unknown, 0))
    places = tokenizer.to_grid(unknown)
    missing = places if places.ndim == 3 else places.any(1)  # a place needs the ids of all its codebooks
    hidden = interpolate(missing[:, None].float(), pixels.shape[-2:], mode="nearest").bool()
    pixels = pixels.argmax(1, keepdim=True).float() if kind in CLASSES and pixels.shape[1] > 1 else pixels
    pixels = pixels.masked_fill(hidden, torch.nan)
    scale = ((0.5,), (0.5,))
    return [
        replace(decode_pixels(kind, picture[None], scale, int(row.sum())), tensor=grid)
        for picture, row, grid in zip(pixels, unknown, grids, strict=True)
    ]


def decode_pixels(kind: str, pixels: Tensor, statistics: tuple | None, dropped: int = 0) -> Decoded:
    """Convert pixels (1, C, H, W), nan where they are missing, as described at :data:`DECODERS`."""
    if kind not in DECODERS:
        kind = "vector" if pixels.shape[-2:] == (1, 1) else "feature"
    image = pixels[0].permute(1, 2, 0).float().numpy()  # numpy has no bfloat16
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
    "vector": lambda image: image[0, 0],
}
"""Maps each kind of picture to a function that converts its values (H, W, C), with colours in [0, 1], to

* rgb: (H, W, 3) uint8, grey where something is missing
* depth: (H, W) float, standardised; nan where something is missing
* normal: (H, W, 3) float of unit length, zeros where something is missing
* semseg: (H, W) class ids, −1 where something is missing
* edges: (H, W) float in [0, 1]
* feature, and any other map that has a tokenizer: (h, w, C) float, nan where something is missing
* vector, which describes the whole picture: (C,) float for retrieval; nan if one of its tokens is missing

Tokens without a tokenizer are a grid (h, w) of ids, −1 where something is missing. Texts are decoded by
:data:`fourm.generation.sequences.SEQUENCES`, and the codes in them by :data:`CODES`.
"""

CODES: dict[str, Callable[[Any, ImageTokenizer], tuple[Any, int]]] = {
    "human_poses": decode_poses,
    "sam_instance": decode_instances,
}
"""Maps each kind of text with codes of a tokenizer to a function that decodes them in the parsed value, and counts the
words that it drops."""

CLASSES = ("semseg", "semseg_coco")
