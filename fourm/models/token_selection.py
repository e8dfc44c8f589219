"""Which tokens of a batch the model reads and predicts, decided from the masks alone (method section 3, 1 and 2).

A sample has some thousands of tokens, of which a few hundred are used. Selecting them before anything is embedded
makes memory and time independent of the others. The plan is made on the host, before the batch goes to the device: the
number of tokens of every modality is then known there, and the forward pass never waits for the device.

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
from fourm.models.modality_embedding import Rows


@dataclass(frozen=True)
class Selection:
    """The kept tokens of one side, grouped by modality.

    Attributes:
        counts: kept tokens of each modality in the whole batch, in the order of the rows.
        sample, index, position: (n,) each, see :class:`Rows`.
        slot: (n,) where each token goes, as index into the B·S slots.
        modality: (B, S) ``id`` of each slot's modality; −1 is padding.
        attention: (B, S) the gathered compressed decoder attention mask; zeros in the encoder.
    """

    counts: dict[str, int]
    sample: Tensor
    index: Tensor
    position: Tensor
    slot: Tensor
    modality: Tensor
    attention: Tensor

    @classmethod
    def everything(cls, name: str, batch_size: int, length: int, device: torch.device) -> Selection:
        """All tokens of a single modality."""
        slot = torch.arange(batch_size * length, device=device)
        index = slot % length
        blank = torch.zeros_like(slot).view(batch_size, length)
        return cls({name: len(slot)}, slot // length, index, index, slot, modality=blank, attention=blank)

    @property
    def padding(self) -> Tensor:
        """(B, S), True = padding."""
        return self.modality < 0

    def rows(self) -> dict[str, Rows]:
        """The rows of every modality."""
        parts = (part.split(list(self.counts.values())) for part in (self.sample, self.index, self.position))
        return {name: Rows(*rows) for name, *rows in zip(self.counts, *parts, strict=True)}

    def place(self, tokens: Sequence[Tensor]) -> Tensor:
        """Tokens of every modality, (n_m, D) each → their slots (B, S, D), zeros in the padding."""
        flat = torch.cat(list(tokens))
        slots = flat.new_zeros(self.modality.numel(), flat.shape[1])
        return slots.index_copy(0, self.slot, flat).view(*self.modality.shape, -1)

    def take(self, slots: Tensor) -> dict[str, Tensor]:
        """Slots (B, S, D) → those of every modality, (n_m, D) each."""
        flat = slots.flatten(0, 1).index_select(0, self.slot)
        return dict(zip(self.counts, flat.split(list(self.counts.values())), strict=True))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Selection:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "counts"}
        if non_blocking and torch.device(device).type == "cuda":
            tensors = {name: t if t.is_cuda else t.pin_memory() for name, t in tensors.items()}
        return replace(self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class TokenSelection:
    """What :func:`select_tokens` decides about a batch."""

    encoder: Selection
    decoder: Selection

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenSelection:
        """The plan on ``device``; ``non_blocking`` copies from pinned memory."""
        return TokenSelection(self.encoder.to(device, non_blocking), self.decoder.to(device, non_blocking))


def select_tokens(
    mod_dict: ModDict,
    encoder_modalities: Mapping[str, Mapping[str, Any]],
    decoder_modalities: Mapping[str, Mapping[str, Any]],
    num_encoder_tokens: int,
    num_decoder_tokens: int,
    generator: torch.Generator | None = None,
) -> TokenSelection:
    """Choose the tokens of a batch.

    Args:
        mod_dict: the batch; only its masks are read. Modalities that it lacks get no tokens.
        encoder_modalities, decoder_modalities: name → its entry of the modality table (``type`` and ``id`` are read).
        num_encoder_tokens: per sample, the first valid inputs are kept, modalities in the order of ``mod_dict``.
        num_decoder_tokens: per sample, the first valid targets are kept, modalities in random order.
        generator: of the random order, on the CPU; the global one if None.
    """
    names = list(decoder_modalities)
    shuffled = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    targets = {name: _targets(mod_dict, name, decoder_modalities[name]["type"]) for name in shuffled}
    return TokenSelection(
        select_inputs(mod_dict, encoder_modalities, num_encoder_tokens),
        _select(targets, decoder_modalities, num_decoder_tokens),
    )


def select_inputs(
    mod_dict: ModDict, modalities: Mapping[str, Mapping[str, Any]], num_tokens: int | None = None
) -> Selection:
    """The encoder's half of :func:`select_tokens`; without ``num_tokens``, every valid input is kept."""
    order = [*mod_dict, *modalities]
    inputs = {name: _inputs(mod_dict, name, modalities[name]["type"]) for name in sorted(modalities, key=order.index)}
    if num_tokens is None:
        valid = torch.cat([candidates.valid for candidates in inputs.values()], dim=1)
        num_tokens = max(int(valid.sum(1).max()), 1)  # of nothing at all, one padding token is left to attend to
    return _select(inputs, modalities, num_tokens)


class _Candidates(NamedTuple):
    """All tokens of a modality that might be kept, (B, L) each."""

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
    # A sequence's token predicts the next one: both must be valid.
    return _Candidates(valid[:, :-1] & valid[:, 1:], position[:, :-1], attention[:, :-1])


def _valid(mod_dict: ModDict, name: str, mask: str) -> Tensor:
    if name in mod_dict:
        return ~mod_dict[name][mask].bool()
    any_mask = next(iter(mod_dict.values()))["input_mask"]
    return any_mask.new_zeros((any_mask.shape[0], 0), dtype=torch.bool)


def _positions(valid: Tensor, modality_type: str) -> Tensor:
    """A sequence's positions count its valid tokens only; what they are elsewhere is never read."""
    return (valid if modality_type != "img" else torch.ones_like(valid)).cumsum(1) - 1


def _select(
    candidates: Mapping[str, _Candidates], modalities: Mapping[str, Mapping[str, Any]], num_slots: int
) -> Selection:
    """Give each sample's first ``num_slots`` valid candidates their slots, in the order of ``candidates``.

    The rows are ordered by ``modalities``, whatever the order of the slots: modules are called in the same order on
    every rank.
    """
    valid = torch.cat([c.valid for c in candidates.values()], dim=1)
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
        counts, sample, index, position, slot,
        modality=(empty - 1).index_copy(0, slot, modality_id).view(-1, num_slots),
        attention=empty.index_copy(0, slot, attention).view(-1, num_slots),
    )  # fmt: skip
