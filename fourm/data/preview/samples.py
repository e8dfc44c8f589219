"""What a preview shows: samples after augmentation, their masks under each component of the mixture, and its budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.data_config import DatasetConfig
from fourm.data.masking import Masked
from fourm.data.modality_info import Modality
from fourm.data.raw_sample import BadSample, OpenFiles
from fourm.data.unified_datasets import build_dataset, build_masking, errors_name_the_file
from fourm.utils.seeds import generator
from fourm.utils.tokenizer import TextEncoder
from fourm.utils.tokenizer.special_tokens import EOS, EOS_ID, sentinel_id

Painter = Callable[[Modality, torch.Tensor], np.ndarray | None]
"""What a grid looks like: modality and ids (L,) or pixels (C, H, W) → (H, W, 3) uint8."""


class Piece(NamedTuple):
    """A token of a sequence; ``role``: input, target, mark (a sentinel), or unused (tokens that are neither)."""

    text: str
    role: str


@dataclass(frozen=True)
class Shown:
    """One modality of one sample under one component.

    Attributes:
        inputs, targets: how many tokens are.
        grid: 0 unused, 1 input, 2 target, (h, w); None for sequences.
        pieces: of a sequence, in its order as far as the sentinels give it.
    """

    inputs: int
    targets: int
    grid: np.ndarray | None = None
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Example:
    """One sample after augmentation: its key, and the pictures of its grids."""

    key: str
    pictures: dict[str, np.ndarray]


@dataclass(frozen=True)
class Component:
    """One component of the mixture; ``masking: transfer`` has one.

    Attributes:
        index: counts from 0.
        share: of the samples that get it.
        shown: for each example, modality → tokens.
        input_budgets, target_budgets: modality → budgets that were drawn, (draws,).
    """

    index: int
    share: float
    shown: list[dict[str, Shown]]
    input_budgets: dict[str, np.ndarray]
    target_budgets: dict[str, np.ndarray]


@dataclass(frozen=True)
class Preview:
    """One data set."""

    dataset: DatasetConfig
    examples: list[Example]
    components: list[Component]


def preview(
    dataset: DatasetConfig, text_tokenizer: Tokenizer, paint: Painter, *, training: bool, samples: int, draws: int, seed: int
) -> Preview:  # fmt: skip
    """Draw what is to be shown. Every component gets the same samples with the same crops; only the masks differ.

    Args:
        samples: how many.
        draws: of budgets, for each component.

    Raises:
        UserError: the data set cannot be read.
    """
    values = list(_transformed(dataset, text_tokenizer, training, samples, seed))
    examples = [
        Example(key, dict(_pictures(sample, dataset.modalities, paint))) for key, sample in values
    ]  # fmt: skip
    transfer = dataset.masking == "transfer"
    count = 1 if transfer else len(next(iter(dataset.modalities.values())).input_alphas)
    weights = np.array((not transfer and dataset.sampling_weights) or [1.0] * count)
    sequences = _SequenceReader(text_tokenizer)
    components = []
    for index in np.flatnonzero(weights).tolist():
        only = tuple(float(i == index) for i in range(count))
        masking = build_masking(replace(dataset, sampling_weights=only), text_tokenizer)
        masked = [masking(sample, generator(seed, "mask", index, number)) for number, (_, sample) in enumerate(values)]
        rng = generator(seed, "budgets", index)
        budgets = [masking.draw_budgets(rng) for _ in range(draws)]
        components.append(
            Component(
                index,
                float(weights[index] / weights.sum()),
                [
                    {name: _shown(entry, dataset.modalities[name], sequences) for name, entry in m.items()}
                    for m in masked
                ],
                {name: np.array([b.input[name] for b in budgets]) for name in dataset.in_domains},
                {name: np.array([b.target[name] for b in budgets]) for name in dataset.out_domains},
            )
        )
    return Preview(dataset, examples, components)


def _transformed(
    config: DatasetConfig, text_tokenizer: Tokenizer, training: bool, samples: int, seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and transformed values of samples, in the order of training; bad ones are skipped with a warning."""
    dataset = build_dataset(replace(config, wds_n_repeats=1), text_tokenizer, training=training)
    ledger, files = BadSampleLedger(config.name, config.max_bad_fraction), OpenFiles()
    order = dataset.draw(seed, 0, 0, 1, ledger)
    found: set[str] = set()
    for number, sample in enumerate(order):
        if len(found) == samples or number == 100 * samples:
            return  # a data set may have fewer
        if sample.key in found:
            continue
        try:
            with errors_name_the_file(sample):
                values = dataset.transform(sample.values(files, keep_pixels=False), generator(seed, "crop", number))
        except BadSample as error:
            if not error.tolerated:
                ledger.warn(sample.key, f"{error}; skipped")
            ledger.read(error.reason, error.tolerated)
            continue
        ledger.read()
        found.add(sample.key)
        yield sample.key, values


def _pictures(
    sample: Mapping[str, Any], modalities: Mapping[str, Modality], paint: Painter
) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in sample.items():
        if modalities[name].type == "img":
            tensor = torch.as_tensor(np.ascontiguousarray(value))
            if modalities[name].is_pixels and tensor.ndim == 2:
                tensor = tensor[None]  # class ids have no axis of channels
            picture = paint(modalities[name], tensor)
            if picture is not None:
                yield name, picture


class _SequenceReader:
    """Ids of sequences → their words."""

    def __init__(self, text_tokenizer: Tokenizer):
        self._tokenizer, self._sentinels = text_tokenizer, set(TextEncoder(text_tokenizer).sentinels)

    def sentinels(self, modality: Modality) -> set[int]:
        if modality.type == "seq":
            return self._sentinels
        return set(range(sentinel_id(1), modality.vocab_offset))

    def word(self, index: int, modality: Modality) -> str:
        if modality.type == "seq":
            return self._tokenizer.id_to_token(index) or "?"
        return EOS if index == EOS_ID < modality.vocab_offset else str(index - modality.vocab_offset)


def _shown(entry: Masked, modality: Modality, sequences: _SequenceReader) -> Shown:
    inputs, targets = ~entry["input_mask"], ~entry["target_mask"]
    counts = int(inputs.sum()), int(targets.sum())
    if modality.type == "img":
        side = round(len(inputs) ** 0.5)
        width = side if side * side == len(inputs) else len(inputs)
        return Shown(*counts, grid=(inputs + 2 * targets).astype(np.uint8).reshape(-1, width))
    if modality.type == "seq_emb":
        return Shown(*counts)
    ids = entry["tensor"]
    return Shown(*counts, pieces=tuple(_pieces(ids[inputs].tolist(), ids[targets].tolist(), modality, sequences)))


def _pieces(inputs: list[int], targets: list[int], modality: Modality, sequences: _SequenceReader) -> Iterator[Piece]:
    """The sequence put together again: behind each sentinel of the input its span of the target."""
    marks = sequences.sentinels(modality)
    loose: list[int] = []
    spans: dict[int, list[int]] = {}
    for index in targets:
        if index in marks:
            spans[index] = []
        else:
            (spans[next(reversed(spans))] if spans else loose).append(index)
    for index in inputs:
        if index not in marks:
            yield Piece(sequences.word(index, modality), "input")
            continue
        yield Piece(sequences.word(index, modality), "mark")
        if index in spans:
            yield from (Piece(sequences.word(i, modality), "target") for i in spans.pop(index))
        else:
            yield Piece("…", "unused")
    for mark, span in spans.items():  # without input, or the closing sentinel
        yield Piece(sequences.word(mark, modality), "mark")
        yield from (Piece(sequences.word(i, modality), "target") for i in span)
    yield from (Piece(sequences.word(i, modality), "target") for i in loose)
