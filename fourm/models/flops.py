"""Floating point operations of a training step, from the shapes alone: what model FLOPs utilisation is measured by.

Counted are the matrix products that the model needs: linear maps, the two products of attention, logits of the targets.
A product of (m, k) and (k, n) has 2mkn operations; its backward pass has twice as many, or as many where the input has no
gradient (pixels, given vectors). Not counted is what an implementation does besides: recomputed activations, the second
QK^T of a fused attention's backward pass, element-wise work, the optimizer.

Shapes: B batch, N encoder slots, R register tokens, M decoder slots, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fourm.models.fm import FourM


class StepFlops:
    """Counts a training step's operations; the model may be on the meta device, or sharded.

    Parameters that are frozen count as if they were trained.
    """

    def __init__(self, model: FourM):
        self._dim = model.mask_token.shape[-1]
        self._registers = model.num_register_tokens
        self._depths = len(model.encoder), len(model.decoder)
        decoder: Any = model.decoder
        maps_of_context = _weights([model.decoder_proj_context, *(block.cross_attn.kv for block in decoder)])
        self._per_input_slot = _weights(model.encoder) + maps_of_context
        self._per_target_slot = _weights(model.decoder) + _weights([model.decoder_proj_context]) - maps_of_context
        self._per_input = {name: _embedding_macs(module) for name, module in model.encoder_embeddings.items()}
        self._per_target = {name: _weights([module.to_logits]) for name, module in model.decoder_embeddings.items()}

    def __call__(
        self, batch_size: int, num_encoder_tokens: int, num_decoder_tokens: int,
        inputs: Mapping[str, float], targets: Mapping[str, float],
    ) -> float:  # fmt: skip
        """Operations of forward and backward pass.

        Args:
            num_encoder_tokens, num_decoder_tokens: N and M; padding is computed like any token.
            inputs, targets: kept tokens per modality in the whole batch, as in ``Selection.counts``.
        """
        n, m = num_encoder_tokens + self._registers, num_decoder_tokens
        encoder, decoder = self._depths
        pairs = encoder * n * n + decoder * (m * m + m * n)  # of a query and a key: D for the score, D for the sum
        maps = n * self._per_input_slot + m * self._per_target_slot
        trunk = 3 * batch_size * (maps + 2 * pairs * self._dim)
        embedded = sum(count * self._per_input[name] for name, count in inputs.items())
        logits = 3 * sum(count * self._per_target[name] for name, count in targets.items())
        return 2 * (trunk + embedded + logits)


def _weights(modules: Iterable[nn.Module]) -> int:
    """Entries of all weight matrices, which are multiplications per token."""
    linears = (part for module in modules for part in module.modules() if isinstance(part, nn.Linear))
    return sum(linear.weight.numel() for linear in linears)


def _embedding_macs(embedding: nn.Module) -> int:
    """Multiplications per token, forward and backward; the first map's input has no gradient."""
    linears = [part for part in embedding.modules() if isinstance(part, nn.Linear)]
    return sum((2 if index == 0 else 3) * linear.weight.numel() for index, linear in enumerate(linears))
