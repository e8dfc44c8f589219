"""Counts the floating point operations of a training step from the shapes alone, for model FLOPs utilisation.

The count includes the matrix products that the model needs: linear layers, the two products of attention, and the
logits of the targets. A product of (m, k) and (k, n) takes 2mkn operations; its backward pass takes twice as many, or
as many if the input has no gradient (pixels, given vectors). The count leaves out what an implementation does in
addition: recomputed activations, the second QK^T in the backward pass of fused attention, element-wise operations, and
the optimizer.

Shapes: B batch, N encoder slots, R register tokens, M decoder slots, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fourm.models.fourm import FourM


class StepFlops:
    """Counts the operations of a training step. The model may be on the meta device, or sharded.

    Frozen parameters count as if they were trained.
    """

    def __init__(self, model: FourM):
        self._dim = model.mask_token.shape[-1]
        self._registers = model.num_register_tokens
        self._depths = len(model.encoder), len(model.decoder)
        decoder: Any = model.decoder
        context_macs = _linear_macs([model.decoder_proj_context, *(block.cross_attn.kv for block in decoder)])
        self._per_input_slot = _linear_macs(model.encoder) + context_macs
        self._per_target_slot = _linear_macs(model.decoder) + _linear_macs([model.decoder_proj_context]) - context_macs
        self._per_input = {name: _embedding_macs(module) for name, module in model.encoder_embeddings.items()}
        self._per_target = {name: _linear_macs([m.to_logits]) for name, m in model.decoder_embeddings.items()}

    def __call__(
        self,
        batch_size: int,
        num_encoder_tokens: int,
        num_decoder_tokens: int,
        inputs: Mapping[str, float],
        targets: Mapping[str, float],
        computed: tuple[int, int] | None = None,
    ) -> float:
        """Return the operations of a forward and backward pass.

        Args:
            batch_size: Samples per step.
            num_encoder_tokens, num_decoder_tokens: N and M.
            inputs, targets: Selected tokens of each modality in the whole batch, as in ``Selection.counts``.
            computed: Inputs and targets in the whole batch that linear layers compute, including padding, as in
                ``Selection.num_computed``; None means all slots.
        """
        num_inputs, num_targets = computed or (batch_size * num_encoder_tokens, batch_size * num_decoder_tokens)
        num_inputs += batch_size * self._registers
        n, m = num_encoder_tokens + self._registers, num_decoder_tokens
        encoder, decoder = self._depths
        pairs = encoder * n * n + decoder * (m * m + m * n)  # a query and a key need D for the score and D for the sum
        linear = num_inputs * self._per_input_slot + num_targets * self._per_target_slot
        trunk = 3 * (linear + 2 * batch_size * pairs * self._dim)
        embeddings = sum(count * self._per_input[name] for name, count in inputs.items())
        logits = 3 * sum(count * self._per_target[name] for name, count in targets.items())
        return 2 * (trunk + embeddings + logits)


def _linear_macs(modules: Iterable[nn.Module]) -> int:
    """Return the multiplications per token in all linear layers, that is the number of entries of their matrices."""
    linears = (part for module in modules for part in module.modules() if isinstance(part, nn.Linear))
    return sum(linear.weight.numel() for linear in linears)


def _embedding_macs(embedding: nn.Module) -> int:
    """Return the multiplications per token, forward and backward; the input of the first layer has no gradient."""
    linears = [part for part in embedding.modules() if isinstance(part, nn.Linear)]
    return sum((2 if index == 0 else 3) * linear.weight.numel() for index, linear in enumerate(linears))
