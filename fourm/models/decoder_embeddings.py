"""Embedding modules of the decoder: decoder tokens, target ids and logits of one modality.

Shapes: B batch, L tokens of one modality, n selected targets of one modality in the whole batch, D model width,
V vocabulary size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fourm.models.modality_embedding import Rows, TokenEmbedding, image_grid, pick_ids, sequence_grid


class _DecoderEmbedding(TokenEmbedding):
    """A token embedding that also maps the decoder output to logits.

    Args:
        share_embedding: Tie ``to_logits`` to ``token_emb``, as in training; the published hub files are untied.
    """

    def __init__(self, share_embedding: bool, *args: Any, **kwargs: Any):
        self.share_embedding = share_embedding
        super().__init__(*args, **kwargs)

    def init(self, dim_tokens: int) -> None:
        super().init(dim_tokens)
        self.to_logits = nn.Linear(dim_tokens, self.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Tie the two matrices; this is needed again after the parameters have been replaced."""
        if self.share_embedding:
            self.to_logits.weight = self.token_emb.weight


class ImageTokenDecoderEmbedding(_DecoderEmbedding):
    """Embeds targets of a token grid: the mask token as content, with position and modality of the token to predict."""

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

    def forward(  # type: ignore[override]
        self, tensor: Tensor, rows: Rows, mask_token: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return content and position + modality of the selected targets, (n, D) each; ``mask_token`` is (1, 1, D)."""
        x = mask_token[0].expand(len(rows.index), -1)
        if not self.share_embedding:
            # Nothing reads the token_emb of the untied layout; zero rows keep it in the graph for DDP.
            x = torch.cat([x, self.token_emb(rows.index[:0])])
        return x, self.emb(rows.position)

    def targets(self, tensor: Tensor, rows: Rows) -> Tensor:
        """Return the ids to predict, (n,)."""
        return pick_ids(tensor, rows.sample, rows.index)


class SequenceDecoderEmbedding(_DecoderEmbedding):
    """Embeds targets of a sequence: every token predicts the next one."""

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

    def forward(  # type: ignore[override]
        self, tensor: Tensor, rows: Rows, mask_token: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return content and position + modality of the selected tokens, (n, D) each; ``mask_token`` is ignored."""
        return super().forward(tensor, rows)

    def targets(self, tensor: Tensor, rows: Rows) -> Tensor:
        """Return the ids to predict, (n,): those of the next tokens."""
        return pick_ids(tensor, rows.sample, rows.index + 1)
