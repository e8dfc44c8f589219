"""Content of a preview: augmented samples, their masks under each component of the mixture, and drawn budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.data_config import DatasetConfig
from fourm.data.masking import Masked, Masking
from fourm.data.modality_info import Modality
from fourm.data.modality_transforms import ScalarTransform, transforms_for
from fourm.data.raw_sample import BadSample, OpenFiles
from fourm.data.sample_dataset import build_dataset, build_masking, name_file_in_errors
from fourm.tools.preview.sequences import (
    INPUT,
    ROLES,
    TARGET,
    Annotation,
    Piece,
    PositionMasking,
    Reader,
    SequenceReader,
)
from fourm.utils.seeds import generator

Painter = Callable[[Modality, torch.Tensor], np.ndarray | None]
"""Draws a grid: modality and ids (L,) or pixels (C, H, W) → (H, W, 3) uint8."""


@dataclass(frozen=True)
class MaskedModality:
    """One modality of one sample, masked under one component.

    Attributes:
        inputs: Number of input tokens.
        targets: Number of target tokens.
        grid: Role of each token, (h, w): 0 unused, 1 input, 2 target. None for sequences and numbers.
        pieces: Tokens of a sequence in order, with its sentinels.
        annotations: Boxes, points, colours and values that the tokens encode.
    """

    inputs: int
    targets: int
    grid: np.ndarray | None = None
    pieces: tuple[Piece, ...] = ()
    annotations: tuple[Annotation, ...] = ()


@dataclass(frozen=True)
class Example:
    """One sample after augmentation.

    Attributes:
        key: Key of the sample.
        pictures: Modality → picture of its grid.
        main: Modality of the picture that boxes refer to.
    """

    key: str
    pictures: dict[str, np.ndarray]
    main: str | None


@dataclass(frozen=True)
class Component:
    """One component of the mixture; ``masking: transfer`` has one.

    Attributes:
        index: Index of the component, from 0.
        share: Share of the samples that are masked with it.
        masked_samples: For each example, modality → masked tokens.
        input_budgets: Modality → drawn input budgets, (draws,).
        target_budgets: Modality → drawn target budgets, (draws,).
    """

    index: int
    share: float
    masked_samples: list[dict[str, MaskedModality]]
    input_budgets: dict[str, np.ndarray]
    target_budgets: dict[str, np.ndarray]


@dataclass(frozen=True)
class Preview:
    """The preview of one data set."""

    dataset: DatasetConfig
    examples: list[Example]
    components: list[Component]


def preview(
    dataset: DatasetConfig,
    text_tokenizer: Tokenizer,
    paint: Painter,
    read: Reader,
    *,
    training: bool,
    samples: int,
    draws: int,
    seed: int,
) -> Preview:
    """Draw the content of a preview. All components get the same samples and crops; only the masks differ.

    Args:
        dataset: The data set.
        text_tokenizer: The text vocabulary.
        paint: Draws a grid.
        read: Parses a text.
        training: Whether to augment samples as in training.
        samples: Number of samples.
        draws: Number of budgets drawn per component.
        seed: Seed of samples, crops, masks and budgets.

    Raises:
        UserError: The data set cannot be read.
    """
    values = list(_transformed(dataset, text_tokenizer, training, samples, seed))
    examples = [
        Example(key, dict(_pictures(sample, dataset.modalities, paint)), dataset.main_augment_domain)
        for key, sample in values
    ]
    transfer = dataset.masking == "transfer"
    count = 1 if transfer else len(next(iter(dataset.modalities.values())).input_alphas)
    weights = np.array((not transfer and dataset.sampling_weights) or [1.0] * count)
    reader = SequenceReader(text_tokenizer, read)
    components = []
    for index in np.flatnonzero(weights).tolist():
        only = tuple(float(i == index) for i in range(count))
        masking = build_masking(replace(dataset, sampling_weights=only), text_tokenizer)
        position_masking = PositionMasking(masking)
        masked_samples = []
        for number, (_, sample) in enumerate(values):
            rng = generator(seed, "mask", index, number)
            masked = position_masking.apply(sample, masking.draw_budgets(rng, sample), rng)
            masked_samples.append(
                {
                    name: _describe(sample[name], entry, dataset.modalities[name], masking, reader)
                    for name, entry in masked.items()
                }
            )
        rng = generator(seed, "budgets", index)
        budgets = [masking.draw_budgets(rng) for _ in range(draws)]
        components.append(
            Component(
                index,
                float(weights[index] / weights.sum()),
                masked_samples,
                {name: np.array([b.input[name] for b in budgets]) for name in dataset.in_domains},
                {name: np.array([b.target[name] for b in budgets]) for name in dataset.out_domains},
            )
        )
    return Preview(dataset, examples, components)


def _transformed(
    config: DatasetConfig, text_tokenizer: Tokenizer, training: bool, samples: int, seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and transformed values of samples in the order of training; bad ones are skipped with a warning."""
    dataset = build_dataset(replace(config, wds_n_repeats=1), text_tokenizer, training=training)
    ledger, files = BadSampleLedger(config.name, config.max_bad_fraction), OpenFiles()
    order = dataset.draw(seed, 0, 0, 1, ledger)
    seen: set[str] = set()  # file and key, because keys may repeat in other files
    for number, sample in enumerate(order):
        if len(seen) == samples or number == 100 * samples:  # the data set may have fewer samples
            return
        where = sample.where("")
        if where in seen:
            continue
        try:
            with name_file_in_errors(sample):
                raw = dataset.present(sample, sample.values(files, keep_pixels=False))
                values = dataset.transform(raw, generator(seed, "crop", number))
        except BadSample as error:
            if not error.tolerated:
                ledger.warn(where, f"{error}; skipped")
            ledger.read(error.reason, error.tolerated)
            continue
        ledger.read()
        seen.add(where)
        yield where if config.type == "huggingface" else sample.key, values


def _pictures(
    sample: Mapping[str, Any], modalities: Mapping[str, Modality], paint: Painter
) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in sample.items():
        if modalities[name].type == "img":
            tensor = torch.as_tensor(np.ascontiguousarray(value))
            if modalities[name].is_pixels and tensor.ndim == 2:
                tensor = tensor[None]  # class ids have no channel dimension
            picture = paint(modalities[name], tensor)
            if picture is not None:
                yield name, picture


def _describe(value: Any, entry: Masked, modality: Modality, masking: Masking, read: SequenceReader) -> MaskedModality:
    inputs, targets = ~entry["input_mask"], ~entry["target_mask"]
    counts = int(inputs.sum()), int(targets.sum())
    if modality.type == "img":
        transform = transforms_for({modality.name: modality})[modality.name]
        if isinstance(transform, ScalarTransform):
            roles = tuple(role for role, count in zip(ROLES[1:], counts, strict=True) if count)
            return MaskedModality(
                *counts, annotations=(Annotation(value=f"{transform.decode(int(value.item())):.4g}", roles=roles),)
            )
        side = round(len(inputs) ** 0.5)
        width = side if side * side == len(inputs) else len(inputs)
        return MaskedModality(*counts, grid=(inputs * INPUT + targets * TARGET).astype(np.uint8).reshape(-1, width))
    ids = range(len(value))[: modality.max_tokens] if modality.type == "seq_emb" else masking.encode(modality, value)[0]
    return MaskedModality(*counts, None, *read(ids, entry, modality))
