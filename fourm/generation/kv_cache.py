"""Key-value cache of a decoder that writes sequences one token at a time.

The keys and values of earlier tokens are read from a buffer, and those of the context are computed once, so that each
token of a sequence runs through the decoder only once.

With a ``position``, a tensor, the caches have the same shapes in every step and nothing waits for the device, so that a
CUDA graph can replay the step: all of the buffer is read, and a mask hides the tokens after the position.

Shapes: B sequences, M maximum tokens of a sequence, N context tokens, D width, H heads, C width of one head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourm.models.fm_utils import KeysValues, attendable
from fourm.models.fourm import FourM


class LayerCache:
    """Keys and values of one block, for the context and for the sequence so far.

    Args:
        block: A :class:`DecoderBlock`.
        context: The context, (B, N, D).
        length: Maximum number of tokens M.
        position: Index (1,) of the next token, for steps of the same shapes; None if the cache counts the tokens
            itself.
    """

    def __init__(self, block: Any, context: Tensor, length: int, position: Tensor | None = None):
        self.context = KeysValues(*(part.contiguous() for part in block.keys_values(context)))
        batch, heads, _, width = self.context.keys.shape
        self._buffer = KeysValues(*(part.new_zeros(batch, heads, length, width) for part in self.context))
        self._used, self._position = 0, position

    def extend(self, new: KeysValues) -> KeysValues:
        """Append the keys and values of the next tokens, (B, H, n, C) each, and return those of all tokens so far.

        With a position, there is one token, and the whole buffer is returned.
        """
        if self._position is not None:
            for buffer, part in zip(self._buffer, new, strict=True):
                buffer.index_copy_(2, self._position, part)
            return self._buffer
        start, self._used = self._used, self._used + new.keys.shape[2]
        for buffer, part in zip(self._buffer, new, strict=True):
            buffer[:, :, start : self._used] = part
        return KeysValues(*(buffer[:, :, : self._used] for buffer in self._buffer))

    def keep(self, rows: Tensor) -> None:
        """Keep only these sequences, given by their indices (b,)."""
        self.context = KeysValues(*(part[rows] for part in self.context))
        self._buffer = KeysValues(*(part[rows] for part in self._buffer))


class DecoderCache:
    """Caches of all decoder blocks.

    Args:
        model: The model.
        context: The context, (B, N, D), see :meth:`FourM.context`.
        padding: Padding mask of the context, (B, N), True = padding; None if there is none.
        length: Maximum number of tokens M.
        position: See :class:`LayerCache`.
    """

    def __init__(
        self, model: FourM, context: Tensor, padding: Tensor | None, length: int, position: Tensor | None = None
    ):
        self._model, self._position = model, position
        self._layers = [LayerCache(block, context, length, position) for block in model.decoder]
        self._slots = torch.arange(length, device=context.device)
        self._context_mask = None if padding is None else attendable(padding)

    def decode(self, y: Tensor) -> Tensor:
        """Decode the next token of every sequence, embedded as (B, 1, D), and return the decoder output (B, 1, D)."""
        mask = None if self._position is None else (self._slots <= self._position)[None, None, None]
        for block, layer in zip(self._model.decoder, self._layers, strict=True):
            y = block(y, layer.context, mask, self._context_mask, past=layer)
        return self._model.decoder_norm(y)

    def keep(self, rows: Tensor) -> None:
        """Keep only these sequences, given by their indices (b,)."""
        for layer in self._layers:
            layer.keep(rows)
        if self._context_mask is not None:
            self._context_mask = self._context_mask[rows]
