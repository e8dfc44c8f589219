"""Selects the tokens of a batch that the model reads and predicts, from the masks alone.

A sample has several thousand tokens, of which a few hundred are used. Because they are selected before anything is
embedded, memory and time do not depend on the others. The selection happens on the host, before the batch moves to the
device, so the number of tokens of each modality is known there and the forward pass never waits for the device.

Shapes: B batch, L tokens of one modality, T tokens of all modalities, S slots (N of the encoder, M of the decoder),
n selected tokens in the whole batch, D model width. Masks: True = masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourm.data.collate import ModDict
from fourm.models.fm_utils import Slots
from fourm.models.modality_embedding import Rows


@dataclass(frozen=True)
class Selection:
    """The selected tokens of the encoder or of the decoder, grouped by modality.

    Attributes:
        counts: Number of selected tokens of each modality in the whole batch, in the order of the rows.
        sample, index, position: (n,) each, see :class:`Rows`.
        slot: (n,) Slot of each token, as an index into the B·S slots.
        modality: (B, S) ``id`` of the modality in each slot; −1 is padding.
        attention: (B, S) ``decoder_attention_mask`` of the selected tokens, whose running sum says how many of the
            first targets each target sees, see :meth:`FourM.target_mask`; zeros in the encoder.
        packed: Whether the model computes the rows of the tokens, in this order, instead of all slots.
    """

    counts: dict[str, int]
    sample: Tensor
    index: Tensor
    position: Tensor
    slot: Tensor
    modality: Tensor
    attention: Tensor
    packed: bool = False

    @classmethod
    def everything(cls, name: str, batch_size: int, length: int, device: torch.device) -> Selection:
        """Select all tokens of a single modality."""
        slot = torch.arange(batch_size * length, device=device)
        index = slot % length
        zeros = torch.zeros_like(slot).view(batch_size, length)
        return cls({name: len(slot)}, slot // length, index, index, slot, modality=zeros, attention=zeros)

    @property
    def padding(self) -> Tensor:
        """Padding mask, (B, S), True = padding."""
        return self.modality < 0

    @property
    def full(self) -> bool:
        """Whether no slot is padding; this is known without waiting for the device."""
        return sum(self.counts.values()) == self.modality.numel()

    @property
    def slots(self) -> Slots:
        """The slots of the tokens."""
        return Slots(self.slot, (self.modality.shape[0], self.modality.shape[1]))

    @property
    def num_computed(self) -> int:
        """Number of tokens, including padding, that linear layers compute in the whole batch."""
        return sum(self.counts.values()) if self.packed else self.modality.numel()

    def rows(self) -> dict[str, Rows]:
        """Return the selected rows of each modality."""
        parts = (part.split(list(self.counts.values())) for part in (self.sample, self.index, self.position))
        return {name: Rows(*rows) for name, *rows in zip(self.counts, *parts, strict=True)}

    def place(self, tokens: Sequence[Tensor]) -> Tensor:
        """Pack the tokens of each modality, (n_m, D) each, or scatter them into their slots (B, S, D)."""
        flat = torch.cat(list(tokens))
        return flat if self.packed else self.slots.place(flat)

    def take(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the tokens of each modality, (n_m, D) each, from what :meth:`place` returns."""
        flat = tokens if self.packed else self.slots.take(tokens)
        return dict(zip(self.counts, flat.split(list(self.counts.values())), strict=True))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Selection:
        """Move the selection to ``device``; ``non_blocking`` copies from pinned memory."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        if non_blocking and torch.device(device).type == "cuda":
            tensors = {name: t if t.is_cuda else t.pin_memory() for name, t in tensors.items()}
        moved: dict[str, Any] = {name: t.to(device, non_blocking=non_blocking) for name, t in tensors.items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class TokenSelection:
    """The tokens that the model uses of a batch, as chosen by :func:`select_tokens`."""

    encoder: Selection
    decoder: Selection

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenSelection:
        """Move both selections to ``device``, see :meth:`Selection.to`."""
        return TokenSelection(self.encoder.to(device, non_blocking), self.decoder.to(device, non_blocking))


def select_tokens(
    mod_dict: ModDict,
    encoder_modalities: Mapping[str, Mapping[str, Any]],
    decoder_modalities: Mapping[str, Mapping[str, Any]],
    num_encoder_tokens: int,
    num_decoder_tokens: int,
    generator: torch.Generator | None = None,
    pack: bool = False,
) -> TokenSelection:
    """Select the tokens of a batch that the model reads and predicts.

    Args:
        mod_dict: The batch; only its masks are read. Modalities that are not in it get no tokens.
        encoder_modalities, decoder_modalities: Maps each modality to its entry in the modality table, of which ``type``
            and ``id`` are read.
        num_encoder_tokens: Maximum number of inputs per sample. The first valid ones are selected, with the modalities
            in the order of ``mod_dict``.
        num_decoder_tokens: Maximum number of targets per sample. The first valid ones are selected, with the modalities
            in random order.
        generator: CPU generator for the random order; None uses PyTorch's global one.
        pack: Leave out the last slots if they are empty in every sample, and let linear layers compute only the rows of
            tokens if other slots are empty. The losses are the same, but shapes then differ between batches.
    """
    names = list(decoder_modalities)
    shuffled = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    targets = {name: _targets(mod_dict, name, decoder_modalities[name]["type"]) for name in shuffled}
    return TokenSelection(
        select_inputs(mod_dict, encoder_modalities, num_encoder_tokens, pack),
        _select(targets, decoder_modalities, num_decoder_tokens, pack),
    )


def select_inputs(
    mod_dict: ModDict,
    modalities: Mapping[str, Mapping[str, Any]],
    num_tokens: int | None = None,
    pack: bool = False,
) -> Selection:
    """Select only the inputs, like :func:`select_tokens`; all valid ones if ``num_tokens`` is None."""
    order = [*mod_dict, *modalities]
    inputs = {name: _inputs(mod_dict, name, modalities[name]["type"]) for name in sorted(modalities, key=order.index)}
    return _select(inputs, modalities, num_tokens, pack)


class _Candidates(NamedTuple):
    """All tokens of a modality that may be selected, (B, L) each."""

    valid: Tensor
    position: Tensor
    attention: Tensor


def _inputs(mod_dict: ModDict, name: str, modality_type: str) -> _Candidates:
    valid = _valid(mod_dict, name, "input_mask")
    return _Candidates(valid, _positions(valid, modality_type), torch.zeros_like(valid, dtype=torch.long))


def _targets(mod_dict: ModDict, name: str, modality_type: str) -> _Candidates:
    valid = _valid(mod_dict, name, "target_mask")
    position = _positions(valid, modality_type)
    attention = mod_dict[name]["decoder_attention_mask"] if name in mod_dict else torch.zeros_like(position)
    if modality_type == "img":
        return _Candidates(valid, position, attention)
    # A token of a sequence predicts the next one, so both must be valid.
    return _Candidates(valid[:, :-1] & valid[:, 1:], position[:, :-1], attention[:, :-1])


def _valid(mod_dict: ModDict, name: str, mask: str) -> Tensor:
    if name in mod_dict:
        return ~mod_dict[name][mask].bool()
    any_mask = next(iter(mod_dict.values()))["input_mask"]
    return any_mask.new_zeros((any_mask.shape[0], 0), dtype=torch.bool)


def _positions(valid: Tensor, modality_type: str) -> Tensor:
    """Return the positions, which count only valid tokens in a sequence. Those of invalid tokens are never read."""
    return (valid if modality_type != "img" else torch.ones_like(valid)).cumsum(1) - 1


def _select(
    candidates: Mapping[str, _Candidates],
    modalities: Mapping[str, Mapping[str, Any]],
    num_slots: int | None,
    pack: bool,
) -> Selection:
    """Assign slots to the first ``num_slots`` valid candidates of each sample, in the order of ``candidates``.

    The rows follow the order of ``modalities``, not that of the slots, so that every rank calls the modules in the same
    order.
    """
    valid = torch.cat([c.valid for c in candidates.values()], dim=1)
    used = valid.sum(1)
    if num_slots is None or pack:
        needed = max(int(used.max()), 1)  # attention needs at least one token, even if it is padding
        num_slots = needed if num_slots is None else min(num_slots, needed)
    # A sample without any token attends to its padding, which must then be computed.
    packed = pack and bool((used > 0).all()) and int(used.min()) < num_slots
    rank = (valid.cumsum(1) - 1).masked_fill(~valid, num_slots)
    ranks = dict(zip(candidates, rank.split([c.valid.shape[1] for c in candidates.values()], dim=1), strict=True))
    counts, groups = {}, []
    for name, modality in modalities.items():
        sample, index = (ranks[name] < num_slots).nonzero(as_tuple=True)
        position, attention = (t[sample, index].long() for t in candidates[name][1:])
        slot = sample * num_slots + ranks[name][sample, index]
        groups.append(torch.stack([sample, index, position, slot, torch.full_like(slot, modality["id"]), attention]))
        counts[name] = len(slot)
    sample, index, position, slot, modality_id, attention = torch.cat(groups, dim=1)
    empty = slot.new_zeros(len(valid) * num_slots)
    return Selection(
        counts,
        sample,
        index,
        position,
        slot,
        modality=(empty - 1).index_copy(0, slot, modality_id).view(-1, num_slots),
        attention=empty.index_copy(0, slot, attention).view(-1, num_slots),
        packed=packed,
    )
