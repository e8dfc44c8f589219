"""One step of generation: a decoding scheme applied to weighted conditions.

A condition is a set of inputs. All conditions run through the model in one batch, and the decoder outputs are summed
with the weights of their conditions. A single condition of weight 1 is generation without guidance. Guidance with scale
s uses two conditions, the inputs without conditioning with weight 1 − s and with conditioning with weight s. Several
weighted conditions work alike.

Shapes: B batch, C conditions, N encoder tokens, K tokens decoded in a step, L tokens of the target, D model width,
V vocabulary size. In dimensions of C·B, the batch index changes fastest. Masks: True = masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fourm.data.collate import ModDict
from fourm.generation.batch_entries import merged
from fourm.generation.kv_cache import DecoderCache
from fourm.generation.token_sampling import SampleNoise, TokenSampler
from fourm.models.fm_utils import Slots
from fourm.models.fourm import FourM
from fourm.models.modality_embedding import Rows
from fourm.models.token_selection import select_inputs
from fourm.utils.tokenizer.special_tokens import PAD_ID

Entry = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What the decoder attends to.

    Attributes:
        tokens: (C·B, N, D), or packed, (T, D).
        padding: (C·B, N), True = padding; None if there is none.
        slots: Slots of packed tokens.
    """

    tokens: Tensor
    padding: Tensor | None
    slots: Slots | None

    def unpacked(self) -> Tensor:
        """Return the tokens, (C·B, N, D)."""
        return self.tokens if self.slots is None else self.slots.place(self.tokens)


class Conditions:
    """The embedded inputs of all conditions, to which decoded tokens can be appended.

    Guidance removes some inputs, so that conditions differ in length. The encoder therefore runs on packed tokens, see
    :class:`fourm.models.fm_utils.Slots`, unless the model is compiled, which needs shapes that rarely change.

    Args:
        model: The model.
        conditions: Weight and inputs of each condition.
    """

    def __init__(self, model: FourM, conditions: Sequence[tuple[float, ModDict]]):
        self.model = model
        modalities = {name: model.modality_info[name] for name in model.encoder_embeddings}
        embedded = [model.embed_encoder(batch, select_inputs(batch, modalities)) for _, batch in conditions]
        x, emb, padding = zip(*embedded, strict=True)
        length = max(part.shape[1] for part in padding)
        self._x, self._emb = (
            torch.cat([F.pad(part, (0, 0, 0, length - part.shape[1])) for part in parts]) for parts in (x, emb)
        )
        self._padding = torch.cat([F.pad(part, (0, length - part.shape[1]), value=True) for part in padding])
        self._context: Context | None = None
        self.weights = torch.tensor([weight for weight, _ in conditions], device=self._x.device)

    def context(self) -> Context:
        """Return what the decoder attends to. It is computed once for the same inputs."""
        if self._context is None:
            x, emb, slots = self._x + self._emb, self._emb, None
            masked = self._padding.clone()
            masked[:, 0] &= ~masked.all(1)  # queries without inputs read one token of padding
            padding = masked if masked.any() else None
            if padding is not None and not any(block._compiled_call_impl for block in self.model.encoder):
                lengths = None if padding.is_cuda else tuple((~padding).sum(1).tolist())
                index = (~padding).flatten().nonzero().squeeze(1)
                slots = Slots(index, (padding.shape[0], padding.shape[1]), lengths)
                x, emb = slots.take(x), slots.take(emb)
            tokens = self.model.context(self.model.encode(x, padding, slots), emb)
            self._context = Context(tokens, padding, slots)
        return self._context

    def decode(self, domain: str, position: Tensor, valid: Tensor) -> Tensor:
        """Run the decoder on an image's positions (B, K), of which some are valid, and return (B, K, D)."""
        y, context = self.embed_target(domain, position, position), self.context()
        mask = None if valid.all() else ~valid.repeat(len(self.weights), 1)
        y = self.model.decode(y, context.tokens, context.padding, mask, context_slots=context.slots)
        return self.combine(y)

    def append(self, domain: str, ids: Tensor, position: Tensor, valid: Tensor) -> None:
        """Add tokens of an image, (B, K) each, to the inputs of all conditions."""
        if domain in self.model.encoder_embeddings:
            x, emb = self.model.encoder_embeddings[domain](ids, _rows(position))
            parts = (part.view(*ids.shape, -1).repeat(len(self.weights), 1, 1) for part in (x, emb))
            self._x, self._emb = (torch.cat(pair, 1) for pair in zip((self._x, self._emb), parts, strict=True))
            self._padding = torch.cat([self._padding, ~valid.repeat(len(self.weights), 1)], 1)
            self._context = None

    def embed_target(self, domain: str, ids: Tensor, position: Tensor) -> Tensor:
        """Embed decoder tokens at ``position``, (B, K) → (C·B, K, D)."""
        x, emb = self.model.decoder_embeddings[domain](ids, _rows(position), self.model.mask_token)
        return (x + emb).view(*position.shape, -1).repeat(len(self.weights), 1, 1)

    def combine(self, y: Tensor) -> Tensor:
        """Sum the decoder output (C·B, …) over the conditions with their weights, to (B, …).

        Logits are linear in the decoder output, so summing the output is equivalent to summing the logits, and much
        cheaper. The weights add up to 1, so a single condition needs no sum. The sum is computed in float32 and
        returned in the precision of the model, whose weights may have been cast.
        """
        if len(self.weights) == 1:
            return y
        return torch.tensordot(self.weights, y.float().unflatten(0, (len(self.weights), -1)), dims=1).to(y.dtype)


def _rows(position: Tensor) -> Rows:
    """Return rows for all tokens (B, K) at ``position``."""
    batch, count = position.shape
    index = torch.arange(batch * count, device=position.device)
    return Rows(index // max(count, 1), index % max(count, 1), position.flatten())


@dataclass(frozen=True)
class StepOptions:
    """Options of one decoding step.

    Attributes:
        domain: The target modality.
        num_tokens: Number of tokens to decode, for sequences the maximum; None fills the available room.
        temperature: See :class:`TokenSampler`.
        sampler: Draws the tokens.
        noise: Random numbers of each sample.
        sentinels: Ids of the sentinels of a sequence.
        max_tokens: Maximum number of tokens of a sequence, for which the model has positions.
        order: When each position of an image is decoded by the Halton scheme, (B, L).
        cuda_graphs: Decode sequences in steps of the same shapes, which a GPU replays as a CUDA graph.
    """

    domain: str
    num_tokens: int | None
    temperature: float
    sampler: TokenSampler
    noise: SampleNoise
    sentinels: list[int]
    max_tokens: int
    order: Tensor | None = None
    cuda_graphs: bool = False


def decode_image(
    conditions: Conditions, entry: Entry, step: StepOptions, order: Callable[[StepOptions, Tensor], Any] | None
) -> Entry:
    """Decode several tokens of an image at once.

    Args:
        conditions: The inputs, to which the decoded tokens are appended.
        entry: The target so far.
        step: Options of the step.
        order: Returns when each position is decoded, (B, L), from the step and random numbers (B, L); the first
            ``num_tokens`` remaining ones are decoded in this step. None is MaskGIT: all remaining positions are
            decoded, and the ``num_tokens`` most confident ones kept.

    Returns:
        The target with the decoded tokens.
    """
    remaining = ~entry["target_mask"].bool() & entry["input_mask"].bool()
    random, uniform = step.noise.uniform(2, remaining.shape[1]).to(remaining.device).unbind(1)
    position, valid = _true_columns(remaining, order(step, random) if order else torch.zeros_like(random))
    count = step.num_tokens or 0
    if order:
        position, valid = position[:, :count], valid[:, :count]
    if count == 0 or position.shape[1] == 0:
        return entry
    with torch.inference_mode():
        position, ids, kept = _decode_positions(conditions, position, valid, step, uniform)
        if not order:
            position, ids, kept = position[:, :count], ids[:, :count], kept[:, :count]
        conditions.append(step.domain, ids, position, kept)
    sample, column = kept.nonzero(as_tuple=True)
    index, shape = (sample, position[sample, column]), entry["tensor"].shape
    return {
        **entry,
        "tensor": _put(entry["tensor"].flatten(1).long(), index, ids[sample, column]).view(shape),
        "input_mask": _put(entry["input_mask"], index, False),
        "target_mask": _put(entry["target_mask"], index, True),
    }


def _decode_positions(
    conditions: Conditions, position: Tensor, valid: Tensor, step: StepOptions, uniform: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode the positions (B, K) and return positions, ids and validity, sorted by decreasing confidence."""
    y = conditions.decode(step.domain, position, valid)
    logits = conditions.model.decoder_embeddings[step.domain].to_logits(y[valid])
    tokens, confidence = step.sampler(logits, step.temperature, uniform.gather(1, position)[valid])
    ids = torch.zeros_like(position).masked_scatter(valid, tokens)
    ranks = confidence.new_full(valid.shape, -1.0).masked_scatter(valid, confidence).argsort(1, descending=True)
    return position.gather(1, ranks), ids.gather(1, ranks), valid.gather(1, ranks)


def _true_columns(mask: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return the True columns of a mask (B, L), sorted by ``order``, and which of them are valid, (B, K) each."""
    column = order.masked_fill(~mask, 2.0).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return column, mask.gather(1, column)


def _put(tensor: Tensor, index: tuple[Tensor, Tensor], value: Any) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


def decode_sequence(conditions: Conditions, entry: Entry, step: StepOptions) -> Entry:
    """Decode a sequence autoregressively, from the first token of the target to its end token, or until it is full.

    Returns:
        The target as an input, with the generated spans in place of its sentinels.
    """
    tensor, first = entry["tensor"], step.sentinels[0]
    inputs = [row[~mask].tolist() or [first] for row, mask in zip(tensor, entry["input_mask"].bool(), strict=True)]
    targets = [row[~mask].tolist() for row, mask in zip(tensor, entry["target_mask"].bool(), strict=True)]
    starts = [row[0] if row and row[0] != PAD_ID else first for row in targets]
    ends = [_end_token(*rows, step.sentinels) for rows in zip(inputs, targets, strict=True)]
    max_tokens = min(step.num_tokens or step.max_tokens, step.max_tokens)
    # As in the published code, a row of L target positions, the first of them a start token, gives L new tokens.
    max_lengths = [1 + min(len(row), max_tokens) for row in targets]
    with torch.inference_mode():
        generate = _generate_in_same_shapes if step.cuda_graphs else _generate_ids
        generated = generate(conditions, step, starts, ends, max_lengths)
    return merged(inputs, generated, step.sentinels, tensor.device)


def _end_token(inputs: list[int], targets: list[int], sentinels: list[int]) -> int:
    """Return the token that ends the sequence: the one that follows the padding of its row, or the next sentinel."""
    if len(targets) > 1 and targets[-2] == PAD_ID and targets[-1] != PAD_ID:
        return targets[-1]
    return next((sentinel for sentinel in sentinels if sentinel not in inputs), sentinels[-1])


def _generate_ids(
    conditions: Conditions, step: StepOptions, starts: list[int], ends: list[int], max_lengths: list[int]
) -> list[list[int]]:
    """Generate the ids of each sequence, from its start to its end token. Finished sequences leave the batch.

    Args:
        conditions: The inputs.
        step: Options of the step.
        starts, ends: First and last token of each sequence.
        max_lengths: Maximum number of tokens of each sequence, including the first one.
    """
    model, context = conditions.model, conditions.context()
    device, copies = context.tokens.device, len(conditions.weights)
    cache = DecoderCache(model, context.unpacked(), context.padding, max([*max_lengths, 2]) - 1)
    to_logits = model.decoder_embeddings[step.domain].to_logits
    uniform = step.noise.uniform(step.max_tokens).to(device)
    sequences = [[start] for start in starts]
    active = list(range(len(sequences)))
    for index in range(max(max_lengths)):
        unfinished = [
            i for i in active if len(sequences[i]) < max_lengths[i] and (index == 0 or sequences[i][-1] != ends[i])
        ]
        if not unfinished:
            break
        if unfinished != active:
            kept = torch.tensor([active.index(i) for i in unfinished], device=device)
            cache.keep((kept + len(active) * torch.arange(copies, device=device)[:, None]).flatten())
            active = unfinished
        ids = torch.tensor([sequences[i][-1:] for i in active], device=device)
        y = cache.decode(conditions.embed_target(step.domain, ids, torch.full_like(ids, index)))
        tokens, _ = step.sampler(to_logits(conditions.combine(y)[:, 0]), step.temperature, uniform[active, index])
        for i, token in zip(active, tokens.tolist(), strict=True):
            sequences[i].append(token)
    return sequences


def _generate_in_same_shapes(
    conditions: Conditions, step: StepOptions, starts: list[int], ends: list[int], max_lengths: list[int]
) -> list[list[int]]:
    """Generate the ids like :func:`_generate_ids`, in steps of the same shapes that do not wait for the device.

    Finished sequences stay in the batch until all are finished, and what is generated after their end is dropped. On a
    GPU, the steps after the first ones are replays of a CUDA graph.
    """
    model, context = conditions.model, conditions.context()
    device, length = context.tokens.device, max([*max_lengths, 2])
    ids = torch.full((len(starts), length), PAD_ID, device=device)
    ids[:, 0] = torch.tensor(starts, device=device)
    position = torch.zeros(1, dtype=torch.long, device=device)
    cache = DecoderCache(model, context.unpacked(), context.padding, length - 1, position)
    to_logits = model.decoder_embeddings[step.domain].to_logits
    uniform = step.noise.uniform(step.max_tokens).to(device)

    def advance() -> None:
        last = ids.index_select(1, position)
        y = cache.decode(conditions.embed_target(step.domain, last, position.expand_as(last)))
        logits, numbers = to_logits(conditions.combine(y)[:, 0]), uniform.index_select(1, position)[:, 0]
        ids.index_copy_(1, position + 1, step.sampler(logits, step.temperature, numbers)[0][:, None])
        position.add_(1)

    def sequences(known: int) -> list[list[int]]:
        rows = [row[: min(known, limit)] for row, limit in zip(ids.tolist(), max_lengths, strict=True)]
        return [_through(row, end) for row, end in zip(rows, ends, strict=True)]

    run: Callable[[], None] = advance
    for index in range(max(max_lengths) - 1):
        if index == _WARM_UP and ids.is_cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                advance()
            run = graph.replay
        run()
        known = index + 2
        if known % _CHECK_EVERY == 0:
            rows = zip(sequences(known), ends, max_lengths, strict=True)
            if all(row[-1] == end or len(row) == limit for row, end, limit in rows):
                break
    return sequences(length)


_WARM_UP = 2  # steps before a CUDA graph is captured
_CHECK_EVERY = 16  # steps after which the host waits for the device to see whether all sequences are finished


def _through(row: list[int], end: int) -> list[int]:
    """Return the ids up to the first ``end`` that is not the first id."""
    return row[: row.index(end, 1) + 1] if end in row[1:] else row


SCHEMES: Mapping[str, Callable[[Conditions, Entry, StepOptions], Entry]] = {
    "halton": partial(decode_image, order=lambda step, random: step.order),
    "maskgit": partial(decode_image, order=None),
    "roar": partial(decode_image, order=lambda step, random: random),
    "autoregressive": decode_sequence,
}
