"""4M's forward pass in its simplest form: embed every token, then select, and compute attention with matrix products.

It is slow and needs much memory on purpose, and shares nothing with ``fourm.models`` but the parameters. Tests use it
as the reference, and the benchmark of the training step as the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fourm.models import FM


def synthetic_batch(
    modalities: Mapping[str, Mapping[str, Any]], size: int, inputs: int, targets: int, seed: int = 0
) -> dict[str, dict[str, Tensor]]:
    """Make a batch with ``inputs`` input tokens per modality, and ``targets`` targets per modality that can be one."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _synthetic(modality, size, inputs, targets, generator) for name, modality in modalities.items()}


def _synthetic(
    modality: Mapping[str, Any], size: int, inputs: int, targets: int, generator: torch.Generator
) -> dict[str, Tensor]:
    is_image, vocab_size = modality["type"] == "img", modality["vocab_size"]
    length = modality["max_tokens"] if is_image else 2 * (modality["max_tokens"] + 1)
    if not modality["decoder_embedding"]:
        targets = 0
    input_mask = torch.ones(size, length, dtype=torch.bool)
    target_mask = torch.ones(size, length, dtype=torch.bool)
    attention = torch.zeros(size, length, dtype=torch.int32)
    if targets and not is_image:
        targets += 1  # the first token of a sequence is not predicted
    for b in range(size):
        order = torch.randperm(length, generator=generator) if is_image else torch.arange(length)
        chosen = order[inputs : inputs + targets]
        input_mask[b, order[:inputs]] = False
        target_mask[b, chosen] = False
        if is_image:
            attention[b, chosen.sort().values[:1]] = len(chosen)
        else:
            attention[b, chosen] = 1
    if vocab_size:
        tensor = torch.randint(1, vocab_size, (size, length), generator=generator)
    elif is_image:
        shape = (size, modality["num_channels"], modality["input_size"], modality["input_size"])
        tensor = torch.randn(shape, generator=generator)
    else:
        tensor = torch.randn((size, length, modality["embedding_options"]["orig_emb_dim"]), generator=generator)
    return {
        "tensor": tensor,
        "input_mask": input_mask,
        "target_mask": target_mask,
        "decoder_attention_mask": attention,
    }


def embed_all_loss(
    model: FM,
    batch: Mapping[str, Mapping[str, Tensor]],
    num_encoder_tokens: int,
    num_decoder_tokens: int,
    loss_type: str = "mod",
    order: Sequence[str] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of :meth:`fourm.models.fourm.FourM.forward`.

    Args:
        model: The model.
        batch: Modality → tensors, as :func:`synthetic_batch` returns them.
        num_encoder_tokens: Token budget of the encoder.
        num_decoder_tokens: Token budget of the decoder.
        loss_type: ``mod`` for the mean over modalities, or ``token`` for the mean over tokens.
        order: Order of the target modalities in the decoder; by default that of the batch.

    Returns:
        The loss, and modality → its mean loss.
    """
    x, emb, masked = _encoder_tokens(model, batch, num_encoder_tokens)
    h = x + emb
    for block in model.encoder:
        h = h + _attention(block.attn, block.norm1(h), masked[:, None])
        h = h + _mlp(block.mlp, block.norm2(h))
    context = model.decoder_proj_context(model.encoder_norm(h)) + emb

    order = order or [name for name in batch if name in model.decoder_embeddings]
    y, ids, modality, attention = _decoder_tokens(model, batch, num_decoder_tokens, order)
    column = torch.arange(y.shape[1], device=y.device)
    hidden = column >= (column + 1 if model.decoder_causal_mask else attention.cumsum(1)).unsqueeze(-1)
    hidden = hidden.expand(len(y), -1, -1)
    if model.decoder_sep_mask:
        hidden = hidden | (modality.unsqueeze(1) != modality.unsqueeze(2))
    for block in model.decoder:
        y = y + _attention(block.self_attn, block.norm1(y), hidden)
        y = y + _cross_attention(block.cross_attn, block.query_norm(y), block.context_norm(context), masked[:, None])
        y = y + _mlp(block.mlp, block.norm2(y))
    y = model.decoder_norm(y)

    losses, token_losses = {}, []
    for i, name in enumerate(order):
        logits = model.decoder_embeddings[name].to_logits(y[modality == i])
        entropy = F.cross_entropy(logits, ids[modality == i], reduction="none")
        token_losses.append(entropy)
        losses[name] = entropy.mean() if len(entropy) else entropy.sum()
    if loss_type == "token":
        return torch.cat(token_losses).mean(), losses
    return sum(losses.values()) / len(losses), losses  # type: ignore[return-value]


def _encoder_tokens(model: FM, batch: Mapping[str, Mapping[str, Tensor]], count: int) -> tuple[Tensor, Tensor, Tensor]:
    xs, embs, masks = [], [], []
    for name, entry in batch.items():
        if name not in model.encoder_embeddings:
            continue
        module, tensor, mask = model.encoder_embeddings[name], entry["tensor"], entry["input_mask"]
        if hasattr(module, "proj"):
            patches = rearrange(tensor, "b c (h p) (w q) -> b (h w) (p q c)", p=module.patch_size, q=module.patch_size)
            x = module.proj(patches)
        else:
            x = module.emb_proj(tensor) if hasattr(module, "emb_proj") else module.token_emb(tensor)
        xs.append(x)
        embs.append(_positions(module, mask, model.modality_info[name]["type"] == "img") + module.mod_emb)
        masks.append(mask)
    x, emb, masked = torch.cat(xs, 1), torch.cat(embs, 1), torch.cat(masks, 1)
    kept = masked.long().argsort(dim=1, stable=True)[:, :count]
    masked = masked.gather(1, kept)
    x, emb = (_gather(t, kept).masked_fill(masked[..., None], 0) for t in (x, emb))
    if model.num_register_tokens:
        registers = model.register_tokens.expand(len(x), -1, -1)
        x, emb = torch.cat([registers, x], 1), torch.cat([torch.zeros_like(registers), emb], 1)
        masked = torch.cat([masked.new_zeros(registers.shape[:2]), masked], 1)
    return x, emb, masked


def _decoder_tokens(
    model: FM, batch: Mapping[str, Mapping[str, Tensor]], count: int, order: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns: list[tuple[Tensor, ...]] = []
    for i, name in enumerate(order):
        module, ids, mask = model.decoder_embeddings[name], batch[name]["tensor"], batch[name]["target_mask"]
        attention, is_image = batch[name]["decoder_attention_mask"], model.modality_info[name]["type"] == "img"
        emb = _positions(module, mask, is_image) + module.mod_emb
        if is_image:
            y = model.mask_token + emb
        else:
            y, ids, mask = (module.token_emb(ids) + emb)[:, :-1], ids[:, 1:], mask[:, 1:] | mask[:, :-1]
            attention = attention[:, :-1]
        columns.append((y, ids, mask, attention, torch.full_like(ids, i)))
    y, ids, masked, attention, modality = (torch.cat(c, 1) for c in zip(*columns, strict=True))
    kept = masked.long().argsort(dim=1, stable=True)[:, :count]
    masked, ids, attention, modality = (t.gather(1, kept) for t in (masked, ids, attention, modality))
    return _gather(y, kept), ids, modality.masked_fill(masked, -1), attention


def _positions(module: nn.Module, mask: Tensor, is_image: bool) -> Tensor:
    table = module.pos_emb.expand(len(mask), -1, -1)  # type: ignore[operator]
    if is_image:
        return table  # type: ignore[no-any-return]
    index = ((~mask).cumsum(1) - 1).clamp(min=0)
    index = index.masked_fill(index >= module.num_positions, 0)  # type: ignore[operator]
    return _gather(table, index).masked_fill(mask[..., None], 0)  # type: ignore[arg-type]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _mlp(module: Any, x: Tensor) -> Tensor:
    hidden = module.act(module.fc1(x))
    return module.fc2(hidden * module.fc3(x) if hasattr(module, "fc3") else hidden)  # type: ignore[no-any-return]


def _attention(module: Any, x: Tensor, masked: Tensor) -> Tensor:
    q, k, v = module.qkv(x).chunk(3, dim=-1)
    return _weighted_sum(module, q, k, v, masked)


def _cross_attention(module: Any, x: Tensor, context: Tensor, masked: Tensor) -> Tensor:
    return _weighted_sum(module, module.q(x), *module.kv(context).chunk(2, dim=-1), masked)


def _weighted_sum(module: Any, q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    q, k, v = (rearrange(t, "b n (h c) -> b h n c", h=module.num_heads) for t in (q, k, v))
    weights = module.q_norm(q) @ module.k_norm(k).transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = weights.masked_fill(masked[:, None], -torch.finfo(weights.dtype).max).softmax(-1)
    return module.proj(rearrange(weights @ v, "b h n c -> b n (h c)"))


def saved_bytes(loss: Callable[[], Tensor], model: nn.Module) -> int:
    """Count the bytes of activations that the forward pass saves for the backward pass; each storage counts once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(saved.values())
