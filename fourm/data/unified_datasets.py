"""Build batches from data sets on disk: read and join by key → aligned transform → masking → collate.

**The data position.** The training data of a run consists of ``S = num_streams`` logical *streams*. Micro-batch ``k``
of rank ``r`` is global batch ``g = k · world_size + r`` and comes from stream ``g mod S``; for given ``S``,
``batch_size`` and ``batches_per_epoch``, its content depends only on ``(seed, g)``. ``S`` is a multiple of the total
number of workers, ``world_size · max(1, num_workers)``, which is also its default. Each stream therefore belongs to one
worker, each worker cycles through its ``S / (world_size · max(1, num_workers))`` streams, and every such number of
ranks and workers sees the same batches.

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
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.batch_loader import BatchLoader, note_reading
from fourm.data.collate import MaskedSample, collate, single
from fourm.data.data_config import DataConfig, DatasetConfig
from fourm.data.modality_info import Modality
from fourm.data.raw_sample import BadSample, RawSample
from fourm.data.sample_dataset import SampleDataset, build_dataset
from fourm.utils.seeds import generator


class Position(TypedDict):
    """The position of a stream after a batch, as checkpoints keep it, and what was counted since the batch before.

    Attributes:
        stream: Index of the stream.
        epoch: Index of the epoch.
        draws: Number of draws of the stream in this epoch.
        skipped: Number of bad samples by data set and reason.
        missing: For data sets whose samples may lack modalities: modality → number of samples without it, and of all.
    """

    stream: int
    epoch: int
    draws: int
    skipped: dict[str, int]
    missing: dict[str, tuple[int, int]]


@dataclass
class Batch:
    """A batch.

    Attributes:
        mod_dict: {modality: {tensor, input_mask, target_mask, decoder_attention_mask}}, each (B, …).
        position: The position of its stream after it; zeros for a batch that is not from a stream.
        scaling: Scale and bias per channel of the modalities whose images are still in 8 bits; see ``raw_pixels``.
        number: The number of the micro-batch among those of its rank in the whole run.
    """

    mod_dict: dict[str, dict[str, Tensor]]
    position: Position = field(default_factory=lambda: Position(stream=0, epoch=0, draws=0, skipped={}, missing={}))
    scaling: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    number: int = 0

    def pin_memory(self) -> Batch:
        """Copy the tensors to page-locked memory; the ``DataLoader`` calls this."""
        pinned = {name: {k: v.pin_memory() for k, v in entry.items()} for name, entry in self.mod_dict.items()}
        return replace(self, mod_dict=pinned)

    def split(self, parts: int) -> list[Batch]:
        """Divide the samples, a multiple of ``parts``. The first part has the counts of the position."""
        samples = len(next(iter(self.mod_dict.values()))["tensor"])
        size, rest = divmod(samples, parts)
        assert not rest
        batches = []
        for start in range(0, samples, size):
            rows = slice(start, start + size)
            mod_dict = {name: {k: v[rows] for k, v in entry.items()} for name, entry in self.mod_dict.items()}
            position: Position = self.position if start == 0 else {**self.position, "skipped": {}, "missing": {}}
            batches.append(replace(self, mod_dict=mod_dict, position=position))
        return batches


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
        skip: Number of draws to skip.

    Attributes:
        num_draws: Number of draws that were made or skipped.
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
        skip: int = 0,
    ):
        self._datasets, self._ledgers = datasets, ledgers
        self._key = (seed, "sample", epoch, stream)
        self._cumulative = list(np.cumsum(weights) / np.sum(weights))[:-1]
        self._choice = generator(seed, "mixture", epoch, stream)
        self._iterators = [
            dataset.draw(seed, epoch, stream, num_streams, ledger)
            for dataset, ledger in zip(datasets, ledgers, strict=True)
        ]
        self.num_draws = 0
        for _ in range(skip):
            self._draw()
        if skip:
            for ledger in ledgers:
                ledger.collect()  # these were reported before

    def _draw(self) -> tuple[int, RawSample]:
        index = bisect(self._cumulative, self._choice.random()) if self._cumulative else 0
        sample = next(self._iterators[index])
        self.num_draws += 1
        return index, sample

    def __next__(self) -> MaskedSample:
        while True:
            index, sample = self._draw()
            rng = generator(*self._key, self.num_draws)
            masked = read_sample(self._datasets[index], sample, rng, self._ledgers[index])
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


@dataclass(eq=False)
class TrainBatches(IterableDataset):
    """The endless micro-batches of one rank from ``start_batch`` on; each worker process builds its own share.

    With ``batch_size`` None, each is a single sample of arrays without a batch dimension.
    """

    datasets: Sequence[SampleDataset]
    weights: Sequence[float]
    modalities: Mapping[str, Modality]
    _: KW_ONLY
    batch_size: int | None
    batches_per_epoch: int | None
    rank: int
    world_size: int
    seed: int
    start_batch: int = 0
    draws_by_stream: Mapping[int, int] = field(default_factory=dict)
    num_streams: int | None = None

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
                    skip = self.draws_by_stream.get(stream, 0) if epoch == self._epoch(self.start_batch) else 0
                    streams[stream] = Stream(
                        self.datasets, self.weights, ledgers, self.seed, epoch, stream, num_streams, skip
                    )
                samples = streams[stream]
                mod_dict = self._next(samples)
                yield Batch(mod_dict, _position(stream, epoch, samples.num_draws, ledgers), scaling, k)

    def _next(self, samples: Stream) -> dict[str, dict[str, Tensor]]:
        if self.batch_size is None:
            # Arrays, because a worker would send each tensor by itself through shared memory, which takes milliseconds.
            return single(next(samples), self.modalities)  # type: ignore[return-value]
        return _collate([next(samples) for _ in range(self.batch_size)], self.modalities)

    def _epoch(self, k: int) -> int:
        return k // self.batches_per_epoch if self.batches_per_epoch else 0


def _position(stream: int, epoch: int, draws: int, ledgers: Iterable[BadSampleLedger]) -> Position:
    """Return the position of a stream with the counts of ``ledgers`` since the last call."""
    skipped, missing = dict[str, int](), dict[str, tuple[int, int]]()
    for ledger in ledgers:
        for reason, count in ledger.collect().items():
            skipped[reason] = skipped.get(reason, 0) + count
        for name, (lacking, total) in ledger.collect_missing().items():
            previous_lacking, previous_total = missing.get(name, (0, 0))
            missing[name] = (previous_lacking + lacking, previous_total + total)
    return Position(stream=stream, epoch=epoch, draws=draws, skipped=skipped, missing=missing)


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
                position = _position(self.rank, 0, samples[-1][0] + 1, [ledger])
                position["skipped"] = dict(skipped)
                yield Batch(_collate(kept, self.dataset.modalities), position, self.dataset.scaling)
                skipped = Counter()


def _collate(samples: Sequence[MaskedSample], modalities: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
    return collate(samples, modalities, shared=get_worker_info() is not None)


def _worker_info() -> tuple[int, int]:
    """Return the index of this worker process and the number of workers; (0, 1) in the main process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


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
    draws_by_stream: Mapping[int, int] | None = None,
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
        draws_by_stream: Stream → draws in the epoch of ``start_batch``, from the latest :attr:`Batch.position` of every
            stream of all ranks (:func:`draws_in_epoch`). A stream that is absent has made no draw in that epoch.
        num_streams: A multiple of ``world_size · max(1, num_workers)``, which is the default; see the top of this file.
        pin_memory: Copy batches to page-locked memory.
        raw_pixels: Leave images in 8 bits, a quarter of the bytes; :attr:`Batch.scaling` tells how to normalise them.

    Raises:
        UserError: A data set cannot be read. While iterating, :class:`DataError` is raised if data violates the
            contract of its modality or too many samples are bad.
    """
    if start_batch % batches_per_epoch and draws_by_stream is None:
        raise ValueError(f"start_batch {start_batch} is inside an epoch, which requires 'draws_by_stream'")
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
        draws_by_stream=draws_by_stream or {},
        num_streams=num_streams,
    )
    return BatchLoader(batches, num_workers, pin_memory)


def draws_in_epoch(positions: Iterable[Position], epoch: int) -> dict[int, int]:
    """Return the draws by stream for :func:`build_train_loader` from the latest position of each stream."""
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
        batch_size: Samples per batch of this rank.
        seed: Seed of the crops and masks.
        input_tokens_range, target_tokens_range: Override the ranges of the data set.
        text_tokenizer, num_workers, rank, world_size, raw_pixels: See :func:`build_train_loader`.
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
