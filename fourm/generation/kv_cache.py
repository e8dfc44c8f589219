"""What a decoder remembers of the sequences that it writes one token at a time.

Attention to the earlier tokens reads their keys and values from a buffer; those of the context are computed once. The
cost of a token then does not depend on how often the earlier ones were looked at, and a whole sequence is linear.

Shapes: B sequences, M most tokens of a sequence, N context tokens, D width, H heads, C width of one head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fourm.models.fm import FourM
from fourm.models.fm_utils import KeysValues, attendable


class LayerCache:
    """Keys and values of one block: of the context, and of the sequence so far.

    Args:
        block: a :class:`DecoderBlock`.
        context: (B, N, D).
        length: M.
    """

    def __init__(self, block: Any, context: Tensor, length: int):
        self.context = KeysValues(*(part.contiguous() for part in block.keys_values(context)))
        batch, heads, _, width = self.context.keys.shape
        self._buffer = KeysValues(*(part.new_empty(batch, heads, length, width) for part in self.context))
        self._used = 0

    def extend(self, new: KeysValues) -> KeysValues:
        """Remember those of the next tokens, (B, H, n, C) each → those of all so far."""
        start, self._used = self._used, self._used + new.keys.shape[2]
        for buffer, part in zip(self._buffer, new, strict=True):
            buffer[:, :, start : self._used] = part
        return KeysValues(*(buffer[:, :, : self._used] for buffer in self._buffer))

    def keep(self, rows: Tensor) -> None:
        self.context = KeysValues(*(part[rows] for part in self.context))
        self._buffer = KeysValues(*(part[rows] for part in self._buffer))


class DecoderCache:
    """The whole decoder's.

    Args:
        model: whose decoder it is.
        context: (B, N, D), see :meth:`FourM.context`.
        padding: (B, N) of the context, True = padding.
        length: M.
    """

    def __init__(self, model: FourM, context: Tensor, padding: Tensor, length: int):
        self._model = model
        self._layers = [LayerCache(block, context, length) for block in model.decoder]
        self._context_mask = attendable(padding) if padding.any() else None

    def decode(self, y: Tensor) -> Tensor:
        """The next token of every sequence, embedded (B, 1, D) → decoder output (B, 1, D)."""
        for block, layer in zip(self._model.decoder, self._layers, strict=True):
            y = block(y, layer.context, None, self._context_mask, past=layer)
        return self._model.decoder_norm(y)

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences only, (b,) indices."""
        for layer in self._layers:
            layer.keep(rows)
        if self._context_mask is not None:
            self._context_mask = self._context_mask[rows]
