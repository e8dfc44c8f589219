"""Build batches from data sets on disk: read and join by key → aligned transform → masking → collate.

**The data position.** The training data of a run consists of ``S = num_streams`` logical *streams*. Micro-batch ``k``
of rank ``r`` is global batch ``g = k · world_size + r`` and comes from stream ``g mod S``; its content depends only on
``(seed, S, g)``. ``S`` is a multiple of the total number of workers, ``world_size · max(1, num_workers)``, which is
also its default. Each stream therefore belongs to one worker, each worker cycles through its ``S / (world_size · max(1,
num_workers))`` streams, and every such number of ranks and workers sees the same batches.

``k`` counts through the whole run; an epoch ends after every ``batches_per_epoch`` batches, and each stream starts
afresh. Within an epoch, a stream is a fixed sequence of *draws*: its order is seeded by ``(seed, epoch, stream)``, and
the augmentation and masking of a draw by ``(seed, epoch, stream, index of the draw)``. A sample that cannot be read
counts as a draw and is skipped. The state of a stream is therefore just its number of draws, which every :class:`Batch`
reports. To resume, a stream is created again and skips that many draws. This reads only the headers of shards and no
sample content, because the shuffle buffers hold references.
"""

from __future__ import annotations

import itertools
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.batch_loader import BatchLoader, note_reading
from fourm.data.collate import MaskedSample, collate, single
from fourm.data.data_config import DataConfig, DatasetConfig, build_sample_transform
from fourm.data.folders import Folders
from fourm.data.layout import wanted_names
from fourm.data.masking import TransferMasking, UnifiedMasking
from fourm.data.modality_info import Modality
from fourm.data.modality_transforms import PixelTransform, UnifiedDataTransform, transforms_for
from fourm.data.presence import Presence, presence
from fourm.data.raw_sample import BadSample, OpenFiles, RawSample
from fourm.data.records import Records
from fourm.data.shards import Shards
from fourm.utils.errors import DataError, UnreadableValue, UserError
from fourm.utils.seeds import generator


@dataclass
class Batch:
    """A batch and the position of its stream after it.

    Attributes:
        mod_dict: {modality: {tensor, input_mask, target_mask, decoder_attention_mask}}, each (B, …).
        position: ``stream``, ``epoch``, and ``draws`` of the stream in this epoch. ``skipped`` holds the number of bad
            samples since the stream's previous batch by data set and reason. ``missing`` maps each modality to the
            number of samples without it and of all samples, for data sets whose samples may lack modalities.
        scaling: Scale and bias per channel of the modalities whose images are still in 8 bits; see ``raw_pixels``.
        number: The number of the micro-batch among those of its rank in the whole run.
    """

    mod_dict: dict[str, dict[str, Tensor]]
    position: dict[str, Any]
    scaling: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    number: int = 0

    def pin_memory(self) -> Batch:
        """Copy the tensors to page-locked memory; the ``DataLoader`` calls this."""
        pinned = {name: {k: v.pin_memory() for k, v in entry.items()} for name, entry in self.mod_dict.items()}
        return replace(self, mod_dict=pinned)


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
    masking: UnifiedMasking
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
        """:attr:`Batch.scaling`"""
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
    buffer = list(itertools.islice(items, size))
    if not buffer:
        yield from items
    for item in items:
        slot = rng.integers(size)
        chosen, buffer[slot] = buffer[slot], item
        yield chosen


class Stream:
    """One stream in one epoch, which draws from a weighted mixture of data sets and skips bad samples.

    Args:
        datasets: The data sets of the mixture.
        weights: Relative frequency of each data set.
        ledgers: Counter of bad samples for each data set.
        seed: Seed of the run.
        epoch: Index of the epoch.
        stream: Index of the stream.
        num_streams: Total number of streams.
        draws: Number of draws to skip.
    """

    def __init__(
        self,
        datasets: Sequence[SampleDataset],
        weights: Sequence[float],
        ledgers: Sequence[BadSampleLedger],
        seed: int,
        epoch: int,
        stream: int,
        num_streams: int,
        draws: int = 0,
    ):
        self._datasets, self._ledgers = datasets, ledgers
        self._key = (seed, "sample", epoch, stream)
        self._cumulative = list(np.cumsum(weights) / np.sum(weights))[:-1]
        self._choice = generator(seed, "mixture", epoch, stream)
        self._draws = [
            dataset.draw(seed, epoch, stream, num_streams, ledger)
            for dataset, ledger in zip(datasets, ledgers, strict=True)
        ]
        self.draws = 0
        for _ in range(draws):
            self._draw()
        if draws:
            for ledger in ledgers:
                ledger.collect()  # these were reported before

    def _draw(self) -> tuple[int, RawSample]:
        index = bisect(self._cumulative, self._choice.random()) if self._cumulative else 0
        sample = next(self._draws[index])
        self.draws += 1
        return index, sample

    def __next__(self) -> MaskedSample:
        while True:
            index, sample = self._draw()
            masked = read_sample(self._datasets[index], sample, generator(*self._key, self.draws), self._ledgers[index])
            if masked is not None:
                return masked


def read_sample(
    dataset: SampleDataset, sample: RawSample, rng: np.random.Generator, ledger: BadSampleLedger
) -> MaskedSample | None:
    """Return the masked sample, or None, after counting it and logging a warning, if it cannot be read."""
    note_reading(sample)
    try:
        masked = dataset.masked(sample, rng)
    except BadSample as error:
        if not error.tolerated:
            ledger.warn(sample.where(""), f"{error}; skipped")
        ledger.read(error.reason, error.tolerated)
        return None
    finally:
        note_reading(None)
    ledger.read()
    if dataset.presence.missing == "allow":
        ledger.has(masked, dataset.modalities)
    return masked


class TrainBatches(IterableDataset):
    """The endless micro-batches of one rank from ``start_batch`` on; each worker process builds its own share.

    With ``batch_size`` None, each is a single sample of arrays without a batch dimension.
    """

    def __init__(
        self,
        datasets: Sequence[SampleDataset],
        weights: Sequence[float],
        modalities: Mapping[str, Modality],
        *,
        batch_size: int | None,
        batches_per_epoch: int | None,
        rank: int,
        world_size: int,
        seed: int,
        start_batch: int = 0,
        positions: Mapping[int, int] | None = None,
        num_streams: int | None = None,
    ):
        self.datasets, self.weights, self.modalities = datasets, weights, modalities
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start_batch, self.positions, self.num_streams = start_batch, positions or {}, num_streams

    def __iter__(self) -> Iterator[Batch]:
        worker, num_workers = _worker_info()
        num_streams = self.num_streams or self.world_size * num_workers
        assert num_streams % (self.world_size * num_workers) == 0, "a stream would belong to several workers"
        ledgers = [BadSampleLedger(dataset.name, dataset.max_bad_fraction) for dataset in self.datasets]
        scaling = {name: pair for dataset in self.datasets for name, pair in dataset.scaling.items()}
        for epoch, batches in itertools.groupby(itertools.count(self.start_batch + worker, num_workers), self._epoch):
            streams: dict[int, Stream] = {}
            for k in batches:
                stream = (k * self.world_size + self.rank) % num_streams
                if stream not in streams:
                    draws = self.positions.get(stream, 0) if epoch == self._epoch(self.start_batch) else 0
                    streams[stream] = Stream(
                        self.datasets, self.weights, ledgers, self.seed, epoch, stream, num_streams, draws
                    )
                samples = streams[stream]
                mod_dict = self._next(samples)
                position = {"stream": stream, "epoch": epoch, "draws": samples.draws} | _collect_reports(ledgers)
                yield Batch(mod_dict, position, scaling, k)

    def _next(self, samples: Stream) -> dict[str, dict[str, Tensor]]:
        if self.batch_size is None:
            # Arrays, because a worker would send each tensor by itself through shared memory, which takes milliseconds.
            return single(next(samples), self.modalities)  # type: ignore[return-value]
        return _collate([next(samples) for _ in range(self.batch_size)], self.modalities)

    def _epoch(self, k: int) -> int:
        return k // self.batches_per_epoch if self.batches_per_epoch else 0


def _collect_reports(ledgers: Iterable[BadSampleLedger]) -> dict[str, Any]:
    """Collect the counts since the last call for :attr:`Batch.position`."""
    skipped, missing = dict[str, int](), dict[str, tuple[int, int]]()
    for ledger in ledgers:
        for reason, count in ledger.collect().items():
            skipped[reason] = skipped.get(reason, 0) + count
        for name, (lacking, total) in ledger.collect_missing().items():
            previous_lacking, previous_total = missing.get(name, (0, 0))
            missing[name] = (previous_lacking + lacking, previous_total + total)
    return {"skipped": skipped, "missing": missing}


class EvalBatches(IterableDataset):
    """Every sample of a data set once in a fixed order; rank ``r`` takes samples r, r + world_size, …"""

    def __init__(self, dataset: SampleDataset, *, batch_size: int, rank: int, world_size: int, seed: int):
        self.dataset, self.rank, self.seed = dataset, rank, seed
        ledger = BadSampleLedger(dataset.name, dataset.max_bad_fraction)
        samples = list(enumerate(dataset.source.all(ledger)))
        self.size = len(samples)
        share = samples[rank::world_size]
        self.batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        self.not_joined = ledger.collect() if rank == 0 else {}

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        worker, num_workers = _worker_info()
        ledger = BadSampleLedger(self.dataset.name, self.dataset.max_bad_fraction, self.size)
        skipped = Counter(self.not_joined if worker == 0 else {})
        for samples in self.batches[worker::num_workers]:
            rows = [
                read_sample(self.dataset, sample, generator(self.seed, "eval", index), ledger)
                for index, sample in samples
            ]
            skipped += Counter(ledger.collect())
            kept = [row for row in rows if row is not None]
            if kept:
                position = {"stream": self.rank, "epoch": 0, "draws": samples[-1][0] + 1} | _collect_reports([ledger])
                position["skipped"] = dict(skipped)
                yield Batch(_collate(kept, self.dataset.modalities), position, self.dataset.scaling)
                skipped = Counter()


def _collate(samples: Sequence[MaskedSample], modalities: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
    return collate(samples, modalities, shared=get_worker_info() is not None)


def _worker_info() -> tuple[int, int]:
    """Return the index of this worker process and the number of workers; (0, 1) in the main process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def open_source(config: DatasetConfig, ledger: BadSampleLedger) -> Source:
    """Open the shards, folders or records of a data set.

    Args:
        config: The data set.
        ledger: Counts the keys that are not in every folder; shards are joined later.

    Raises:
        UserError: The files do not exist, or are of an unsupported type.
    """
    transforms = transforms_for(config.modalities)
    used = presence(config.missing, config.modalities, transforms, config.main_augment_domain)
    if config.type == "huggingface":
        return Records(config.data_path, list(config.modalities), config.modality_name_map, used)
    location = (config.data_path, wanted_names(config.modalities), config.modality_name_map)
    return Shards(*location, used, config.remote) if config.use_wds else Folders(*location, ledger, used)


def build_masking(
    config: DatasetConfig,
    text_tokenizer: Any,
    input_tokens_range: tuple[int, int] | None = None,
    target_tokens_range: tuple[int, int] | None = None,
) -> UnifiedMasking:
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
        presence=presence(
            config.missing, config.modalities, transforms_for(config.modalities), config.main_augment_domain
        ),
    )


def build_train_loader(
    config: DataConfig,
    text_tokenizer: Any,
    *,
    batch_size: int,
    batches_per_epoch: int,
    num_workers: int,
    rank: int,
    world_size: int,
    seed: int,
    start_batch: int = 0,
    positions: Mapping[int, int] | None = None,
    num_streams: int | None = None,
    pin_memory: bool = False,
    raw_pixels: bool = False,
) -> BatchLoader:
    """Build the endless training batches of one rank, from micro-batch ``start_batch`` of the run on.

    Args:
        config: The data config of the run.
        text_tokenizer: The text vocabulary.
        batch_size: Samples per micro-batch of this rank.
        batches_per_epoch: Micro-batches per epoch of this rank.
        num_workers: Worker processes of this rank; 0 builds batches in this process.
        rank: Index of this rank.
        world_size: Number of ranks.
        seed: Seed of the run.
        start_batch: Index of the first micro-batch.
        positions: Stream → draws in the epoch of ``start_batch``, from the latest :attr:`Batch.position` of every
            stream of all ranks (:func:`draws_in_epoch`). A stream that is absent has made no draw in that epoch.
        num_streams: A multiple of ``world_size · max(1, num_workers)``, which is the default; see the top of this file.
        pin_memory: Copy batches to page-locked memory.
        raw_pixels: Leave images in 8 bits, a quarter of the bytes; :attr:`Batch.scaling` tells how to normalise them.

    Raises:
        UserError: A data set cannot be read. While iterating, :class:`DataError` is raised if data violates the
            contract of its modality or too many samples are bad.
    """
    if start_batch % batches_per_epoch and positions is None:
        raise ValueError(f"start_batch {start_batch} is inside an epoch, which requires 'positions'")
    datasets = [
        build_dataset(dataset, text_tokenizer, training=True, raw_pixels=raw_pixels)
        for dataset in config.train.values()
    ]
    batches = TrainBatches(
        datasets,
        [config.weights[name] for name in config.train],
        config.modalities,
        batch_size=batch_size,
        batches_per_epoch=batches_per_epoch,
        rank=rank,
        world_size=world_size,
        seed=seed,
        start_batch=start_batch,
        positions=positions,
        num_streams=num_streams,
    )
    return BatchLoader(batches, num_workers, pin_memory)


def draws_in_epoch(positions: Iterable[Mapping[str, Any]], epoch: int) -> dict[int, int]:
    """Return ``positions`` for :func:`build_train_loader` from the latest :attr:`Batch.position` of each stream."""
    return {position["stream"]: position["draws"] for position in positions if position["epoch"] == epoch}


def build_eval_loader(
    dataset: DatasetConfig,
    text_tokenizer: Any,
    *,
    batch_size: int,
    num_workers: int,
    rank: int,
    world_size: int,
    seed: int,
    input_tokens_range: tuple[int, int] | None = None,
    target_tokens_range: tuple[int, int] | None = None,
    raw_pixels: bool = False,
) -> BatchLoader:
    """Build this rank's evaluation batches: every sample once over all ranks, always with the same crops and masks.

    The last batch and batches with bad samples may be smaller, and one rank may have one more batch than another.

    Args:
        dataset: The data set.
        text_tokenizer: The text vocabulary.
        batch_size: Samples per batch of this rank.
        num_workers: Worker processes of this rank; 0 builds batches in this process.
        rank: Index of this rank.
        world_size: Number of ranks.
        seed: Seed of the crops and masks.
        input_tokens_range: Overrides the range of the data set.
        target_tokens_range: Overrides the range of the data set.
        raw_pixels: See :func:`build_train_loader`.
    """
    samples = build_dataset(
        dataset,
        text_tokenizer,
        training=False,
        input_tokens_range=input_tokens_range,
        target_tokens_range=target_tokens_range,
        raw_pixels=raw_pixels,
    )
    return BatchLoader(
        EvalBatches(samples, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed), num_workers
    )
