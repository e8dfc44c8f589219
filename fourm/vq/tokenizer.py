"""What every tokenizer of images is: pixels ↔ a grid of token ids, and the two files that keep it.

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
    """What all tokenizers have in common; ``config.json`` holds it beside the tokenizer's type.

    Attributes:
        modality: whose images it was trained on, a key of ``MODALITY_TRANSFORMS``.
        vocab_size: number of token ids.
        patch_size: side in pixels of what one token stands for.
        num_channels: channels of its input.
        input_size: side in pixels of the images it was trained on; others work if ``patch_size`` divides them.
        value_range: smallest and largest value of the images it was trained on.
        transform_options: fields of the modality's transform that differ from the defaults for tokenizers.
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
            if (getattr(self, name, None) or 1) < 1 or getattr(self, name, None) == 0:
                raise UserError(f"tokenizer: '{name}' must be at least 1, not {getattr(self, name)}")
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
    """Base class. A subclass names its ``kind`` and ``Config``, takes a config and keeps all that it learned in its
    state dict; ``fourm.vq.registry`` lists it.

    Values go in, and come out, as the modality's transform gives them (``fourm.vq.crops.tokenizer_transform``).

    Attributes:
        config: what it is built from.
        info: what all tokenizers have in common.
        input_patch: side of the part of the input that becomes a token; 1 if the input is a map of features.
        takes_vectors: whether a sample is a single vector, (D, 1, 1).
        num_codebooks: G, how many ids describe each place.
        feature_network: network of timm that makes the features that it takes; ``none`` if they come from files, and
            empty if nobody said so.
        picture_options: options with which :meth:`decode_tokens` gives what people look at.
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
        """(B, C, H, W) float → ids (B, h, w) int64 in [0, vocab_size); (B, G, h, w) if G codebooks describe each place."""

    @abstractmethod
    def decode_tokens(self, ids: Tensor, /) -> Tensor:
        """Ids (B, h, w) → (B, C, H, W) float; from tokens of features (B, D, h, w).

        Maps of classes may come out as one channel of ids, or as a channel of logits for each class.
        """

    def to_grid(self, ids: Tensor) -> Tensor:
        """Ids as they are saved, (B, L), or (B, G L) of several codebooks → as they are decoded, (B, h, w) or (B, G, h, w).

        The grid is square; if it cannot be, it is one row.
        """
        places = ids.shape[1] // self.num_codebooks
        side = math.isqrt(places)
        grid = ids.reshape(len(ids), self.num_codebooks, -1, side if side * side == places else places)
        return grid if self.num_codebooks > 1 else grid[:, 0]

    @torch.no_grad()
    def decode_pictures(self, ids: Tensor, **options: Any) -> Tensor:
        """As :meth:`decode_tokens` with ``picture_options`` and others, for ids on any device: float32 on the CPU."""
        return self.decode_tokens(ids.long().to(self.device), **{**self.picture_options, **options}).float().cpu()

    def to_patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, h, w, C, patch, patch); raises like :meth:`check_images`."""
        self.check_images(x)
        return rearrange(x, "b c (h p) (w q) -> b h w c p q", p=self.patch_size, q=self.patch_size)

    def check_images(self, x: Tensor) -> None:
        """
        Raises:
            DataError: images with other channels, or of a size that patches do not fill.
        """
        p = self.input_patch
        if x.ndim != 4 or x.shape[1] != self.num_channels or x.shape[2] % p or x.shape[3] % p:
            raise DataError(
                f"the {self.info.modality} tokenizer takes images of shape (B, {self.num_channels}, H, W) with H and W "
                f"multiples of {p}, not {tuple(x.shape)}"
            )

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``; a tokenizer at ``folder`` is replaced as a whole.

        Raises:
            UserError: as :func:`check_output`.
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
    """See, before it is fitted, whether a tokenizer can be saved to ``folder``.

    Raises:
        UserError: the folder holds anything but a tokenizer, or cannot be written to.
    """
    check_folder(folder, _own_files(Path(folder)))


def _own_files(folder: Path) -> tuple[str, ...]:
    """The names of a tokenizer's files, if there is one at ``folder``; models have files of the same names."""
    try:
        content = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return ()
    own = isinstance(content, dict) and {"type", "modality", "vocab_size"} <= content.keys()
    return (CONFIG, WEIGHTS) if own else ()
