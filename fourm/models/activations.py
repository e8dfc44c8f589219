"""Memory of a training step's activations, from the shapes alone.

Counted is what autograd keeps for the backward pass of an eager step, tensor by tensor as listed below, with fused
attention (no matrix of scores) and the logits. c is 2 bytes with 16-bit autocast, else 4; the residual stream and what
norms read are float32 either way. Per slot of width D, with MLPs of hidden width h:

* every block: the input of each norm (4 D each, shared with the residual stream), its result, q, k, v, the sum that
  attention returns (c D each), and of the MLP fc1's result and fc2's input (2 c h), or four such of a gated one
* once: what the last norms read, the context, and for every target token float32 log-probabilities and logits (c)

With recomputed activations a block keeps its input alone, and one block at a time all of the above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fourm.models.fm import FourM
from fourm.models.fm_utils import GatedMlp, LayerNorm


def activation_bytes(
    model: FourM, batch_size: int, num_encoder_tokens: int, num_decoder_tokens: int, targets: Mapping[str, float], half: bool
) -> dict[str, float]:  # fmt: skip
    """Bytes of a step's activations.

    Args:
        model: may be on the meta device.
        num_encoder_tokens, num_decoder_tokens: slots per sample, without registers.
        targets: kept target tokens per modality in the whole batch.
        half: with 16-bit autocast.

    Returns:
        ``blocks``, ``logits`` and ``rest``.
    """
    contexts = batch_size * (num_encoder_tokens + model.num_register_tokens)
    slots = batch_size * num_decoder_tokens
    encoder, decoder, dim = len(model.encoder), len(model.decoder), model.mask_token.shape[-1]
    per_context, per_slot, context_per_context = _block_bytes(model.decoder[0], dim, half)
    encoder_block = contexts * per_context
    decoder_block = slots * per_slot + contexts * context_per_context
    every = int(model.use_act_checkpoint)  # how many blocks there are to one that is recomputed; 0 = none is
    again = [math.ceil(depth / every) if every else 0 for depth in (encoder, decoder)]
    blocks = (encoder - again[0]) * encoder_block + (decoder - again[1]) * decoder_block
    blocks += 4 * dim * (again[0] * contexts + again[1] * slots) + (max(encoder_block, decoder_block) if every else 0)
    c = 2 if half else 4
    logits = sum(count * model.decoder_embeddings[name].vocab_size for name, count in targets.items()) * (4 + c)
    rest = contexts * (4 + 4 + c) * dim + slots * (4 + c) * dim
    return {"blocks": blocks, "logits": logits, "rest": rest}


def _block_bytes(block: Any, dim: int, half: bool) -> tuple[float, float, float]:
    """Per encoder slot of an encoder block; per target slot and per encoder slot of a decoder block."""
    c = 2 if half else 4
    attention, mlp = block.self_attn, block.mlp
    hidden, gated = mlp.fc1.out_features, isinstance(mlp, GatedMlp)
    score = 4 * attention.num_heads  # log of the softmax's denominator
    # fc1 and fc3 each convert the norm's result to 16 bits for themselves.
    mlp_bytes = c * (dim * (2 if gated and half else 1) + hidden * (4 if gated else 2))
    norm = 4 * dim + 8  # input, mean and deviation
    # A norm of queries or keys reads a float32 copy.
    qk = (4 + c) * dim + 2 * score if isinstance(attention.q_norm, LayerNorm) else 0
    self_attention = norm + c * (1 + 3 + 1) * dim + score + 2 * qk
    cross_of_slot = norm + c * (1 + 1 + 1) * dim + score + qk
    cross_of_context = 8 + c * (1 + 2) * dim + qk
    encoder = self_attention + norm + mlp_bytes
    return encoder, encoder + cross_of_slot, cross_of_context
