"""Decoder tokens of one modality, their targets, and decoder output → logits (method section 2).

Shapes: B batch, L tokens of one modality, n selected targets of one modality in the whole batch, D model width,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fourm.models.modality_embedding import Rows, TokenEmbedding, image_grid, pick_ids, sequence_grid


class _DecoderEmbedding(TokenEmbedding):
    """A token embedding that also has the way back.

    Args:
        share_embedding: ``to_logits`` is ``token_emb``, transposed (training); False is the published hub layout.
    """

    def __init__(self, share_embedding: bool, *options: Any, **more: Any):
        self.share_embedding = share_embedding
        super().__init__(*options, **more)

    def init(self, dim_tokens: int) -> None:
        super().init(dim_tokens)
        self.to_logits = nn.Linear(dim_tokens, self.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the two matrices one, also after something has replaced the parameters."""
        if self.share_embedding:
            self.to_logits.weight = self.token_emb.weight


class ImageTokenDecoderEmbedding(_DecoderEmbedding):
    """A grid of token ids as targets: position and modality ask for them, the content is the mask token."""

    def __init__(
        self,
        vocab_size: int,
        patch_size: int = 16,
        dim_tokens: int | None = None,
        sincos_pos_emb: bool = True,
        image_size: int = 224,
        share_embedding: bool = True,
    ):
        grid = image_grid(image_size, patch_size)
        super().__init__(share_embedding, vocab_size, None, grid, sincos_pos_emb, dim_tokens)

    def forward(self, tensor: Tensor, rows: Rows, mask_token: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """→ content and position + modality of the selected targets, (n, D) each; ``mask_token`` is (1, 1, D)."""
        x = mask_token[0].expand(len(rows.index), -1)
        if not self.share_embedding:
            # The untied layout has a token_emb that nothing reads; no rows of it keep it in the graph, as DDP needs.
            x = torch.cat([x, self.token_emb(rows.index[:0])])
        return x, self.emb(rows.position)

    def targets(self, tensor: Tensor, rows: Rows) -> Tensor:
        """Ids to predict, (n,)."""
        return pick_ids(tensor, rows.sample, rows.index)


class SequenceDecoderEmbedding(_DecoderEmbedding):
    """Ids of a sequence as targets: every token is given and predicts the next one."""

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        dim_tokens: int | None = None,
        sincos_pos_emb: bool = True,
        max_sincos_pos_emb: int = 512,
        padding_idx: int = 0,
        share_embedding: bool = True,
    ):
        grid = sequence_grid(max_length, sincos_pos_emb, max_sincos_pos_emb)
        super().__init__(
            share_embedding, vocab_size, padding_idx, grid, sincos_pos_emb, dim_tokens, num_positions=max_length
        )

    def forward(self, tensor: Tensor, rows: Rows, mask_token: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """→ content and position + modality of the selected tokens, (n, D) each; ``mask_token`` is not used."""
        return super().forward(tensor, rows)

    def targets(self, tensor: Tensor, rows: Rows) -> Tensor:
        """Ids to predict, (n,): those that follow."""
        return pick_ids(tensor, rows.sample, rows.index + 1)
