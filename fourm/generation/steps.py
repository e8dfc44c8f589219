"""One step of generation: a decoding scheme applied to weighted conditions (method section 8).

A condition is a set of inputs. All conditions go through the model in one batch, and what the decoder says under each is
added up by weight: one condition of weight 1 is plain generation; inputs without their conditioning of weight 1 − s and
with it of weight s are guidance by s; several weighted conditions are the same with more rows.

Shapes: B batch, C conditions, N encoder tokens, K tokens decoded in a step, L tokens of the target, D model width,
V vocabulary. Rows of C·B run through the batch first. Masks: True = masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourm.data.collate import ModDict
from fourm.generation.batch_entries import merged
from fourm.generation.kv_cache import DecoderCache
from fourm.generation.token_sampling import SampleNoise, TokenSampler
from fourm.models.fm import FourM
from fourm.models.modality_embedding import Rows
from fourm.models.token_selection import select_inputs
from fourm.utils.tokenizer.special_tokens import PAD_ID

Entry = dict[str, Any]


class Conditions:
    """The embedded inputs of all conditions, to which decoded tokens are added.

    Args:
        model: the model.
        conditions: weight and inputs of each.
    """

    def __init__(self, model: FourM, conditions: Sequence[tuple[float, ModDict]]):
        self.model = model
        modalities = {name: model.modality_info[name] for name in model.encoder_embeddings}
        embedded = [model.embed_encoder(batch, select_inputs(batch, modalities)) for _, batch in conditions]
        most = max(padding.shape[1] for *_, padding in embedded)
        x, emb, padding = zip(*embedded, strict=True)
        self._x, self._emb = (
            torch.cat([F.pad(part, (0, 0, 0, most - part.shape[1])) for part in parts]) for parts in (x, emb)
        )
        self._padding = torch.cat([F.pad(part, (0, most - part.shape[1]), value=True) for part in padding])
        self.weights = torch.tensor([weight for weight, _ in conditions], device=self._x.device)

    def context(self) -> tuple[Tensor, Tensor]:
        """What the decoder attends to, (C·B, N, D), and its padding."""
        return self.model.context(self.model.encode(self._x + self._emb, self._padding), self._emb), self._padding

    def append(self, domain: str, ids: Tensor, position: Tensor, valid: Tensor) -> None:
        """Let tokens of an image, (B, K) each, be inputs from now on."""
        if domain in self.model.encoder_embeddings:
            x, emb = self.model.encoder_embeddings[domain](ids, _rows(position))
            parts = (part.view(*ids.shape, -1).repeat(len(self.weights), 1, 1) for part in (x, emb))
            self._x, self._emb = (torch.cat(pair, 1) for pair in zip((self._x, self._emb), parts, strict=True))
            self._padding = torch.cat([self._padding, ~valid.repeat(len(self.weights), 1)], 1)

    def embed_target(self, domain: str, ids: Tensor, position: Tensor) -> Tensor:
        """Decoder tokens at ``position`` (B, K) → (C·B, K, D)."""
        x, emb = self.model.decoder_embeddings[domain](ids, _rows(position), self.model.mask_token)
        return (x + emb).view(*position.shape, -1).repeat(len(self.weights), 1, 1)

    def combine(self, y: Tensor) -> Tensor:
        """Decoder output (C·B, …) → the weighted sum over the conditions (B, …).

        Logits are linear in it, so that this sum and that of the logits say the same, at a fraction of the cost. The
        weights add up to 1, so there is nothing to do for a single condition. What is added up in float32 goes on in the
        precision of the model, whose weights may have been cast.
        """
        if len(self.weights) == 1:
            return y
        return torch.tensordot(self.weights, y.float().unflatten(0, (len(self.weights), -1)), dims=1).to(y.dtype)


def _rows(position: Tensor) -> Rows:
    """All of (B, K), at ``position``."""
    batch, count = position.shape
    index = torch.arange(batch * count, device=position.device)
    return Rows(index // max(count, 1), index % max(count, 1), position.flatten())


@dataclass(frozen=True)
class StepOptions:
    """What a scheme is told about a step.

    Attributes:
        domain: the target.
        num_tokens: how many tokens to decode; of a sequence the most, None = as many as there is room for.
        temperature: see :class:`TokenSampler`.
        sampler: draws the tokens.
        noise: of each sample.
        sentinels: of a sequence.
        most_tokens: the model has positions for so many tokens of a sequence.
    """

    domain: str
    num_tokens: int | None
    temperature: float
    sampler: TokenSampler
    noise: SampleNoise
    sentinels: list[int]
    most_tokens: int


def decode_image(conditions: Conditions, entry: Entry, step: StepOptions, random_order: bool) -> Entry:
    """MaskGIT and ROAR: some of the remaining positions at once.

    Args:
        conditions: get the decoded tokens as inputs.
        entry: the target so far.
        random_order: decode ``num_tokens`` positions, chosen at random (ROAR), or all that remain, of which the
            ``num_tokens`` most confident ones are kept (MaskGIT).

    Returns:
        The target with more tokens known.
    """
    remaining = ~entry["target_mask"].bool() & entry["input_mask"].bool()
    order, luck = step.noise.uniform(2, remaining.shape[1]).to(remaining.device).unbind(1)
    position, valid = _first_of(remaining, order if random_order else torch.zeros_like(order))
    count = step.num_tokens or 0
    if random_order:
        position, valid = position[:, :count], valid[:, :count]
    if position.shape[1] == 0:
        return entry
    with torch.inference_mode():
        position, ids, kept = _decode_positions(conditions, position, valid, step, luck)
        if not random_order:
            position, ids, kept = position[:, :count], ids[:, :count], kept[:, :count]
        conditions.append(step.domain, ids, position, kept)
    sample, column = kept.nonzero(as_tuple=True)
    where, shape = (sample, position[sample, column]), entry["tensor"].shape
    return {
        **entry,
        "tensor": _put(entry["tensor"].flatten(1).long(), where, ids[sample, column]).view(shape),
        "input_mask": _put(entry["input_mask"], where, False),
        "target_mask": _put(entry["target_mask"], where, True),
    }


def _decode_positions(
    conditions: Conditions, position: Tensor, valid: Tensor, step: StepOptions, luck: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (B, K) → positions, ids and validity, the most confident ones first."""
    model = conditions.model
    y = conditions.embed_target(step.domain, position, position)
    y = model.decode(y, *conditions.context(), ~valid.repeat(len(conditions.weights), 1))
    logits = model.decoder_embeddings[step.domain].to_logits(conditions.combine(y)[valid])
    found, confidence = step.sampler(logits, step.temperature, luck.gather(1, position)[valid])
    ids = torch.zeros_like(position).masked_scatter(valid, found)
    ranks = confidence.new_full(valid.shape, -1.0).masked_scatter(valid, confidence).argsort(1, descending=True)
    return position.gather(1, ranks), ids.gather(1, ranks), valid.gather(1, ranks)


def _first_of(chosen: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of a mask (B, L) that are True, by ``order``, and which of them are none → two of (B, K)."""
    column = order.masked_fill(~chosen, 2.0).argsort(dim=1, stable=True)[:, : int(chosen.sum(1).max())]
    return column, chosen.gather(1, column)


def _put(tensor: Tensor, where: tuple[Tensor, Tensor], value: Any) -> Tensor:
    changed = tensor.clone()
    changed[where] = value
    return changed


def decode_sequence(conditions: Conditions, entry: Entry, step: StepOptions) -> Entry:
    """Autoregressive: from the first token of the target until its end token, or no room is left.

    Returns:
        The target as an input, what was written in the places of its sentinels.
    """
    tensor, first = entry["tensor"], step.sentinels[0]
    inputs = [row[~mask].tolist() or [first] for row, mask in zip(tensor, entry["input_mask"].bool(), strict=True)]
    targets = [row[~mask].tolist() for row, mask in zip(tensor, entry["target_mask"].bool(), strict=True)]
    starts = [row[0] if row and row[0] != PAD_ID else first for row in targets]
    ends = [_end_token(*rows, step.sentinels) for rows in zip(inputs, targets, strict=True)]
    most = min(step.num_tokens or step.most_tokens, step.most_tokens)
    rooms = [min(len(row), 1 + most) for row in targets]
    with torch.inference_mode():
        written = _write(conditions, step, starts, ends, rooms)
    return merged(inputs, written, step.sentinels, tensor.device)


def _end_token(inputs: list[int], targets: list[int], sentinels: list[int]) -> int:
    """What ends the writing of a sample: the token that the row asks for, after its room, or the next sentinel."""
    if len(targets) > 1 and targets[-2] == PAD_ID != targets[-1]:
        return targets[-1]
    return next((mark for mark in sentinels if mark not in inputs), sentinels[-1])


def _write(
    conditions: Conditions, step: StepOptions, starts: list[int], ends: list[int], rooms: list[int]
) -> list[list[int]]:
    """The sequences, each from its start to its end token; what has ended leaves the batch.

    Args:
        starts, ends: first and last token of each sequence.
        rooms: most tokens of each, the first one included.
    """
    model, context = conditions.model, conditions.context()
    device, copies = context[0].device, len(conditions.weights)
    cache = DecoderCache(model, *context, max([*rooms, 2]) - 1)
    to_logits = _by_columns(model.decoder_embeddings[step.domain].to_logits)
    luck = step.noise.uniform(step.most_tokens).to(device)
    written = [[start] for start in starts]
    alive = list(range(len(written)))
    for index in range(max(rooms)):
        going = [i for i in alive if len(written[i]) < rooms[i] and (index == 0 or written[i][-1] != ends[i])]
        if not going:
            break
        if going != alive:
            kept = torch.tensor([alive.index(i) for i in going], device=device)
            cache.keep((kept + len(alive) * torch.arange(copies, device=device)[:, None]).flatten())
            alive = going
        ids = torch.tensor([written[i][-1:] for i in alive], device=device)
        y = cache.decode(conditions.embed_target(step.domain, ids, torch.full_like(ids, index)))
        found, _ = step.sampler(to_logits(conditions.combine(y)[:, 0]), step.temperature, luck[alive, index])
        for i, token in zip(alive, found.tolist(), strict=True):
            written[i].append(token)
    return written


def _by_columns(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A linear map without bias for one or two rows at a time.

    A CPU then spends all its time on reading the matrix, which is more than twice as fast in this order.
    """
    if linear.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return linear
    columns = linear.weight.t().contiguous()
    return lambda x: x @ columns


SCHEMES: Mapping[str, Callable[[Conditions, Entry, StepOptions], Entry]] = {
    "maskgit": partial(decode_image, random_order=False),
    "roar": partial(decode_image, random_order=True),
    "autoregressive": decode_sequence,
}
