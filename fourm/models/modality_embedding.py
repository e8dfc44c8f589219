"""Base classes of the embedding modules: positions and the modality vector.

An embedding module embeds only the selected tokens, which :class:`Rows` names, never the whole modality. It returns
their content ``x`` and ``emb`` = position + modality vector.

Shapes: B batch, L tokens of one modality, n selected tokens of one modality in the whole batch, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from fourm.models.fm_utils import init_weights
from fourm.utils.errors import UserError

POS_TEMPERATURE = 10000.0


@dataclass(frozen=True)
class Rows:
    """The selected tokens of a modality.

    Attributes:
        sample: (n,) Index of the sample in the batch.
        index: (n,) Index of the token within its sample.
        position: (n,) Row of the position table: ``index`` for images, the number of earlier valid tokens for
            sequences.
    """

    sample: Tensor
    index: Tensor
    position: Tensor


def sincos_table(grid: tuple[int, ...], dim: int, temperature: float = POS_TEMPERATURE) -> Tensor:
    """Compute the sine-cosine positions of all cells of a grid in row-major order.

    Every axis gets an equal share of the width: ``[sin(pω), cos(pω)]`` with ω_i = temperature^(−i/k) of k frequencies.

    Returns:
        The table, (1, cells, D).

    Raises:
        UserError: If the width cannot be divided among the axes.
    """
    if dim % (2 * len(grid)):
        raise UserError(f"dim {dim} must be a multiple of {2 * len(grid)} for {len(grid)}-D sine-cosine positions")
    k = dim // (2 * len(grid))
    omega = temperature ** (-torch.arange(k, dtype=torch.float64) / k)
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in axes]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


class ModalityEmbedding(nn.Module):
    """Holds the positions over a grid and the learned vector of a modality.

    Subclasses create their content modules in :meth:`init`. If ``dim_tokens`` is given, the constructor calls it, so
    subclasses set their options before ``super().__init__``; otherwise FourM calls it with the width of the model.

    Args:
        grid: Shape of the positions, (h, w) or (length,).
        sincos_pos_emb: Use fixed sine-cosine positions instead of learned ones.
        dim_tokens: Width of the model, if it is known already.
        num_positions: Number of valid positions; positions beyond them are treated as position 0. None uses the whole
            grid.

    Attributes:
        pos_temperature: Temperature of the sine-cosine positions; FourM sets it for images.
    """

    pos_temperature = POS_TEMPERATURE
    pos_emb: Tensor
    mod_emb: nn.Parameter

    def __init__(
        self, grid: tuple[int, ...], sincos_pos_emb: bool, dim_tokens: int | None, num_positions: int | None = None
    ):
        super().__init__()
        self.grid, self.sincos_pos_emb = grid, sincos_pos_emb
        self.num_positions = num_positions or math.prod(grid)
        if dim_tokens is not None:
            self.init(dim_tokens)
            init_weights(self)

    def init(self, dim_tokens: int) -> None:
        """Create the parameters at the width D of the model; :meth:`reset_embedding` sets their values."""
        self.mod_emb = nn.Parameter(torch.empty(1, 1, dim_tokens))
        table = torch.empty(1, math.prod(self.grid), dim_tokens)
        if self.sincos_pos_emb:
            self.register_buffer("pos_emb", table)
        else:
            self.pos_emb = nn.Parameter(table)

    def reset_embedding(self, std: float) -> None:
        """Initialise the positions and the modality vector."""
        nn.init.normal_(self.mod_emb, std=std)
        if self.sincos_pos_emb:
            self.pos_emb.copy_(sincos_table(self.grid, self.pos_emb.shape[-1], self.pos_temperature))
        else:
            nn.init.normal_(self.pos_emb, std=std)

    def __call__(self, tensor: Any, *selected: Any) -> Any:
        """Embed the selected tokens, see ``forward``.

        Raises:
            UserError: If it is called with the entry of a batch, as the published modules are.
        """
        if isinstance(tensor, Mapping):
            raise UserError(
                f"{type(self).__name__} embeds selected tokens, not the whole entry of a batch; to embed the inputs of "
                "a batch, call model.embed_encoder(mod_dict, select_inputs(mod_dict, modalities))"
            )
        return super().__call__(tensor, *selected)

    def forward_embed(self, entry: Any) -> Any:
        """Raise an error that names the replacement of this published method.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"{type(self).__name__} has no forward_embed: targets are embedded by model.embed_decoder(mod_dict, "
            "model.select_tokens(mod_dict, num_encoder_tokens, num_decoder_tokens).decoder)"
        )

    def emb(self, position: Tensor) -> Tensor:
        """Return position + modality vector, (n, D), for positions (n,)."""
        position = position.masked_fill(position >= self.num_positions, 0)
        return self.pos_emb[0].index_select(0, position) + self.mod_emb[0]

    def empty(self) -> Tensor:
        """Return an empty tensor for a batch without this modality; it keeps the parameters in the graph."""
        return self.mod_emb.new_empty((0, 1), dtype=torch.long)


def image_grid(image_size: int, patch_size: int) -> tuple[int, int]:
    """Return the number of patches along each side of an image.

    Raises:
        UserError: If the image size is not a multiple of the patch size.
    """
    if image_size % patch_size:
        raise UserError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
    return image_size // patch_size, image_size // patch_size


def sequence_grid(max_length: int, sincos_pos_emb: bool, max_sincos_pos_emb: int) -> tuple[int]:
    """Return the length of the position table of a sequence.

    Raises:
        UserError: If the sequence is longer than the table.
    """
    if sincos_pos_emb and max_length > max_sincos_pos_emb:
        raise UserError(
            f"max_length {max_length} exceeds the {max_sincos_pos_emb} positions of the table; raise max_sincos_pos_emb"
        )
    return (max_sincos_pos_emb if sincos_pos_emb else max_length,)


class TokenEmbedding(ModalityEmbedding):
    """Embeds token ids, (B, L) or (B, h, w)."""

    def __init__(self, vocab_size: int, padding_idx: int | None, *args: Any, **kwargs: Any):
        self.vocab_size, self.padding_idx = vocab_size, padding_idx
        super().__init__(*args, **kwargs)

    def init(self, dim_tokens: int) -> None:
        super().init(dim_tokens)
        self.token_emb = nn.Embedding(self.vocab_size, dim_tokens, padding_idx=self.padding_idx)

    def forward(self, tensor: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return content and position + modality of the selected tokens, (n, D) each."""
        return self.token_emb(pick_ids(tensor, rows.sample, rows.index)), self.emb(rows.position)


def pick_ids(tensor: Tensor, sample: Tensor, index: Tensor) -> Tensor:
    """Return the ids of the selected tokens, (n,) int64, from (B, L) or (B, h, w)."""
    return rearrange(tensor, "b ... -> b (...)")[sample, index].long()
