"""From data sets on disk to batches: read and join by key → aligned transform → masking → collate.

**The data position.** The training data of a run is made of ``S`` logical *streams*, ``num_streams``. Micro-batch ``k`` of
rank ``r`` is global batch ``g = k · world_size + r`` and comes from stream ``g mod S``; what is in it depends on
``(seed, S, g)`` only. ``S`` is a multiple of all workers, ``world_size · max(1, num_workers)``, which it is by default. So
each stream is one worker's own, each worker takes its ``S / (world_size · max(1, num_workers))`` streams by turns, and every
such number of ranks and workers sees the same batches.

``k`` counts on through the run; every ``batches_per_epoch`` of them an epoch ends and each stream starts afresh. Within an
epoch a stream is a fixed sequence of *draws*: its order comes from ``(seed, epoch, stream)``, and the augmentation and
masking of a draw from ``(seed, epoch, stream, number of the draw)``. A sample that cannot be read counts as drawn and is
skipped. The whole state of a stream is therefore the number of its draws, which every :class:`Batch` reports. To resume, a
stream is set up again and that many draws are passed over: this reads the headers of shards, never the content of a sample,
because what the shuffle buffers hold are references.
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
from fourm.data.collate import MaskedSample, collate
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
    """A batch, and where its stream stands after it.

    Attributes:
        mod_dict: {modality: {tensor, input_mask, target_mask, decoder_attention_mask}}, each (B, …).
        position: ``stream``, ``epoch``, ``draws`` of the stream in this epoch, ``skipped``: how many bad samples there were
            since the stream's previous batch, by data set and reason, and ``missing``: modality → the number of samples
            without it and of all samples, of the data sets where samples may lack something.
        scaling: scale and bias per channel of the modalities whose pictures are still in 8 bits; see ``raw_pixels``.
        number: of the micro-batch among those of its rank in the whole run.
    """

    mod_dict: dict[str, dict[str, Tensor]]
    position: dict[str, Any]
    scaling: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    number: int = 0

    def pin_memory(self) -> Batch:
        """Called by the ``DataLoader``."""
        pinned = {name: {k: v.pin_memory() for k, v in entry.items()} for name, entry in self.mod_dict.items()}
        return replace(self, mod_dict=pinned)


class Source(Protocol):
    """Where the samples of a data set come from: :class:`Shards`, :class:`Folders` or :class:`Records`."""

    def draw(self, key: tuple, stream: int, num_streams: int, ledger: BadSampleLedger) -> Iterator[RawSample]: ...

    def all(self, ledger: BadSampleLedger) -> Sequence[RawSample]: ...


@dataclass
class SampleDataset:
    """One data set: where its samples come from, in which order, and what turns one into model input.

    Attributes:
        shuffle_buffer: references mixed before the repeats, ``wds_shuffle_buffer_tar``.
        repeats: how often a sample is used while it is in memory, with different crops and masks.
        repeat_buffer: references mixed after the repeats, ``wds_shuffle_buffer_repeat``.
        presence: which samples are used; a null or empty value is one that is missing. With ``missing: allow`` the token
            budgets of what a sample lacks go to the others.
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
        """The endless draws of one stream in one epoch."""
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

    def present(self, sample: RawSample, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Of the values of ``sample`` those that can be used.

        Raises:
            BadSample: a value is null or empty, and the data set does not do without it.
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

    def masked(self, sample: RawSample, rng: np.random.Generator) -> MaskedSample:
        """Read, transform and mask a sample.

        Raises:
            BadSample: it cannot be read.
            DataError: it breaks the contract of one of its modalities.
        """
        raw = self.present(sample, sample.values(self._files, keep_pixels=self.repeats > 1))
        budgets = self.masking.draw_budgets(rng, raw if self.presence.missing == "allow" else None)
        unseen = frozenset(name for name, m in self.modalities.items() if m.is_pixels and not budgets.input.get(name))
        with errors_name_the_file(sample):
            return self.masking.apply(self.transform(raw, rng, skip=unseen), budgets, rng)


@contextmanager
def errors_name_the_file(sample: RawSample) -> Iterator[None]:
    """Errors of transforms and masking get the file and key of ``sample``; unreadable values become :class:`BadSample`."""
    try:
        yield
    except (DataError, UnreadableValue) as error:
        where = sample.where(error.modality or "")
        if isinstance(error, DataError):
            raise DataError(f"{where}: {error}", error.modality, error.detail) from error
        raise BadSample("corrupt value", f"{where}: {error}") from error


def _shuffled(items: Iterator[RawSample], size: int, rng: np.random.Generator) -> Iterator[RawSample]:
    """Mix an endless sequence through a buffer: each item goes where a random one just left."""
    buffer = list(itertools.islice(items, size))
    if not buffer:
        yield from items
    for item in items:
        slot = rng.integers(size)
        chosen, buffer[slot] = buffer[slot], item
        yield chosen


class Stream:
    """One stream in one epoch: draws from a weighted mixture of data sets, and skips the samples that are bad.

    Args:
        draws: how many draws to pass over.
    """

    def __init__(
        self, datasets: Sequence[SampleDataset], weights: Sequence[float], ledgers: Sequence[BadSampleLedger],
        seed: int, epoch: int, stream: int, num_streams: int, draws: int = 0,
    ):  # fmt: skip
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
                ledger.collect()  # counted before

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
    """The masked sample; None, counted and with a warning, if it cannot be read."""
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
    """The endless micro-batches of one rank from ``start_batch`` on; each worker process makes its own share."""

    def __init__(
        self, datasets: Sequence[SampleDataset], weights: Sequence[float], modalities: Mapping[str, Modality], *,
        batch_size: int, batches_per_epoch: int | None, rank: int, world_size: int, seed: int, start_batch: int = 0,
        positions: Mapping[int, int] | None = None, num_streams: int | None = None,
    ):  # fmt: skip
        self.datasets, self.weights, self.modalities = datasets, weights, modalities
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start_batch, self.positions, self.num_streams = start_batch, positions or {}, num_streams

    def __iter__(self) -> Iterator[Batch]:
        worker, num_workers = _worker()
        num_streams = self.num_streams or self.world_size * num_workers
        assert num_streams % (self.world_size * num_workers) == 0, "a stream would be of several workers"
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
                rows = [next(samples) for _ in range(self.batch_size)]
                position = {"stream": stream, "epoch": epoch, "draws": samples.draws} | _reported(ledgers)
                yield Batch(_collated(rows, self.modalities), position, scaling, k)

    def _epoch(self, k: int) -> int:
        return k // self.batches_per_epoch if self.batches_per_epoch else 0


def _reported(ledgers: Iterable[BadSampleLedger]) -> dict[str, Any]:
    """What there is to report since the last time, for :attr:`Batch.position`."""
    skipped, missing = Counter[str](), dict[str, tuple[int, int]]()
    for ledger in ledgers:
        skipped.update(ledger.collect())
        for name, (lacking, total) in ledger.collect_missing().items():
            before = missing.get(name, (0, 0))
            missing[name] = (before[0] + lacking, before[1] + total)
    return {"skipped": dict(skipped), "missing": missing}


class EvalBatches(IterableDataset):
    """Every sample of a data set once, in fixed order: rank ``r`` takes samples r, r + world_size, …"""

    def __init__(self, dataset: SampleDataset, *, batch_size: int, rank: int, world_size: int, seed: int):
        self.dataset, self.rank, self.seed = dataset, rank, seed
        ledger = BadSampleLedger(dataset.name, dataset.max_bad_fraction)
        samples = list(enumerate(dataset.source.all(ledger)))
        self.size, share = len(samples), samples[rank::world_size]
        self.batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        self.not_joined = ledger.collect() if rank == 0 else {}

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        worker, num_workers = _worker()
        ledger = BadSampleLedger(self.dataset.name, self.dataset.max_bad_fraction, self.size)
        skipped = Counter(self.not_joined if worker == 0 else {})
        for samples in self.batches[worker::num_workers]:
            rows = [
                read_sample(self.dataset, sample, generator(self.seed, "eval", index), ledger)
                for index, sample in samples
            ]
            skipped += Counter(ledger.collect())
            if kept := [row for row in rows if row is not None]:
                position = {"stream": self.rank, "epoch": 0, "draws": samples[-1][0] + 1} | _reported([ledger])
                position["skipped"] = dict(skipped)
                yield Batch(_collated(kept, self.dataset.modalities), position, self.dataset.scaling)
                skipped = Counter()


def _collated(samples: Sequence[MaskedSample], modalities: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
    return collate(samples, modalities, shared=get_worker_info() is not None)


def _worker() -> tuple[int, int]:
    """Index of this worker process and their number; (0, 1) in the main process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def open_source(config: DatasetConfig, ledger: BadSampleLedger) -> Source:
    """The shards, folders or records of a data set.

    Args:
        ledger: counts keys that are not in every folder; shards are joined later.

    Raises:
        UserError: its files are not there, or of a type that cannot be read.
    """
    transforms = transforms_for(config.modalities)
    used = presence(config.missing, config.modalities, transforms, config.main_augment_domain)
    if config.type == "huggingface":
        return Records(config.data_path, list(config.modalities), config.modality_name_map, used)
    place = (config.data_path, wanted_names(config.modalities), config.modality_name_map)
    return Shards(*place, used, config.remote) if config.use_wds else Folders(*place, ledger, used)


def build_masking(
    config: DatasetConfig, text_tokenizer: Any, input_tokens_range: tuple[int, int] | None = None,
    target_tokens_range: tuple[int, int] | None = None,
) -> UnifiedMasking:  # fmt: skip
    """What divides the samples of a data set into input and target; the ranges replace its own.

    Raises:
        UserError: settings that do not fit together.
    """
    ranges = input_tokens_range or config.input_tokens_range, target_tokens_range or config.target_tokens_range
    if config.masking == "transfer":
        try:
            return TransferMasking(config.modalities, text_tokenizer, config.in_domains, config.out_domains, *ranges)
        except UserError as error:
            raise UserError(f"data set {config.name}: {error}") from error
    return UnifiedMasking(config.modalities, text_tokenizer, *ranges, sampling_weights=config.sampling_weights)


def build_dataset(
    config: DatasetConfig, text_tokenizer: Any, *, training: bool,
    input_tokens_range: tuple[int, int] | None = None, target_tokens_range: tuple[int, int] | None = None,
    raw_pixels: bool = False,
) -> SampleDataset:  # fmt: skip
    """The data set of one entry of the data config; the ranges replace its own.

    Raises:
        UserError: its files are not there, or of a type that cannot be read.
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
    config: DataConfig, text_tokenizer: Any, *, batch_size: int, batches_per_epoch: int, num_workers: int, rank: int,
    world_size: int, seed: int, start_batch: int = 0, positions: Mapping[int, int] | None = None,
    num_streams: int | None = None, pin_memory: bool = False, raw_pixels: bool = False,
) -> BatchLoader:  # fmt: skip
    """The endless training batches of one rank, from micro-batch ``start_batch`` of the run on.

    Args:
        batch_size: of this rank.
        batches_per_epoch: of this rank.
        positions: stream → draws in the epoch of ``start_batch``, from the latest :attr:`Batch.position` of every stream of
            all ranks (:func:`draws_in_epoch`). A stream that is not in it has made no draw in that epoch.
        num_streams: a multiple of ``world_size · max(1, num_workers)``, which is the default; see the top of this file.
        raw_pixels: leave pictures in 8 bits, a quarter of the bytes; :attr:`Batch.scaling` says how to normalise them.

    Raises:
        UserError: a data set that cannot be read. While iterating, :class:`DataError`: data that breaks its modality's
            contract, or too many bad samples.
    """
    if start_batch % batches_per_epoch and positions is None:
        raise ValueError(f"start_batch {start_batch} lies within an epoch: 'positions' are needed")
    datasets = [
        build_dataset(dataset, text_tokenizer, training=True, raw_pixels=raw_pixels)
        for dataset in config.train.values()
    ]
    batches = TrainBatches(
        datasets, [config.weights[name] for name in config.train], config.modalities, batch_size=batch_size,
        batches_per_epoch=batches_per_epoch, rank=rank, world_size=world_size, seed=seed, start_batch=start_batch,
        positions=positions, num_streams=num_streams,
    )  # fmt: skip
    return BatchLoader(batches, num_workers, pin_memory)


def draws_in_epoch(positions: Iterable[Mapping[str, Any]], epoch: int) -> dict[int, int]:
    """``positions`` of :func:`build_train_loader`, from the latest :attr:`Batch.position` of each stream."""
    return {position["stream"]: position["draws"] for position in positions if position["epoch"] == epoch}


def build_eval_loader(
    dataset: DatasetConfig, text_tokenizer: Any, *, batch_size: int, num_workers: int, rank: int, world_size: int, seed: int,
    input_tokens_range: tuple[int, int] | None = None, target_tokens_range: tuple[int, int] | None = None,
    raw_pixels: bool = False,
) -> BatchLoader:  # fmt: skip
    """This rank's share of a data set, for evaluation: every sample once over all ranks, always the same crops and masks.

    The last batch may be smaller, and so may one with bad samples; a rank may have one batch more than another.

    Args:
        input_tokens_range, target_tokens_range: in place of the data set's own.
        raw_pixels: see :func:`build_train_loader`.
    """
    samples = build_dataset(
        dataset, text_tokenizer, training=False, input_tokens_range=input_tokens_range,
        target_tokens_range=target_tokens_range, raw_pixels=raw_pixels,
    )  # fmt: skip
    return BatchLoader(
        EvalBatches(samples, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed), num_workers
    )
