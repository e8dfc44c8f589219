"""The published functions: mod_dicts, epochs, single samples and mixtures."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fourm.data import (
    build_fm_pretraining_dataset,
    build_mixture_dataloader,
    build_wds_fm_pretraining_dataloader,
)
from fourm.data.image_augmenter import EmptyAugmenter, PreTokenizedImageAugmenter
from fourm.data.modality_info import resolve_modalities
from fourm.data.modality_transforms import MODALITY_TRANSFORMS
from fourm.utils.errors import DataError, UserError
from tests.data.dataset_files import MODALITIES, VOCAB, npy, text_tokenizer, write_folders, write_shards


def info(as_dicts):
    alphas = {"input_alphas": (1.0,), "target_alphas": (1.0,)}
    entries = resolve_modalities(MODALITIES, MODALITIES).items()
    filled = {
        name: dataclasses.replace(m, **alphas, keep=("random",) if m.type == "seq" else ()) for name, m in entries
    }
    return {name: dict(m) for name, m in filled.items()} if as_dicts else filled


def arguments(path, domains=tuple(MODALITIES), as_dicts=False):
    augmenter = PreTokenizedImageAugmenter(32, main_domain="rgb@32") if "rgb@32" in domains else EmptyAugmenter()
    return {
        "data_path": str(path),
        "all_domains": list(domains),
        "modality_info": info(as_dicts),
        "modality_transforms": MODALITY_TRANSFORMS,
        "image_augmenter": augmenter,
        "text_tokenizer": text_tokenizer(),
        "input_tokens_range": (4, 12),
        "target_tokens_range": 12,
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), 2, 5)


@pytest.mark.parametrize("as_dicts", [False, True])
def test_each_pass_is_a_new_epoch_of_epoch_size_samples(shards, as_dicts):
    loader = build_wds_fm_pretraining_dataloader(
        **arguments(shards, as_dicts=as_dicts), num_gpus=1, num_workers=2, batch_size=4, epoch_size=12
    )
    first, second = list(loader), list(loader)
    assert len(loader) == len(first) == len(second) == 3
    assert first[0]["rgb@32"]["tensor"].shape == (4, 3, 32, 32) and list(first[0]) == list(MODALITIES)
    assert not torch.equal(first[0]["caption"]["tensor"], second[0]["caption"]["tensor"])


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_single_samples_of_a_worker_are_those_made_here(shards):
    single = {"num_gpus": 1, "batch_size": None, "epoch_size": 3}
    here, sent = (
        list(build_wds_fm_pretraining_dataloader(**arguments(shards), **single, num_workers=workers))
        for workers in (0, 1)
    )
    for expected, got in zip(here, sent, strict=True):
        for name, fields in expected.items():
            assert not any(got[name][field].is_shared() for field in fields)
            assert all(torch.equal(got[name][field], tensor) for field, tensor in fields.items())


def test_single_samples_without_end(shards):
    loader = build_wds_fm_pretraining_dataloader(
        **arguments(shards), num_gpus=1, num_workers=0, batch_size=None, epoch_size=None, n_repeats=1
    )
    samples = list(itertools.islice(loader, 30))
    assert len(samples) == 30 and samples[0]["tok_rgb@32"]["tensor"].shape == (4,)
    with pytest.raises(TypeError):
        len(loader)


def test_token_ids_are_checked_against_the_vocabulary(tmp_path):
    content = npy(np.full((3, 4), VOCAB))
    path = write_shards(tmp_path, 1, 2, lambda folder, i, _, original: content if folder == "tok_rgb" else original)
    loader = build_wds_fm_pretraining_dataloader(
        **arguments(path), num_gpus=1, num_workers=0, batch_size=1, epoch_size=None
    )
    with pytest.raises(DataError, match=f"tok_rgb/shard-00000.tar.*tok_rgb@32: token id {VOCAB} lies outside"):
        next(iter(loader))


def test_mixture_of_loaders(shards):
    single = {"num_gpus": 1, "num_workers": 0, "batch_size": None, "epoch_size": None}
    loaders = [
        build_wds_fm_pretraining_dataloader(**arguments(shards), **single),
        build_wds_fm_pretraining_dataloader(**arguments(shards, ("caption", "det")), **single),
    ]
    mixture = build_mixture_dataloader(
        loaders, [0.7, 0.3], info(False), batch_size=50, num_workers=0, epoch_size=100, num_gpus=1
    )
    batches = list(mixture)
    assert len(batches) == 2
    entry = batches[0]["tok_rgb@32"]
    absent = (entry["input_mask"].all(1) & entry["target_mask"].all(1)).float().mean()
    assert 0.1 < absent < 0.5
    with pytest.raises(UserError, match="3 weights were given for 2 data sets"):
        build_mixture_dataloader(loaders, [1, 1, 1], info(False), batch_size=1, num_workers=0, epoch_size=1, num_gpus=1)
    with pytest.raises(UserError, match="epoch_size 5 is less than one batch on each of 2 GPUs"):
        build_mixture_dataloader(loaders, [1, 1], info(False), batch_size=3, num_workers=0, epoch_size=5, num_gpus=2)


def test_folder_dataset_by_index(tmp_path):
    dataset = build_fm_pretraining_dataset(**arguments(write_folders(tmp_path, 5)))
    assert len(dataset) == 5
    again, sample = dataset[3], dataset[3]
    assert sample["rgb@32"]["tensor"].shape == (3, 32, 32)
    assert all(torch.equal(sample[m][k], again[m][k]) for m in sample for k in sample[m])
    (tmp_path / "caption" / "part1" / "00003.json").write_text("{")
    with pytest.raises(DataError, match="00003.json: key 'part1/00003'"):
        dataset[4]  # nothing of it was kept
