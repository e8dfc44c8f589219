"""The UNet of DiVAE: the one of Dhariwal & Nichol (2021, https://arxiv.org/abs/2105.05233) on patches of 4x4 pixels.

It predicts a picture from a noised one and the latents of its tokens. Layers are named as in the published weights.

Shapes: B images, C channels, H x W pixels, h x w = H/4 x W/4 patches, L numbers in a token's latent, D features,
T numbers that embed the time step.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fourm.utils.device import without_autocast
from fourm.utils.errors import UserError
from fourm.vq.winograd import Conv3x3

_NAME = re.compile(r"unet_patched(?:/Wi_(\d{1,4}))?")
PATCH = 4
MULTIPLIERS = (1, 2, 2, 2)
"""Channels of each level, relative to the first; each level has half the resolution of the one before it."""
BLOCKS = 3
"""Residual blocks of each level of the encoder; the decoder has one more."""
LEVELS_WITH_ATTENTION = (2, 3)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with 32 groups, always in float32."""

    def __init__(self, channels: int):
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            y = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class ResidualBlock(nn.Module):
    """Two convolutions, with the embedded time step added between them."""

    def __init__(self, channels: int, out_channels: int, time_channels: int):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(channels), nn.SiLU(), Conv3x3(channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Identity(),  # where the published model had dropout: the name of the next layer counts it
            Conv3x3(out_channels, out_channels),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Transform x (B, D, h, w), with time (B, T), to (B, D', h, w)."""
        y = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(y)


class AttentionBlock(nn.Module):
    """Attention over all positions, with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(rearrange(self.norm(x), "b d h w -> b d (h w)"))
        q, k, v = rearrange(qkv, "b (three d) n -> three b 1 n d", three=3)  # one head
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 n d -> b d n")
        return x + self.proj_out(y).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv3x3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Sequential):
    """A sequence of layers, whose residual blocks also get the time step."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, time) if isinstance(layer, ResidualBlock) else layer(x)
        return x


class PatchedUNet(nn.Module):
    """
    Args:
        channels: C.
        cond_channels: L.
        width: Channels of the first level, a multiple of 32.
    """

    multiple = PATCH * 2 ** (len(MULTIPLIERS) - 1)
    """The height and width of pictures must be multiples of this number of pixels."""

    def __init__(self, channels: int, cond_channels: int, width: int = 256):
        super().__init__()
        self.width = width
        pixels, time = channels * PATCH**2, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))

        current = width
        self.input_blocks = nn.ModuleList([Stage(Conv3x3(pixels + cond_channels, width))])
        skipped = [width]  # channels that come out of each input block
        for level, multiplier in enumerate(MULTIPLIERS):
            for _ in range(BLOCKS):
                self.input_blocks.append(_stage(level, current, multiplier * width, time))
                current = multiplier * width
                skipped.append(current)
            if level < len(MULTIPLIERS) - 1:
                self.input_blocks.append(Stage(Downsample(current)))
                skipped.append(current)

        self.middle_block = Stage(
            ResidualBlock(current, current, time), AttentionBlock(current), ResidualBlock(current, current, time)
        )

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(MULTIPLIERS))):
            for block in range(BLOCKS + 1):
                stage = _stage(level, current + skipped.pop(), multiplier * width, time)
                current = multiplier * width
                if level > 0 and block == BLOCKS:
                    stage.append(Upsample(current))
                self.output_blocks.append(stage)

        self.out = nn.Sequential(GroupNorm(width), nn.SiLU(), Conv3x3(width, pixels))
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise all parameters, so that every block begins as the identity, and the network predicts 0."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                set_to_zero(module.out_layers[-1])
            elif isinstance(module, AttentionBlock):
                set_to_zero(module.proj_out)
        set_to_zero(self.out[-1])

    def forward(self, x: Tensor, timesteps: Tensor, cond: Tensor, cond_mask: Tensor | None = None) -> Tensor:
        """Predict the picture, the noise or the velocity, depending on the noise schedule.

        Args:
            x: Noised pictures (B, C, H, W).
            timesteps: The noise levels, integers (B,).
            cond: Latents of the tokens (B, L, N_H, N_W), of any grid.
            cond_mask: (B, N_H, N_W) bool; latents at True count as unknown.

        Returns:
            (B, C, H, W).

        Raises:
            UserError: H or W is not a multiple of :attr:`multiple`.
        """
        check_sides(x, self.multiple)
        if cond_mask is not None:
            cond = cond.masked_fill(cond_mask[:, None], 0)
        dtype = next(self.parameters()).dtype
        x = rearrange(x.to(dtype), "b c (h p) (w q) -> b (c p q) h w", p=PATCH, q=PATCH)
        x = torch.cat([x, F.interpolate(cond.to(dtype), x.shape[2:], mode="nearest")], dim=1)
        time = self.time_embed(embed_timesteps(timesteps, self.width).to(dtype))

        skipped = []
        for block in self.input_blocks:
            x = block(x, time)
            skipped.append(x)
        x = self.middle_block(x, time)
        for block in self.output_blocks:
            x = block(torch.cat([x, skipped.pop()], dim=1), time)
        return rearrange(self.out(x), "b (c p q) h w -> b c (h p) (w q)", p=PATCH, q=PATCH)


def unet_width(name: str) -> int:
    """Parse the name of a UNet, and return the number of channels of its first level.

    It is 256 for ``unet_patched``, as in the published weights; ``unet_patched/Wi_64`` sets another multiple of 32.

    Raises:
        UserError: The name is not that of a UNet.
    """
    match = _NAME.fullmatch(name)
    width = int(match[1] or 256) if match else 0
    if not width or width % 32:
        raise UserError(
            f"'{name}' is not a UNet: use unet_patched, or unet_patched/Wi_64 with a multiple of 32 as its width"
        )
    return width


def check_sides(x: Tensor, multiple: int) -> None:
    """Check the size of pictures (B, C, H, W).

    Raises:
        UserError: The height or width is not a multiple of ``multiple``.
    """
    if x.shape[2] % multiple or x.shape[3] % multiple:
        raise UserError(
            f"this decoder makes pictures whose sides are multiples of {multiple} pixels, not {x.shape[2]}x{x.shape[3]}"
        )


def set_to_zero(layer: nn.Module) -> None:
    """Set all parameters of ``layer`` to 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def embed_timesteps(timesteps: Tensor, size: int) -> Tensor:
    """Embed integers, (B,) → (B, size) float32: cosines, then sines, at frequencies from 1 down to 1/10000."""
    half = size // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=timesteps.device))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _stage(level: int, channels: int, out_channels: int, time_channels: int) -> Stage:
    stage = Stage(ResidualBlock(channels, out_channels, time_channels))
    if level in LEVELS_WITH_ATTENTION:
        stage.append(AttentionBlock(out_channels))
    return stage
