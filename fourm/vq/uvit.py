"""A U-ViT: convolutions at high resolutions and a transformer at the lowest one (https://arxiv.org/abs/2301.11093).

It predicts a picture from a noised one and the latents of its tokens. The convolutional blocks are those of diffusers,
and the layers have their published names.

Shapes: B images, C channels, H x W pixels, h x w = H/16 x W/16 positions of the transformer, L latent width, D width of
the transformer, F channels of the lowest convolutions, T width of the embedding of the time step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fourm.models.fm_utils import Attention, BlockOptions, LayerNorm, Mlp, init_weights
from fourm.models.modality_embedding import sincos_table
from fourm.utils.errors import UserError, did_you_mean
from fourm.vq.diffusion import diffusers
from fourm.vq.unet import check_sides, embed_timesteps, set_to_zero
from fourm.vq.vit import ViTSize, vit_size

WIDTHS = (128, 256)
"""Channels of the convolutions at 1/4 and 1/8 of the resolution."""
LAYERS = 2
"""Residual blocks at each resolution of the encoder; the decoder has one more."""
PATCH = 4
TABLE_SIDE = 32
MASK_STD = 0.02


SIZES = {
    "uvit_b_p4_f16": ViTSize(768, 12, 12),
    "uvit_l_p4_f16": ViTSize(1024, 24, 16),
    "uvit_h_p4_f16": ViTSize(1280, 32, 16),
}
"""The sizes of the transformer by the name of the U-ViT."""
_OWN_SIZE = "uvit_p4_f16"


def uvit_size(name: str) -> ViTSize:
    """Parse the name of a U-ViT: one of :data:`SIZES`, or a size of your own.

    ``uvit_p4_f16/B_3-Wi_192-H_6`` has a transformer with 3 blocks of width 192 with 6 heads.

    Raises:
        UserError: The name is not that of a U-ViT.
    """
    if name.startswith(_OWN_SIZE):
        return vit_size("vit" + name.removeprefix(_OWN_SIZE))
    if name not in SIZES:
        raise UserError(f"unknown U-ViT '{name}'{did_you_mean(name, SIZES)}; there are {', '.join(SIZES)}")
    return SIZES[name]


class UViT(nn.Module):
    """A U-ViT that predicts a picture.

    Args:
        channels: C.
        cond_channels: L.
        size: The size of the transformer.
        dropout: The dropout probability in the transformer.

    Raises:
        MissingDependency: diffusers is not installed.
    """

    multiple = PATCH * 2 ** len(WIDTHS)
    """The height and width of pictures must be multiples of this number of pixels."""

    def __init__(self, channels: int, cond_channels: int, size: ViTSize, dropout: float = 0.0):
        super().__init__()
        diffusers()
        from diffusers.models.downsampling import Downsample2D
        from diffusers.models.embeddings import TimestepEmbedding
        from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D
        from diffusers.models.upsampling import Upsample2D

        high, low = WIDTHS
        time = 4 * high
        common: dict[str, Any] = {"temb_channels": time, "resnet_eps": 1e-5}
        self.conv_in = nn.Conv2d(channels, high, PATCH, stride=PATCH)
        self.time_embedding = TimestepEmbedding(high, time)
        self.down_blocks = nn.ModuleList(
            [
                DownBlock2D(high, high, num_layers=LAYERS, add_downsample=True, **common),
                DownBlock2D(high, low, num_layers=LAYERS, add_downsample=False, **common),
            ]
        )
        self.downsample_mid = Downsample2D(low, use_conv=True)
        self.mid_block = Transformer(low, cond_channels, time, size, dropout)
        self.upsample_mid = Upsample2D(low, use_conv=True)
        self.up_blocks = nn.ModuleList(
            [
                UpBlock2D(high, low, low, num_layers=LAYERS + 1, add_upsample=True, **common),
                UpBlock2D(high, low, high, num_layers=LAYERS + 1, add_upsample=False, **common),
            ]
        )
        self.conv_norm_out = nn.GroupNorm(32, high)
        self.conv_out = nn.ConvTranspose2d(high, channels, PATCH, stride=PATCH)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise all parameters, so that every block begins as the identity."""
        from diffusers.models.resnet import ResnetBlock2D

        init_weights(self)
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                set_to_zero(module.conv2)
            elif isinstance(module, Block):
                set_to_zero(module.adaLN_gate)

    def forward(self, x: Tensor, timesteps: Tensor, cond: Tensor, cond_mask: Tensor | None = None) -> Tensor:
        """Predict as in :meth:`fourm.vq.unet.PatchedUNet.forward`."""
        check_sides(x, self.multiple)
        dtype = self.conv_in.weight.dtype
        time = self.time_embedding(embed_timesteps(timesteps, WIDTHS[0]).to(dtype))
        x = self.conv_in(x.to(dtype))
        skipped = [x]
        for block in self.down_blocks:
            x, outputs = block(x, time)
            skipped += outputs
        x = self.upsample_mid(self.mid_block(self.downsample_mid(x), time, cond.to(dtype), cond_mask))
        for block in self.up_blocks:
            x = block(x, tuple(skipped[-LAYERS - 1 :]), time)
            del skipped[-LAYERS - 1 :]
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Transformer(nn.Module):
    """The transformer in the middle of the U-ViT, which reads the latents of the tokens."""

    mid_pos_emb: Tensor

    def __init__(self, channels: int, cond_channels: int, time_channels: int, size: ViTSize, dropout: float):
        super().__init__()
        self.register_buffer("mid_pos_emb", torch.empty(1, size.dim, TABLE_SIDE, TABLE_SIDE))
        self.mask_token = nn.Parameter(torch.empty(size.dim))
        self.mid_cond_proj = nn.Linear(cond_channels, size.dim)
        self.mid_proj_in = nn.Linear(channels, size.dim)
        self.mid_block = nn.ModuleList(
            Block(size.dim, size.num_heads, time_channels, dropout) for _ in range(size.depth)
        )
        self.mid_proj_out = nn.Linear(size.dim, channels)

    def reset_parameters(self) -> None:
        """Initialise the parameters and buffers of this module alone."""
        table = sincos_table((TABLE_SIDE, TABLE_SIDE), self.mid_pos_emb.shape[1])
        self.mid_pos_emb.copy_(rearrange(table, "1 (h w) d -> 1 d h w", h=TABLE_SIDE))
        nn.init.normal_(self.mask_token, std=MASK_STD)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, cond_mask: Tensor | None) -> Tensor:
        """Transform x (B, F, h, w), with time (B, T), cond (B, L, N_H, N_W) and cond_mask (B, N_H, N_W)."""
        grid = x.shape[2:]
        cond = rearrange(F.interpolate(cond, grid, mode="nearest"), "b l h w -> b (h w) l")
        cond = self.mid_cond_proj(cond)
        if cond_mask is not None:
            mask = F.interpolate(cond_mask[:, None].float(), grid, mode="nearest").flatten(1) > 0.5
            cond = torch.where(mask[:, :, None], self.mask_token.to(cond.dtype), cond)
        table = F.interpolate(self.mid_pos_emb, grid, mode="bicubic", align_corners=False)
        y = self.mid_proj_in(rearrange(x, "b f h w -> b (h w) f")) + cond
        y = y + rearrange(table, "1 d h w -> 1 (h w) d").to(y.dtype)
        time = F.silu(time)
        for block in self.mid_block:
            y = block(y, time)
        return rearrange(self.mid_proj_out(y), "b (h w) f -> b f h w", h=grid[0])


class Block(nn.Module):
    """A transformer block that the time step scales, shifts and gates (adaLN, https://arxiv.org/abs/2212.09748)."""

    def __init__(self, dim: int, num_heads: int, time_channels: int, dropout: float):
        super().__init__()
        options = BlockOptions(dim, num_heads)
        self.norm1 = LayerNorm(dim, eps=1e-5)
        self.attn = Attention(options)
        self.norm2 = LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(options)
        self.adaLN_modulation = nn.Linear(time_channels, 4 * dim)
        self.adaLN_gate = nn.Linear(time_channels, 2 * dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Transform x (B, N, D), with time (B, T) after its activation."""
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(time)[:, None].chunk(4, dim=-1)
        gate1, gate2 = self.adaLN_gate(time)[:, None].chunk(2, dim=-1)
        x = x + gate1 * self.dropout(self.attn(self.norm1(x) * (1 + scale1) + shift1))
        return x + gate2 * self.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2))
