"""The interface of image tokenizers, which convert between pixels and grids of token ids, and their files.

Shapes: B images, C channels, H x W pixels, h x w = H/patch x W/patch tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from fourm.utils.errors import DataError, UserError
from fourm.utils.files import atomic_folder, check_folder, save_tensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class TokenizerConfig:
    """The configuration that all tokenizers share; ``config.json`` stores it together with the tokenizer's type.

    Attributes:
        modality: The modality of the training images: a domain of :mod:`fourm.vq.domains`, or a key of
            ``MODALITY_TRANSFORMS``.
        vocab_size: The number of token ids.
        patch_size: The side length in pixels of the patch that one token stands for.
        num_channels: The number of channels of the input.
        input_size: The side length in pixels of the training images; other multiples of ``patch_size`` work too.
        value_range: The smallest and the largest value of the training images.
        transform_options: The fields of the modality's transform that differ from the defaults for tokenizers.
    """

    modality: str
    vocab_size: int
    patch_size: int
    num_channels: int
    input_size: int
    value_range: tuple[float, float] = (-1.0, 1.0)
    transform_options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "patch_size", "num_channels", "input_size", "one_hot_classes"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise UserError(f"tokenizer: '{name}' must be at least 1, not {value}")
        low, *others = self.value_range
        if len(others) != 1 or not -math.inf < low <= others[0] < math.inf:
            raise UserError(
                f"tokenizer: 'value_range' must be two finite numbers, the smaller one first, not {self.value_range}"
            )
        if self.input_size % self.patch_size:
            raise UserError(
                f"tokenizer: input_size {self.input_size} is not a multiple of patch_size {self.patch_size}"
            )


class ImageTokenizer(nn.Module, ABC):
    """The base class of tokenizers.

    A subclass sets ``kind`` and ``Config``, is built from a config, keeps everything that it learns in its state dict,
    and is listed in ``fourm.vq.registry``. Inputs and outputs have the values that the modality's transform gives them
    (``fourm.vq.crops.tokenizer_transform``).

    Attributes:
        config: The configuration that the tokenizer is built from.
        info: The part of the configuration that all tokenizers share.
        input_patch: The side length of the part of the input that becomes a token; 1 if the input is a map of features.
        takes_vectors: Whether a sample is a single vector, (D, 1, 1).
        num_codebooks: G, the number of ids for each place.
        feature_network: The network of timm that extracts the features that it tokenizes; ``none`` if they are read
            from files, and empty if that is not known.
        picture_options: Options of :meth:`decode_tokens` that you may set for :meth:`decode_pictures`; they override
            all others.
    """

    kind: ClassVar[str]
    Config: ClassVar[type[TokenizerConfig]] = TokenizerConfig

    info: TokenizerConfig
    takes_vectors: bool = False
    num_codebooks: int = 1
    feature_network: str = ""
    picture_options: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config: Any = config
        self.info = config
        self.vocab_size, self.patch_size, self.num_channels = config.vocab_size, config.patch_size, config.num_channels
        self.input_patch = config.patch_size

    @abstractmethod
    def tokenize(self, x: Tensor) -> Tensor:
        """Tokenize images (B, C, H, W) float → ids (B, h, w), or (B, G, h, w) with G codebooks, in [0, vocab_size)."""

    @abstractmethod
    def decode_tokens(self, ids: Tensor, /) -> Tensor:
        """Decode ids, (B, h, w) → images (B, C, H, W) float; tokens of features become features (B, D, h, w).

        Class maps are decoded to one channel of class ids, or to one channel of logits for each class.
        """

    def to_grid(self, ids: Tensor) -> Tensor:
        """Arrange saved ids for decoding, (B, L) → (B, h, w), or (B, G L) → (B, G, h, w) with G codebooks.

        The grid is square if L is a square number, and otherwise a single row.
        """
        places = ids.shape[1] // self.num_codebooks
        side = math.isqrt(places)
        grid = ids.reshape(len(ids), self.num_codebooks, -1, side if side * side == places else places)
        return grid if self.num_codebooks > 1 else grid[:, 0]

    @torch.no_grad()
    def decode_pictures(self, ids: Tensor, **options: Any) -> Tensor:
        """Decode ids on any device to float32 on the CPU, by :meth:`decode_tokens`.

        Args:
            ids: Ids, (B, h, w), or (B, G, h, w) with G codebooks.
            options: Options of :meth:`decode_tokens`, which ``picture_options`` override.

        Returns:
            What the tokenizer decodes, (B, C, H, W).
        """
        return self.decode_tokens(ids.long().to(self.device), **{**options, **self.picture_options}).float().cpu()

    def to_patches(self, x: Tensor) -> Tensor:
        """Cut images into patches, (B, C, H, W) → (B, h, w, C, patch, patch); raises like :meth:`check_images`."""
        self.check_images(x)
        return rearrange(x, "b c (h p) (w q) -> b h w c p q", p=self.patch_size, q=self.patch_size)

    def check_images(self, x: Tensor) -> None:
        """Check the shape of images (B, C, H, W).

        Raises:
            DataError: The number of channels is wrong, or the height or width is not a multiple of ``input_patch``.
        """
        p = self.input_patch
        if x.ndim != 4 or x.shape[1] != self.num_channels or x.shape[2] % p or x.shape[3] % p:
            raise DataError(
                f"the {self.info.modality} tokenizer takes images of shape (B, {self.num_channels}, H, W) with H and W "
                f"multiples of {p}, not {tuple(x.shape)}"
            )

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``; a tokenizer that is already there is replaced.

        Raises:
            UserError: See :func:`check_output`.
        """
        with atomic_folder(folder, _own_files(Path(folder))) as temporary:
            tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
            save_tensors(tensors, temporary / WEIGHTS)
            content = {"type": self.kind, **dataclasses.asdict(self.config)}
            (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @property
    def device(self) -> torch.device:
        return next(iter(self.state_dict().values()), torch.empty(0)).device


def check_output(folder: str | Path) -> None:
    """Check, before a tokenizer is fitted, that it can be saved to ``folder``.

    Raises:
        UserError: The folder contains anything but a tokenizer, or cannot be written to.
    """
    check_folder(folder, _own_files(Path(folder)))


def _own_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files if ``folder`` contains a tokenizer; a model has files of the same names."""
    try:
        content = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return ()
    own = isinstance(content, dict) and {"type", "modality", "vocab_size"} <= content.keys()
    return (CONFIG, WEIGHTS) if own else ()
