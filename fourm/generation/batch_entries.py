"""Prepares batches for generation: empty targets, full inputs, prompts, and inputs without conditioning.

Every function returns a new batch and does not change the given one.

Shapes: B batch, L tokens of one modality. Masks: True = masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fourm.data.collate import ModDict
from fourm.data.modality_info import Modality, as_modality
from fourm.utils.errors import UserError
from fourm.utils.tokenizer import load_text_tokenizer, merge_spans
from fourm.utils.tokenizer.special_tokens import EOS_ID, NUM_SENTINELS, PAD_ID, sentinel, sentinel_id

ModalityInfo = Mapping[str, Mapping[str, Any]]


def init_empty_target_modality(
    mod_dict: ModDict, modality_info: ModalityInfo, domain: str, batch_size: int, num_tokens: int, device: Any
) -> dict[str, Any]:
    """Add ``domain`` to the batch as a target that is to be generated from scratch.

    Args:
        mod_dict: The batch.
        modality_info: Maps each modality to its entry in the modality table.
        domain: The target modality.
        batch_size: Number of samples.
        num_tokens: Number of tokens of an image, or length of the row of a sequence, whose only input is [S_1]; at most
            ``num_tokens - 1`` tokens are generated after it.
        device: Device of the new tensors.

    Returns:
        The new batch.

    Raises:
        UserError: If the modality does not consist of tokens.
    """
    modality = as_modality(domain, modality_info[domain])
    if modality.type == "seq_emb":
        raise UserError(f"{domain} does not consist of tokens, so it cannot be generated")
    if modality.type == "img":
        tensor = torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device)
        inputs, attention = 0, torch.zeros_like(tensor)
        attention[:, 0] = num_tokens
    else:
        tensor = torch.full((batch_size, max(num_tokens, 3)), PAD_ID, device=device)
        tensor[:, :2] = sentinel_id(1)  # the only input, and the first target
        inputs, attention = 1, torch.ones_like(tensor)
        attention[:, 0] = 0
    return {**mod_dict, domain: _entry(tensor, _first(inputs, tensor), attention)}


def init_full_input_modality(
    mod_dict: ModDict, modality_info: ModalityInfo, domain: str, device: Any, eos_id: int = EOS_ID
) -> dict[str, Any]:
    """Make all of ``domain`` an input: a sequence up to its first [EOS], or up to its last token that is not padding.

    The room that :func:`custom_text` leaves for generated text is not an input. Rows of vectors keep their
    ``input_mask``.

    Returns:
        The new batch.
    """
    modality, tensor = as_modality(domain, modality_info[domain]), mod_dict[domain]["tensor"].to(device)
    if modality.is_pixels:
        side = modality.patch_size or 16
        shape = (len(tensor), (tensor.shape[-2] // side) * (tensor.shape[-1] // side))
        valid = torch.ones(shape, dtype=torch.bool, device=device)
    elif modality.type == "img":
        valid = torch.ones_like(tensor.flatten(1), dtype=torch.bool)
    elif modality.type == "seq_emb":
        given = mod_dict[domain].get("input_mask", torch.zeros(tensor.shape[:2], dtype=torch.bool))
        valid = ~given.to(device).bool()
    elif modality.type == "seq_token" and not sentinels_of(modality):
        valid = torch.ones_like(tensor, dtype=torch.bool)
    else:
        ended = (tensor == eos_id).int()
        valid = (ended.cumsum(1) - ended == 0) & (tensor != PAD_ID).flip(1).int().cummax(1).values.flip(1).bool()
        if {"input_mask", "target_mask"} <= mod_dict[domain].keys():
            to_write = ~mod_dict[domain]["target_mask"].bool() & mod_dict[domain]["input_mask"].bool()
            valid &= ~to_write.to(device)
    entry = {"tensor": tensor, **_masks(~valid, torch.ones_like(valid))}
    return {**mod_dict, domain: entry}


def custom_text(
    sample: ModDict,
    input_text: str,
    eos_token: str,
    key: str,
    device: Any,
    text_tokenizer: Tokenizer | str | Path,
    target_max_len: int = 50,
    start_token: str = "[S_1]",
) -> dict[str, Any]:
    """Add a prompt as ``key`` to the batch of one sample; parts of its text may be left to the model.

    Args:
        sample: The batch.
        input_text: The prompt. The model replaces every sentinel in it with generated text; ``[S_1]`` alone generates
            the whole text.
        eos_token: Token that ends the generated text.
        key: The modality.
        device: Device of the new tensors.
        text_tokenizer: The text vocabulary, or its path.
        target_max_len: Maximum number of generated tokens after ``start_token``, including ``eos_token``.
        start_token: Token that starts the generated text.

    Returns:
        The new batch.

    Raises:
        UserError: If the text vocabulary lacks ``start_token`` or ``eos_token``.
    """
    tokenizer = _load(text_tokenizer)
    inputs = tokenizer.encode(input_text, add_special_tokens=False).ids
    start_id, eos_id = (tokenizer.token_to_id(token) for token in (start_token, eos_token))
    for token, token_id in ((start_token, start_id), (eos_token, eos_id)):
        if token_id is None:
            raise UserError(f"custom_text: the text vocabulary has no token {token}")
    ids = [*inputs, start_id, *[PAD_ID] * (target_max_len - 2), eos_id]
    tensor = torch.tensor([ids], device=device)
    attention = (~_first(len(inputs), tensor)).long()
    return {**sample, key: _entry(tensor, _first(len(inputs), tensor), attention)}


def expand_to_batch(mod_dict: ModDict, batch_size: int) -> dict[str, Any]:
    """Repeat a batch of one sample.

    Args:
        mod_dict: The batch; entries that already have ``batch_size`` samples stay as they are.
        batch_size: Number of samples.

    Returns:
        The new batch.

    Raises:
        UserError: If an entry has neither one nor ``batch_size`` samples.
    """
    for name, entry in mod_dict.items():
        if len(entry["tensor"]) not in (1, batch_size):
            raise UserError(f"{name}: {len(entry['tensor'])} samples cannot be expanded to a batch of {batch_size}")
    return {
        name: {key: value.expand(batch_size, *value.shape[1:]).clone() for key, value in entry.items()}
        for name, entry in mod_dict.items()
    }


def emptied(mod_dict: ModDict, modality_info: ModalityInfo, domains: Iterable[str]) -> dict[str, Any]:
    """Remove the content of ``domains`` from the batch, for the unconditional side of guidance."""
    return {**mod_dict, **{name: _emptied(mod_dict[name], modality_info[name], name) for name in domains}}


def _emptied(entry: Mapping[str, Tensor], info: Mapping[str, Any], name: str) -> dict[str, Any]:
    modality, tensor = as_modality(name, info), entry["tensor"]
    if modality.type == "img" or (modality.type == "seq_token" and not sentinels_of(modality)):
        return {**entry, "input_mask": torch.ones_like(entry["input_mask"], dtype=torch.bool)}
    first = tensor[:, :1]
    single = torch.zeros_like(first) if modality.type == "seq_emb" else torch.full_like(first, _START)
    masked = torch.zeros(single.shape[:2], dtype=torch.bool, device=single.device)
    return {"tensor": single, **_masks(masked, ~masked)}


_START = sentinel_id(1)


def sentinels_of(modality: Modality, text_tokenizer: Tokenizer | str | Path | None = None) -> list[int]:
    """Return the ids of [S_1], [S_2], … of a sequence; the list is empty if its codes leave no room for them."""
    if modality.type == "seq_token":
        return [*range(_START, min(modality.vocab_offset, sentinel_id(NUM_SENTINELS)))]
    if text_tokenizer is None:
        return [sentinel_id(index) for index in range(1, NUM_SENTINELS)]
    ids: list[int] = []
    tokenizer = _load(text_tokenizer)
    while (token_id := tokenizer.token_to_id(sentinel(len(ids) + 1))) is not None:
        ids.append(token_id)
    return ids


def merged(
    inputs: Sequence[Sequence[int]], generated: Sequence[Sequence[int]], sentinels: list[int], device: Any
) -> dict[str, Tensor]:
    """Insert generated spans in place of their sentinels, and make the result an input.

    Args:
        inputs: Input ids of each sample.
        generated: Generated ids of each sample, which start with a sentinel.
        sentinels: Ids of the sentinels.
        device: Device of the new tensors.

    Returns:
        The entry of the batch; rows are padded to the longest.
    """
    rows = [merge_spans(given, spans, sentinels) for given, spans in zip(inputs, generated, strict=True)]
    length = max(map(len, rows))
    tensor = torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows], device=device)
    ends = torch.tensor([[len(row)] for row in rows], device=device)
    masked = torch.arange(length, device=device) >= ends
    return {"tensor": tensor, **_masks(masked, torch.ones_like(masked))}


def _load(text_tokenizer: Tokenizer | str | Path) -> Tokenizer:
    return load_text_tokenizer(text_tokenizer) if isinstance(text_tokenizer, (str, Path)) else text_tokenizer


def _first(count: int, tensor: Tensor) -> Tensor:
    """Return a mask (B, L) that is True at the first ``count`` positions."""
    return (torch.arange(tensor.shape[1], device=tensor.device) < count).expand(tensor.shape).clone()


def _entry(tensor: Tensor, is_input: Tensor, attention: Tensor) -> dict[str, Tensor]:
    return {"tensor": tensor, **_masks(~is_input, is_input, attention)}


def _masks(input_mask: Tensor, target_mask: Tensor, attention: Tensor | None = None) -> dict[str, Tensor]:
    attention = torch.zeros_like(input_mask, dtype=torch.long) if attention is None else attention
    return {"input_mask": input_mask, "target_mask": target_mask, "decoder_attention_mask": attention}
