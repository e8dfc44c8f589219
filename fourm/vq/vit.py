"""Vision transformers that encode pixels to features of patches, and decode them (arXiv 2312.06647, appendix).

Shapes: B images, C channels, H x W pixels, p side of a patch, h x w = H/p x W/p patches, D width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fourm.models.fm_utils import Block, BlockOptions, LayerNorm
from fourm.models.modality_embedding import sincos_table
from fourm.utils.device import without_autocast
from fourm.utils.errors import UserError, did_you_mean

MAX_BLOCKS = 256


@dataclass(frozen=True)
class ViTSize:
    """Width, number of blocks and attention heads."""

    dim: int
    depth: int
    num_heads: int


SIZES = {"vit_s": ViTSize(512, 8, 8), "vit_b": ViTSize(768, 12, 12), "vit_l": ViTSize(1024, 24, 16)}
_OWN_SIZE = re.compile(r"vit/B_(\d{1,3})-Wi_(\d{1,5})-H_(\d{1,3})")


def vit_size(name: str) -> ViTSize:
    """Parse the name of a size: ``vit_b``, ``vit_b_enc`` or ``vit_b_dec``, or a size of your own.

    ``vit/B_3-Wi_192-H_6`` has 3 blocks of width 192 with 6 heads.

    Raises:
        UserError: The name is not that of a size.
    """
    if own := _OWN_SIZE.fullmatch(name):
        depth, dim, heads = map(int, own.groups())
        if not (0 < depth <= MAX_BLOCKS and dim and heads) or dim % heads or dim % 4:
            raise UserError(
                f"'{name}': there must be 1 to {MAX_BLOCKS} blocks, of a width that is a multiple of 4 and of the heads"
            )
        return ViTSize(dim, depth, heads)
    size = SIZES.get(re.sub("_(enc|dec)$", "", name))
    if size is None:
        known = [*SIZES, *(f"{size}_{side}" for side in ("enc", "dec") for size in SIZES)]
        raise UserError(
            f"unknown vision transformer '{name}'{did_you_mean(name, known)}; there are {', '.join(SIZES)}, and sizes "
            "of your own such as vit/B_3-Wi_192-H_6"
        )
    return size


class ViT(nn.Module):
    """The part that encoder and decoder share: positions, blocks and a final MLP.

    Args:
        size: The size of the transformer.
        grid: (h, w) of the position table, which is resized for other grids.
        post_mlp: End with a residual tanh MLP.
    """

    pos_emb: Tensor  # (1, D, h, w), with rows and columns counted from 0; not trained

    def __init__(self, size: ViTSize, grid: tuple[int, int], post_mlp: bool):
        super().__init__()
        self.grid = grid
        self.register_buffer("pos_emb", torch.empty(1, size.dim, *grid))
        options = BlockOptions(size.dim, size.num_heads)
        self.blocks = nn.ModuleList(Block(options) for _ in range(size.depth))
        if post_mlp:
            self.norm_mlp = LayerNorm(size.dim)
            self.post_mlp = BlockOptions(size.dim, size.num_heads, act_layer=nn.Tanh).mlp()
        self.has_post_mlp = post_mlp

    def reset_parameters(self) -> None:
        table = sincos_table(self.grid, self.pos_emb.shape[1])
        self.pos_emb.copy_(rearrange(table, "1 (h w) d -> 1 d h w", h=self.grid[0]))

    def transform(self, x: Tensor) -> Tensor:
        """Apply the transformer, (B, D, h, w) → (B, h w, D)."""
        positions = self.pos_emb
        if positions.shape[2:] != x.shape[2:]:
            positions = F.interpolate(positions, x.shape[2:], mode="bicubic", align_corners=False)
        tokens = rearrange(x + positions, "b d h w -> b (h w) d")
        for block in self.blocks:
            tokens = block(tokens)
        return self.finish(tokens) if self.has_post_mlp else tokens

    def finish(self, tokens: Tensor) -> Tensor:
        """Apply the final MLP, (B, h w, D) → (B, h w, D)."""
        return tokens + self.post_mlp(self.norm_mlp(tokens))


class ViTEncoder(ViT):
    """Encodes (B, C, H, W) → (B, D, h, w). The final MLP always runs in float32, because the tokens depend on it.

    Args:
        size, grid, post_mlp: See :class:`ViT`.
        channels: C.
        patch_size: p; 1 if each position of the input is a patch.
    """

    def __init__(self, size: ViTSize, channels: int, grid: tuple[int, int], patch_size: int, post_mlp: bool):
        super().__init__(size, grid, post_mlp)
        self.proj = nn.Conv2d(channels, size.dim, patch_size, patch_size)

    def finish(self, tokens: Tensor) -> Tensor:
        fc1, fc2 = self.post_mlp.fc1, self.post_mlp.fc2  # FSDP may gather their weights in a lower precision
        with without_autocast(tokens.device):
            tokens = tokens.float()
            hidden = torch.tanh(F.linear(self.norm_mlp(tokens), fc1.weight.float(), fc1.bias.float()))
            return tokens + F.linear(hidden, fc2.weight.float(), fc2.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return rearrange(self.transform(x), "b (h w) d -> b d h w", h=x.shape[2])


class ViTDecoder(ViT):
    """Decodes (B, D, h, w) → (B, C, H, W).

    Args:
        size, grid, post_mlp: See :class:`ViT`.
        channels: C.
        patch_size: p.
        out_conv: Refine the pixels with two convolutional blocks.
    """

    def __init__(
        self, size: ViTSize, channels: int, grid: tuple[int, int], patch_size: int, post_mlp: bool, out_conv: bool
    ):
        super().__init__(size, grid, post_mlp)
        self.patch_size = patch_size
        self.out_proj = nn.Linear(size.dim, channels * patch_size**2)
        self.out_conv = nn.Sequential(*(ConvNeXtBlock(channels) for _ in range(2 * out_conv)))

    def forward(self, x: Tensor) -> Tensor:
        p, height = self.patch_size, x.shape[2]
        patches = self.out_proj(self.transform(x))
        return self.out_conv(rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=p, q=p))


class ConvNeXtBlock(nn.Module):
    """A residual convolutional block (arXiv 2201.03545), (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels))
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = LayerNorm(channels)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(rearrange(self.dwconv(x), "b c h w -> b h w c"))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + rearrange(y, "b h w c -> b c h w")
