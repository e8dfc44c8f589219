"""Tokens of features: each position of a network's feature map gets the id of the nearest vector in a codebook.

Any model of timm can be the backbone, for example CLIP, DINOv2 or a classifier of ImageNet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from fourm.utils.errors import DataError, UserError
from fourm.vq.codebook import Codebook
from fourm.vq.features import timm_network
from fourm.vq.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class FeatureCodebookConfig(TokenizerConfig):
    """The configuration of a feature codebook.

    Attributes:
        backbone: Name of the network in timm. Its deepest feature map with a stride of ``patch_size`` is used.
    """

    backbone: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_channels != 3:
            raise UserError(
                f"backbone {self.backbone} needs RGB images, but {self.modality} has {self.num_channels} channels"
            )


class FeatureCodebook(Codebook):
    """Vector quantization of the features of a frozen network, compared by their direction.

    The input is RGB in [-1, 1]; decoding returns features (B, D, h, w) of unit length. The weights of the network are
    part of the tokenizer.

    Args:
        config: The configuration.
        backbone: A network from :func:`create_backbone`; None builds one whose weights a state dict provides.

    Raises:
        UserError: timm does not know the backbone, or it has no feature map of this stride.
    """

    kind = "feature_codebook"
    Config = FeatureCodebookConfig
    config: FeatureCodebookConfig
    mean: Tensor  # (3, 1, 1), like std: the standardisation of the network's input
    std: Tensor

    def __init__(self, config: FeatureCodebookConfig, backbone: nn.Module | None = None):
        network: Any = create_backbone(config) if backbone is None else backbone
        deepest = _deepest_map(network, config)
        super().__init__(config, network.feature_info[deepest]["num_chs"])
        (self._map,) = network.prune_intermediate_layers([deepest])  # the layers after the map are dropped
        self.backbone = network.eval().requires_grad_(False)
        self._one_size = bool(network.pretrained_cfg.get("fixed_input_size"))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1))

    @torch.no_grad()
    def items(self, x: Tensor) -> Tensor:
        self.check_images(x)
        size = self.config.input_size
        if self._one_size and x.shape[2:] != (size, size):
            raise DataError(f"backbone {self.config.backbone} takes images of {size}x{size}, not {tuple(x.shape[2:])}")
        (features,) = self.backbone.forward_intermediates(
            ((x + 1) / 2 - self.mean) / self.std, indices=[self._map], norm=True, intermediates_only=True
        )
        return nn.functional.normalize(rearrange(features, "b d h w -> b h w d"), dim=-1)

    @torch.no_grad()
    def decode_tokens(self, ids: Tensor) -> Tensor:
        return nn.functional.normalize(rearrange(self.codebook[ids], "b h w d -> b d h w"), dim=1)


def create_backbone(
    config: FeatureCodebookConfig, weights: str | Path | None = None, download: bool = False
) -> nn.Module:
    """Create the backbone with all its layers.

    Args:
        config: The configuration of the tokenizer.
        weights: A ``.safetensors`` or ``.pth`` file with the weights under timm's names; None for random weights.
        download: Use the weights that timm publishes.

    Raises:
        UserError: timm does not know it, or its weights cannot be read or downloaded.
    """
    plain = timm_network(config.backbone, download=False)
    _deepest_map(plain, config)  # checks the stride before anything is downloaded
    # timm resizes the position table of networks with a fixed size.
    size: dict[str, Any] = {"img_size": config.input_size} if plain.pretrained_cfg.get("fixed_input_size") else {}
    if not (weights or download or size):
        return plain
    return timm_network(config.backbone, str(weights or ""), download, **size)


def _deepest_map(network: Any, config: FeatureCodebookConfig) -> int:
    """Return the index of the deepest feature map whose stride is the patch size."""
    strides = [info["reduction"] for info in network.feature_info]
    if config.patch_size not in strides:
        available = ", ".join(map(str, sorted(set(strides))))
        raise UserError(
            f"backbone {config.backbone} has feature maps of stride {available}: patch_size must be one of them"
        )
    return max(index for index, stride in enumerate(strides) if stride == config.patch_size)
