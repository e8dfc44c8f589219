"""Training batches of small data sets, and comparisons of them."""

import itertools

import torch
import yaml

from fourm.data.data_config import load_data_config
from fourm.data.unified_datasets import build_train_loader
from tests.data.dataset_files import MODALITIES, text_tokenizer

TOKENIZER = text_tokenizer()
ALL = "rgb@32-tok_rgb@32-caption-det"


def config(tmp_path, *paths, weights=None, **options):
    """A data config with one data set per path: "d0", "d1", …"""
    defaults = {
        "in_domains": ALL,
        "out_domains": ALL.removeprefix("rgb@32-"),
        "input_alphas": 1.0,
        "target_alphas": 1.0,
        "main_augment_domain": "rgb@32",
        "use_wds": True,
        "wds_n_repeats": 2,
        "wds_shuffle_buffer_tar": 6,
        "wds_shuffle_buffer_repeat": 10,
        "modality_name_map": {},
        "max_bad_fraction": 0.5,
    }
    datasets = {f"d{i}": defaults | {"data_path": str(path)} | options for i, path in enumerate(paths)}
    if len(paths) > 1:  # the second has no images
        datasets["d1"] |= {"in_domains": "caption-det", "out_domains": "caption-det"}
    content = {"modalities": MODALITIES, "train": {"datasets": datasets}}
    if weights:
        content["train"]["weights"] = weights
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_data_config(path, num_input_tokens=12, num_target_tokens=12)


def train(
    config,
    count,
    *,
    batch_size=4,
    per_epoch=5,
    workers=0,
    rank=0,
    ranks=1,
    start=0,
    positions=None,
    streams=None,
    seed=3,
):
    loader = build_train_loader(
        config,
        TOKENIZER,
        batch_size=batch_size,
        batches_per_epoch=per_epoch,
        num_workers=workers,
        rank=rank,
        world_size=ranks,
        seed=seed,
        start_batch=start,
        draws_by_stream=positions,
        num_streams=streams,
    )
    return list(itertools.islice(loader, count))


def same(a, b):
    """Bit for bit the same batch."""
    return list(a) == list(b) and all(torch.equal(a[m][k], b[m][k]) for m in a for k in a[m])


def indices(batch):
    return (batch.mod_dict["tok_rgb@32"]["tensor"][:, 0] // 3).tolist()
