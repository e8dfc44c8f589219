"""Feature maps of other networks, which tokenizers of features learn to reconstruct.

Shapes: B pictures, D features, h x w patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.options import Options, option
from fourm.utils.paths import InputPath


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(Options):
    """Features of another network"""

    feature_network: str = option(
        "network of timm whose features are tokenized (default: the domain's own; 'none': read them from files)",
        "",
        fixed=True,
    )
    feature_weights: InputPath = option("file of its weights under timm's names (default: those of timm)", "")


class FeatureNetwork(nn.Module):
    """A frozen vision transformer that computes the final features of pictures, which must be standardised for it.

    Its final norm is applied to every patch, and so is its projection to the space in which CLIP compares pictures and
    texts, if it has one.

    Args:
        network: A network of timm, with its weights.
        single: Return the features of the class token, which stand for the whole picture, not those of the patches.
    """

    def __init__(self, network: Any, single: bool = False):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._single = single
        if single and getattr(network, "cls_token", None) is None:
            raise UserError("'feature_network': it has no class token, which would be the global feature")

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Compute features, (B, 3, H, W) → (B, D, h, w), or (B, D, 1, 1) for the whole picture."""
        height, width = (
            side // patch for side, patch in zip(x.shape[2:], self.network.patch_embed.patch_size, strict=True)
        )
        tokens = self.network.head(self.network.fc_norm(self.network.forward_features(x)))  # (B, prefix + h w, D)
        if self._single:
            return nn.functional.normalize(tokens[:, 0].float(), dim=-1)[:, :, None, None]
        patches = tokens[:, self.network.num_prefix_tokens :]
        return rearrange(patches, "b (h w) d -> b d h w", h=height, w=width).float()


def timm_network(name: str, weights: str = "", download: bool = True, **arguments: Any) -> Any:
    """Build a network of timm.

    Args:
        name: The name of the network in timm.
        weights: A ``.safetensors`` or ``.pth`` file of its weights under timm's names.
        download: Without a file, use the weights that timm publishes; otherwise they are random.
        arguments: Arguments of ``timm.create_model``.

    Raises:
        UserError: timm does not know it, or its weights cannot be read or downloaded.
    """
    import timm  # importing it takes longer than torch, and few runs need it
    from timm.models import load_checkpoint

    if not timm.is_model(name):
        raise UserError(f"timm has no network '{name}'{did_you_mean(name, timm.list_models())}")
    try:
        network = timm.create_model(name, pretrained=download and not weights, **arguments)
        if weights:
            load_checkpoint(network, weights, weights_only=True)
    except Exception as error:  # of whatever kind: clients of the hub and readers of files raise many
        problem = f"{weights} does not hold the weights of" if weights else "cannot make"
        raise UserError(f"{problem} {name}: {' '.join(str(error).split())[:300]}") from error
    return network
