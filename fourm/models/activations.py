"""Estimates the activation memory of a training step from the shapes alone.

The estimate counts what autograd keeps for the backward pass of an eager step, tensor by tensor as listed below, with
fused attention (no score matrix), plus the logits. Every slot counts, as if none were left out as padding. c is 2 bytes
with 16-bit autocast and 4 otherwise; r is the same for the residual stream, which is float32 by default in both cases.
Per slot of width D, with MLPs of hidden width h:

* every block: the input of each norm (r D each, shared with the residual stream), its output, q, k, v and the output of
  attention (c D each), the output of fc1 in the MLP (c h), and that of fc3 if it is gated; fc2's input is recomputed
* once: the inputs of the last norms, the context, and for every target token float32 log-probabilities and logits (c)

With recomputed activations, a block keeps only its input, and one block at a time keeps all of the above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fourm.models.fm_utils import GatedMlp, LayerNorm
from fourm.models.fourm import FourM


def activation_bytes(
    model: FourM,
    batch_size: int,
    num_encoder_tokens: int,
    num_decoder_tokens: int,
    targets: Mapping[str, float],
    half: bool,
) -> dict[str, float]:
    """Estimate the bytes of the activations of a training step.

    Args:
        model: The model, which may be on the meta device.
        batch_size: Samples per step.
        num_encoder_tokens, num_decoder_tokens: Slots per sample, without registers.
        targets: Selected target tokens of each modality in the whole batch.
        half: Whether the step uses 16-bit autocast.

    Returns:
        The bytes of ``blocks``, ``logits`` and ``rest``.
    """
    contexts = batch_size * (num_encoder_tokens + model.num_register_tokens)
    slots = batch_size * num_decoder_tokens
    encoder, decoder, dim = len(model.encoder), len(model.decoder), model.mask_token.shape[-1]
    c = 2 if half else 4
    r = model.residual_dtype.itemsize if model.residual_dtype else 4
    per_context, per_slot, context_per_context = _block_bytes(model.decoder[0], dim, c, r)
    encoder_block = contexts * per_context
    decoder_block = slots * per_slot + contexts * context_per_context
    every = int(model.use_act_checkpoint)  # every k-th block is recomputed; 0 = none
    recomputed = [math.ceil(depth / every) if every else 0 for depth in (encoder, decoder)]
    blocks = (encoder - recomputed[0]) * encoder_block + (decoder - recomputed[1]) * decoder_block
    blocks += r * dim * (recomputed[0] * contexts + recomputed[1] * slots)  # their inputs
    if every:
        blocks += max(encoder_block, decoder_block)  # the block that is being recomputed
    logits = sum(count * model.decoder_embeddings[name].vocab_size for name, count in targets.items()) * (4 + c)
    rest = contexts * (r + r + c) * dim + slots * (r + c) * dim
    return {"blocks": blocks, "logits": logits, "rest": rest}


def _block_bytes(block: Any, dim: int, c: int, r: int) -> tuple[float, float, float]:
    """Return the bytes of an encoder block per encoder slot, and of a decoder block per target and per encoder slot."""
    attention, mlp = block.self_attn, block.mlp
    hidden, gated = mlp.fc1.out_features, isinstance(mlp, GatedMlp)
    score = 4 * attention.num_heads  # log of the softmax denominator
    # fc1 and fc3 each convert the output of a float32 norm to 16 bits.
    mlp_bytes = c * (dim * (2 if gated and c < r else 1) + hidden * (2 if gated else 1))
    norm = r * dim + 8  # input, mean and deviation
    # The norms of queries and keys keep a contiguous copy of their input.
    qk = (c + c) * dim + 2 * score if isinstance(attention.q_norm, LayerNorm) else 0
    self_attention = norm + c * (1 + 3 + 1) * dim + score + 2 * qk
    cross_of_slot = norm + c * (1 + 1 + 1) * dim + score + qk
    cross_of_context = 8 + c * (1 + 2) * dim + qk
    encoder = self_attention + norm + mlp_bytes
    return encoder, encoder + cross_of_slot, cross_of_context
