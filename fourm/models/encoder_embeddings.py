"""Embedding modules of the encoder, for token ids, image patches and vectors.

Shapes: B batch, L tokens of one modality, n selected tokens of one modality in the whole batch, D model width.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from fourm.models.modality_embedding import ModalityEmbedding, Rows, TokenEmbedding, image_grid, sequence_grid
from fourm.utils.errors import DataError


class ImageTokenEncoderEmbedding(TokenEmbedding):
    """Embeds a grid of token ids, (B, L) or (B, h, w)."""

    def __init__(
        self,
        vocab_size: int,
        patch_size: int = 16,
        dim_tokens: int | None = None,
        sincos_pos_emb: bool = True,
        image_size: int = 224,
    ):
        super().__init__(vocab_size, None, image_grid(image_size, patch_size), sincos_pos_emb, dim_tokens)


class ImageEncoderEmbedding(ModalityEmbedding):
    """Embeds patches of pixels or of a feature map, (B, C, H, W), linearly."""

    def __init__(
        self,
        num_channels: int,
        patch_size: int = 16,
        dim_tokens: int | None = None,
        sincos_pos_emb: bool = True,
        image_size: int = 224,
    ):
        self.num_channels, self.patch_size, self.image_size = num_channels, patch_size, image_size
        super().__init__(image_grid(image_size, patch_size), sincos_pos_emb, dim_tokens)

    def init(self, dim_tokens: int) -> None:
        super().init(dim_tokens)
        self.proj = nn.Linear(self.num_channels * self.patch_size**2, dim_tokens, bias=False)

    def forward(self, tensor: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return content and position + modality of the selected patches, (n, D) each. Other patches are not copied.

        Raises:
            DataError: If the image has another shape, or integer values, which have not been normalised.
        """
        expected = (self.num_channels, self.image_size, self.image_size)
        if tensor.shape[1:] != expected:
            raise DataError(f"an image of shape {tuple(tensor.shape[1:])} reached an embedding for {expected}")
        _check_floating(tensor, "an image")
        p, width = self.patch_size, self.grid[1]
        patches = rearrange(tensor, "b c (h p) (w q) -> b h w p q c", p=p, q=p)  # a view
        selected = patches[rows.sample, rows.index // width, rows.index % width]
        selected = rearrange(selected, "n p q c -> n (p q c)").to(self.proj.weight.dtype)
        return self.proj(selected), self.emb(rows.position)

    def empty(self) -> Tensor:
        return self.mod_emb.new_empty((0, self.num_channels, self.image_size, self.image_size))


class SequenceEncoderEmbedding(TokenEmbedding):
    """Embeds ids of a text or of integer codes, (B, L)."""

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        dim_tokens: int | None = None,
        sincos_pos_emb: bool = True,
        max_sincos_pos_emb: int = 512,
        padding_idx: int = 0,
    ):
        grid = sequence_grid(max_length, sincos_pos_emb, max_sincos_pos_emb)
        super().__init__(vocab_size, padding_idx, grid, sincos_pos_emb, dim_tokens)


class SequenceEmbEncoderEmbedding(ModalityEmbedding):
    """Projects embedding vectors of another model, (B, L, orig_emb_dim), such as T5 embeddings of a caption."""

    def __init__(
        self,
        max_length: int,
        dim_tokens: int | None = None,
        sincos_pos_emb: bool = True,
        max_sincos_pos_emb: int = 512,
        orig_emb_dim: int = 4096,
        bottleneck_dim: int = 64,
        use_bottleneck: bool = False,
    ):
        self.orig_emb_dim, self.bottleneck_dim, self.use_bottleneck = orig_emb_dim, bottleneck_dim, use_bottleneck
        super().__init__(sequence_grid(max_length, sincos_pos_emb, max_sincos_pos_emb), sincos_pos_emb, dim_tokens)

    def init(self, dim_tokens: int) -> None:
        super().init(dim_tokens)
        widths = (self.orig_emb_dim, self.bottleneck_dim, dim_tokens)
        self.emb_proj: nn.Module = (
            nn.Sequential(nn.Linear(*widths[:2]), nn.Linear(*widths[1:]))
            if self.use_bottleneck
            else nn.Linear(self.orig_emb_dim, dim_tokens)
        )

    def forward(self, tensor: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return content and position + modality of the selected vectors, (n, D) each.

        Raises:
            DataError: If the vectors have integer values.
        """
        _check_floating(tensor, "a row of vectors")
        return self.emb_proj(tensor[rows.sample, rows.index].to(self.mod_emb.dtype)), self.emb(rows.position)

    def empty(self) -> Tensor:
        return self.mod_emb.new_empty((0, 1, self.orig_emb_dim))


def _check_floating(tensor: Tensor, description: str) -> None:
    if not tensor.is_floating_point():
        raise DataError(
            f"{description} of type {tensor.dtype} reached the model; it takes normalised floating-point numbers"
        )
