"""A data set whose samples are read, transformed and masked; ``unified_datasets.py`` makes batches of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.collate import MaskedSample
from fourm.data.data_config import DatasetConfig, build_sample_transform
from fourm.data.folders import Folders
from fourm.data.layout import wanted_names
from fourm.data.masking import Masking, TransferMasking, UnifiedMasking
from fourm.data.modality_info import Modality
from fourm.data.modality_transforms import PixelTransform, UnifiedDataTransform
from fourm.data.presence import Presence
from fourm.data.raw_sample import BadSample, OpenFiles, RawSample
from fourm.data.records import Records
from fourm.data.shards import Shards
from fourm.utils.errors import DataError, UnreadableValue, UserError
from fourm.utils.seeds import generator


class Source(Protocol):
    """The source of a data set's samples: :class:`Shards`, :class:`Folders` or :class:`Records`."""

    def draw(self, key: tuple, stream: int, num_streams: int, ledger: BadSampleLedger) -> Iterator[RawSample]: ...

    def all(self, ledger: BadSampleLedger) -> Sequence[RawSample]: ...


@dataclass
class SampleDataset:
    """A data set: its samples, their order, and the steps from a sample to model input.

    Attributes:
        name: Key of the data set in the data YAML.
        source: Source of the samples.
        modalities: The modalities of the data set by name.
        transform: Aligned transform of a sample.
        masking: Masking of a transformed sample.
        shuffle_buffer: Number of references that are shuffled before the repeats (``wds_shuffle_buffer_tar``).
        repeats: Number of times a sample is used while it is in memory, with different crops and masks.
        repeat_buffer: Number of references that are shuffled after the repeats (``wds_shuffle_buffer_repeat``).
        max_bad_fraction: Maximum share of unusable samples; more than this stops the run.
        presence: Rules for which samples are used; a null or empty value counts as missing. With ``missing: allow``,
            the token budgets of missing modalities go to the others.
    """

    name: str
    source: Source
    modalities: Mapping[str, Modality]
    transform: UnifiedDataTransform
    masking: Masking
    shuffle_buffer: int = 0
    repeats: int = 1
    repeat_buffer: int = 0
    max_bad_fraction: float = 0.01
    presence: Presence = field(default_factory=Presence)
    _files: OpenFiles = field(default_factory=OpenFiles, repr=False)

    def draw(
        self, seed: int, epoch: int, stream: int, num_streams: int, ledger: BadSampleLedger
    ) -> Iterator[RawSample]:
        """Return the endless draws of one stream in one epoch."""
        rng = generator(seed, "buffers", epoch, stream, self.name)
        samples = self.source.draw((seed, "order", epoch, self.name), stream, num_streams, ledger)
        samples = _shuffled(samples, self.shuffle_buffer, rng)
        if self.repeats > 1:
            samples = itertools.chain.from_iterable(itertools.repeat(sample, self.repeats) for sample in samples)
        return _shuffled(samples, self.repeat_buffer, rng)

    @property
    def scaling(self) -> dict[str, tuple[list[float], list[float]]]:
        """Return :attr:`fourm.data.unified_datasets.Batch.scaling`."""
        transforms = self.transform.transforms_dict.items()
        return {name: t.scaling for name, t in transforms if isinstance(t, PixelTransform) and t.raw}

    def present(self, sample: RawSample, raw: dict[str, Any]) -> dict[str, Any]:
        """Return the usable values of ``sample``.

        Raises:
            BadSample: A value that the data set requires is null or empty.
        """
        lacking = self.transform.lacking(raw)
        if not lacking:
            return raw
        usable = self.presence.usable([name for name in raw if name not in lacking], raw)
        if not usable:
            name = lacking[0]
            message = f"{sample.where(name)}: modality {name}: the value is null or empty"
            raise BadSample("missing value", message, tolerated=self.presence.missing != "error")
        return {name: raw[name] for name in usable}

    def prepared(self, sample: RawSample) -> dict[str, Any]:
        """Read the usable values of a sample, and preprocess them; this is done once for all repeats of the sample.

        Raises:
            BadSample: The sample cannot be read.
            DataError: The sample violates the contract of one of its modalities.
        """

        def prepare(raw: dict[str, Any]) -> dict[str, Any]:
            return self.transform.preprocess(self.present(sample, raw))

        with name_file_in_errors(sample):
            return sample.prepared(self._files, prepare, keep=self.repeats > 1)

    def masked(self, sample: RawSample, rng: np.random.Generator) -> MaskedSample:
        """Read, transform and mask a sample.

        Raises:
            BadSample: The sample cannot be read.
            DataError: The sample violates the contract of one of its modalities.
        """
        values = self.prepared(sample)
        budgets = self.masking.draw_budgets(rng, values if self.presence.missing == "allow" else None)
        unseen = frozenset(name for name, m in self.modalities.items() if m.is_pixels and not budgets.input.get(name))
        with name_file_in_errors(sample):
            return self.masking.apply(self.transform.augment(values, rng, skip=unseen), budgets, rng)


@contextmanager
def name_file_in_errors(sample: RawSample) -> Iterator[None]:
    """Add the file and key of ``sample`` to errors, and turn unreadable values into :class:`BadSample`."""
    try:
        yield
    except (DataError, UnreadableValue) as error:
        where = sample.where(error.modality or "")
        if isinstance(error, DataError):
            raise DataError(f"{where}: {error}", error.modality, error.detail) from error
        raise BadSample("corrupt value", f"{where}: {error}") from error


def _shuffled(items: Iterator[RawSample], size: int, rng: np.random.Generator) -> Iterator[RawSample]:
    """Shuffle an endless sequence through a buffer: each item replaces a randomly chosen one."""
    if not size:
        yield from items
        return
    buffer = list(itertools.islice(items, size))
    for item in items:
        slot = rng.integers(size)
        chosen, buffer[slot] = buffer[slot], item
        yield chosen


def open_source(config: DatasetConfig, ledger: BadSampleLedger) -> Source:
    """Open the shards, folders or records of a data set.

    Args:
        config: The data set.
        ledger: Counts the keys that are not in every folder; shards are joined later.

    Raises:
        UserError: The files do not exist, or are of an unsupported type.
    """
    presence = config.presence
    if config.type == "huggingface":
        return Records(config.data_path, list(config.modalities), config.modality_name_map, presence)
    location = (config.data_path, wanted_names(config.modalities), config.modality_name_map)
    return Shards(*location, presence, config.remote) if config.use_wds else Folders(*location, ledger, presence)


def build_masking(
    config: DatasetConfig,
    text_tokenizer: Any,
    input_tokens_range: tuple[int, int] | None = None,
    target_tokens_range: tuple[int, int] | None = None,
) -> Masking:
    """Build the masking of a data set; the given token ranges override those of the config.

    Raises:
        UserError: The settings are inconsistent.
    """
    ranges = input_tokens_range or config.input_tokens_range, target_tokens_range or config.target_tokens_range
    if config.masking == "transfer":
        try:
            return TransferMasking(config.modalities, text_tokenizer, config.in_domains, config.out_domains, *ranges)
        except UserError as error:
            raise UserError(f"data set {config.name}: {error}") from error
    return UnifiedMasking(config.modalities, text_tokenizer, *ranges, sampling_weights=config.sampling_weights)


def build_dataset(
    config: DatasetConfig,
    text_tokenizer: Any,
    *,
    training: bool,
    input_tokens_range: tuple[int, int] | None = None,
    target_tokens_range: tuple[int, int] | None = None,
    raw_pixels: bool = False,
) -> SampleDataset:
    """Build the data set of one entry of the data config; the given token ranges override those of the config.

    Raises:
        UserError: The files do not exist, or are of an unsupported type.
    """
    return SampleDataset(
        config.name,
        open_source(config, BadSampleLedger(config.name, config.max_bad_fraction)),
        config.modalities,
        build_sample_transform(config, training, raw_pixels),
        build_masking(config, text_tokenizer, input_tokens_range, target_tokens_range),
        shuffle_buffer=config.wds_shuffle_buffer_tar,
        repeats=config.wds_n_repeats if training else 1,
        repeat_buffer=config.wds_shuffle_buffer_repeat,
        max_bad_fraction=config.max_bad_fraction,
        presence=config.presence,
    )
