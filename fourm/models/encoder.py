"""The encoder that FourM and FourMViT share: it embeds the inputs and encodes them (method section 3, 1 and 3).

Shapes: B batch, N encoder slots, R register tokens, D model width. Masks: True = masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fourm.data.collate import ModDict
from fourm.models.fm_utils import INIT_STD, Block, BlockOptions, Slots, additive, attendable, init_weights
from fourm.models.modality_embedding import POS_TEMPERATURE, ModalityEmbedding
from fourm.models.token_selection import Selection


class Encoder(nn.Module):
    """Embedding modules of the inputs, blocks, norm and register tokens.

    Args:
        embeddings: Maps each modality to its embedding module.
        options: Options of the blocks.
        drop_path_rates: Stochastic depth rate of each block.
        num_register_tokens: Number of learned tokens in front of the inputs.
        use_act_checkpoint: Recompute the blocks in the backward pass; a number k recomputes only every k-th block.
        init_std: Standard deviation of the initial embedding vectors.
        pos_temperature: Temperature of the sine-cosine positions in images.
    """

    def __init__(
        self,
        embeddings: Mapping[str, ModalityEmbedding],
        options: BlockOptions,
        drop_path_rates: list[float],
        num_register_tokens: int,
        use_act_checkpoint: bool | int,
        init_std: float = INIT_STD,
        pos_temperature: float = POS_TEMPERATURE,
    ):
        super().__init__()
        self.init_std, self.pos_temperature = init_std, pos_temperature
        self.use_act_checkpoint = use_act_checkpoint
        self.encoder_embeddings: Any = self.init_embeddings(embeddings, options.dim)
        self.encoder = nn.ModuleList(Block(options, rate) for rate in drop_path_rates)
        self.encoder_norm = options.norm()
        self.num_register_tokens = num_register_tokens
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, options.dim))

    def init_embeddings(self, embeddings: Mapping[str, ModalityEmbedding], dim: int) -> nn.ModuleDict:
        """Create the parameters of the embedding modules at the width of the model."""
        for embedding in embeddings.values():
            if len(embedding.grid) == 2:
                embedding.pos_temperature = self.pos_temperature
            embedding.init(dim)
        return nn.ModuleDict(embeddings)

    def init_weights(self) -> None:
        """Initialise all parameters and buffers; models built on the meta device need ``to_empty`` before."""
        init_weights(self, self.init_std)
        if self.num_register_tokens:
            nn.init.normal_(self.register_tokens, std=self.init_std)

    def embed_encoder(self, mod_dict: ModDict, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
        """Return content, position + modality, (B, R + N, D) each, and padding (B, R + N); registers come first.

        The tokens of a packed selection are packed, see :meth:`encoder_slots`.
        """
        rows = selection.rows()
        tokens = [
            embedding(tensor_of(mod_dict, name, embedding), rows[name])
            for name, embedding in self.encoder_embeddings.items()
        ]
        x, emb = (torch.cat(part) for part in zip(*tokens, strict=True))
        padding = selection.padding
        if self.num_register_tokens:
            registers = self.register_tokens[0].repeat(len(padding), 1)
            x = torch.cat([registers, x])
            emb = F.pad(emb, (0, 0, len(registers), 0))
            padding = F.pad(padding, (self.num_register_tokens, 0))
        if not selection.packed:
            slots = self.encoder_slots(selection)
            x, emb = slots.place(x), slots.place(emb)
        return x, emb, padding

    def encoder_slots(self, selection: Selection) -> Slots:
        """Return the slots of the registers, and then of the selected tokens, in the encoder."""
        batch_size, length = selection.modality.shape
        shift = self.num_register_tokens
        first = torch.arange(batch_size, device=selection.slot.device) * (shift + length)
        registers = first[:, None] + torch.arange(shift, device=first.device)
        tokens = selection.slot + (selection.slots.sample() + 1) * shift
        return Slots(torch.cat([registers.flatten(), tokens]), (batch_size, shift + length))

    def encode(self, x: Tensor, padding: Tensor | None = None, slots: Slots | None = None) -> Tensor:
        """Run the encoder, (B, R + N, D) → (B, R + N, D), or on packed tokens."""
        mask = None if padding is None else additive(attendable(padding), x)
        return self.encoder_norm(self.run_blocks(self.encoder, x, mask, slots))

    def run_blocks(self, blocks: Iterable[nn.Module], x: Tensor, *context: Tensor | Slots | None) -> Tensor:
        """Run ``x`` through a stack of blocks that all get the same ``context``."""
        every = int(self.use_act_checkpoint) if torch.is_grad_enabled() else 0
        for i, block in enumerate(blocks):
            recompute = every and i % every == 0
            x = checkpoint(block, x, *context, use_reentrant=False) if recompute else block(x, *context)
        return x

    def get_num_layers_encoder(self) -> int:
        return len(self.encoder)

    def encoder_trunk(self) -> list[nn.Module | nn.Parameter]:
        """Return everything in the encoder except its embedding modules."""
        return [self.encoder, self.encoder_norm, *([self.register_tokens] if self.num_register_tokens else [])]

    def freeze_encoder(self, freeze_embeddings: bool = True) -> None:
        set_trainable(False, *self.encoder_trunk(), *([self.encoder_embeddings] if freeze_embeddings else []))

    def unfreeze_encoder(self, unfreeze_embeddings: bool = True) -> None:
        set_trainable(True, *self.encoder_trunk(), *([self.encoder_embeddings] if unfreeze_embeddings else []))


def set_trainable(trainable: bool, *parts: nn.Module | nn.Parameter) -> None:
    """Freeze or unfreeze modules and single parameters."""
    for part in parts:
        part.requires_grad_(trainable)


def tensor_of(mod_dict: ModDict, name: str, embedding: ModalityEmbedding) -> Tensor:
    """Return the tensor of a modality, or an empty one if the modality is not in the batch."""
    return mod_dict[name]["tensor"] if name in mod_dict else embedding.empty()


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the stochastic depth rates of ``depth`` blocks, which grow linearly from 0 to ``rate``."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
