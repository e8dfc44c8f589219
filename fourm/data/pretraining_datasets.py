"""The published functions that build training data in Python, implemented with ``unified_datasets``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed
from torch.utils.data import Dataset

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.budgets import TokensRange
from fourm.data.collate import ModDict, as_tensors, single
from fourm.data.folders import Folders
from fourm.data.image_augmenter import AbstractImageAugmenter
from fourm.data.layout import wanted_names
from fourm.data.masking import UnifiedMasking
from fourm.data.modality_info import Modality, as_modality
from fourm.data.modality_transforms import AbstractTransform, UnifiedDataTransform, transforms_for
from fourm.data.raw_sample import BadSample, RawSample
from fourm.data.sample_dataset import SampleDataset
from fourm.data.shards import Shards
from fourm.data.unified_datasets import BatchLoader, TrainBatches
from fourm.utils.errors import DataError, UserError
from fourm.utils.seeds import generator


class PretrainingLoader:
    """Training batches as mod_dicts. Each pass over it is a new epoch of ``epoch_size`` samples."""

    def __init__(
        self,
        datasets: Sequence[SampleDataset],
        weights: Sequence[float],
        modalities: Mapping[str, Modality],
        *,
        num_gpus: int,
        num_workers: int,
        batch_size: int | None,
        epoch_size: int | None,
        seed: int,
    ):
        self.datasets, self.weights, self.modalities = datasets, weights, modalities
        self.num_gpus, self.num_workers, self.seed = num_gpus, num_workers, seed
        self.batch_size, self.epoch_size = batch_size, epoch_size
        self.epoch = 0
        if len(weights) != len(datasets):
            raise UserError(f"{len(weights)} weights were given for {len(datasets)} data sets")
        if epoch_size is not None and not len(self):
            raise UserError(f"epoch_size {epoch_size} is less than one batch on each of {num_gpus} GPUs")

    def __len__(self) -> int:
        if self.epoch_size is None:
            raise TypeError("this loader has no length because it was built with epoch_size=None")
        return self.epoch_size // (self.num_gpus * (self.batch_size or 1))

    def __iter__(self) -> Iterator[ModDict]:
        length = None if self.epoch_size is None else len(self)
        batches = TrainBatches(
            self.datasets,
            self.weights,
            self.modalities,
            batch_size=self.batch_size or None,
            batches_per_epoch=length,
            rank=torch.distributed.get_rank() if torch.distributed.is_initialized() else 0,
            world_size=self.num_gpus,
            seed=self.seed,
            start_batch=self.epoch * (length or 0),
        )
        self.epoch += 1
        for batch in itertools.islice(BatchLoader(batches, self.num_workers), length):
            yield batch.mod_dict if self.batch_size else as_tensors(batch.mod_dict)


def build_wds_fm_pretraining_dataloader(
    data_path: str,
    all_domains: Sequence[str],
    modality_info: Mapping[str, Mapping[str, Any]],
    modality_transforms: Mapping[str, AbstractTransform],
    image_augmenter: AbstractImageAugmenter,
    text_tokenizer: Any,
    input_tokens_range: TokensRange,
    target_tokens_range: TokensRange,
    num_gpus: int,
    num_workers: int,
    batch_size: int | None,
    epoch_size: int | None,
    sampling_weights: Sequence[float] | None = None,
    modality_name_map: Mapping[str, str] | None = None,
    shuffle_buffer_load: int = 1000,
    shuffle_buffer_repeat: int = 5000,
    n_repeats: int = 5,
    max_bad_fraction: float = 0.01,
    seed: int = 0,
) -> PretrainingLoader:
    """Build training batches from shards.

    Args:
        data_path: ``root/[rgb,caption]/shard-{00000..00099}.tar``.
        modality_info: Entries with input_alphas, target_alphas and, for sequences, keep.
        batch_size: Samples per batch; None = single samples without a batch dimension.
        epoch_size: Samples per epoch over all GPUs; None = endless.
    """
    modalities = _select(modality_info, all_domains)
    source = Shards(data_path, wanted_names(modalities), modality_name_map)
    transform = UnifiedDataTransform(transforms_for(modalities, modality_transforms), image_augmenter)
    masking = UnifiedMasking(
        modalities, text_tokenizer, input_tokens_range, target_tokens_range, sampling_weights=sampling_weights
    )
    dataset = SampleDataset(
        data_path,
        source,
        modalities,
        transform,
        masking,
        shuffle_buffer_load,
        n_repeats,
        shuffle_buffer_repeat,
        max_bad_fraction,
    )
    return PretrainingLoader(
        [dataset],
        [1.0],
        modalities,
        num_gpus=num_gpus,
        num_workers=num_workers,
        batch_size=batch_size,
        epoch_size=epoch_size,
        seed=seed,
    )


def build_mixture_dataloader(
    data_iters: Sequence[PretrainingLoader],
    weights: Sequence[float],
    modality_info: Mapping[str, Mapping[str, Any]],
    batch_size: int | None,
    num_workers: int,
    epoch_size: int | None,
    num_gpus: int,
    seed: int = 0,
) -> PretrainingLoader:
    """Build training batches in which each sample is drawn from one of several data sets.

    Args:
        data_iters: Loaders of single data sets; their batch and epoch sizes are ignored.
        weights: Relative frequency of each data set.
        modality_info: Entries of all their modalities; modalities that a sample lacks become masked rows.
    """
    datasets = [dataset for loader in data_iters for dataset in loader.datasets]
    datasets = [replace(dataset, name=f"{index}: {dataset.name}") for index, dataset in enumerate(datasets)]
    return PretrainingLoader(
        datasets,
        weights,
        _select(modality_info, modality_info),
        num_gpus=num_gpus,
        num_workers=num_workers,
        batch_size=batch_size,
        epoch_size=epoch_size,
        seed=seed,
    )


def build_fm_pretraining_dataset(
    data_path: str,
    all_domains: Sequence[str],
    modality_info: Mapping[str, Mapping[str, Any]],
    modality_transforms: Mapping[str, AbstractTransform],
    image_augmenter: AbstractImageAugmenter,
    text_tokenizer: Any,
    input_tokens_range: TokensRange,
    target_tokens_range: TokensRange,
    sampling_weights: Sequence[float] | None = None,
    modality_name_map: Mapping[str, str] | None = None,
    max_bad_fraction: float = 0.01,
    seed: int = 0,
) -> FolderDataset:
    """Build a map-style data set of folders ``data_path/MODALITY/FOLDER/KEY.EXT``, without a batch dimension."""
    modalities = _select(modality_info, all_domains)
    masking = UnifiedMasking(
        modalities, text_tokenizer, input_tokens_range, target_tokens_range, sampling_weights=sampling_weights
    )
    ledger = BadSampleLedger(data_path, max_bad_fraction)
    source = Folders(data_path, wanted_names(modalities), modality_name_map, ledger)
    transform = UnifiedDataTransform(transforms_for(modalities, modality_transforms), image_augmenter)
    samples = SampleDataset(data_path, source, modalities, transform, masking)
    return FolderDataset(samples, source.all(ledger), seed)


class FolderDataset(Dataset):
    """A map-style data set. An index always gives the same crop and masks; another ``seed`` gives different ones."""

    def __init__(self, dataset: SampleDataset, samples: Sequence[RawSample], seed: int):
        self._dataset, self._samples, self.seed = dataset, samples, seed

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> ModDict:
        sample = self._samples[index]
        try:
            masked = self._dataset.masked(sample, generator(self.seed, "sample", index))
        except BadSample as error:
            raise DataError(str(error)) from error
        return as_tensors(single(masked, self._dataset.modalities))


def _select(modality_info: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, Modality]:
    return {name: as_modality(name, modality_info[name]) for name in names}
