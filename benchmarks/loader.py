"""Measure the samples per second of the data pipeline on one core, or the memory of a worker process.

    OMP_NUM_THREADS=1 python benchmarks/loader.py
    OMP_NUM_THREADS=1 python benchmarks/loader.py --modalities 7 21 --repeats 4
    OMP_NUM_THREADS=1 python benchmarks/loader.py --single
    OMP_NUM_THREADS=1 python benchmarks/loader.py --modalities 7 21 --repeats 4 --memory_samples 100000

It uses the published mixtures of 7 and 21 modalities, JPEGs of 256 to 400 px, and 128/128 and 256/256 tokens. It prints
one JSON line per number of modalities and number of repeats: samples/s, also per second of processor time (of the
worker processes, if there are any), the processor time of each stage, and the growth of memory during the measurement.
With ``--single``, samples come one by one, with normalised pixels, from ``build_wds_fm_pretraining_dataloader``. With
``--memory_samples`` it prints ten lines with the resident memory of the worker processes instead.
``benchmarks/loader_trees.py`` compares two versions of the code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from toy_shards import ToySamples, photographs, vocabulary, write_shards

import fourm
from fourm.data import build_wds_fm_pretraining_dataloader, unified_datasets
from fourm.data.data_config import build_sample_transform, load_data_config
from fourm.data.decoding import EncodedImage
from fourm.data.masking import UnifiedMasking
from fourm.data.modality_transforms import MODALITY_TRANSFORMS, PixelTransform, UnifiedDataTransform
from fourm.data.raw_sample import OpenFiles, RawSample
from fourm.data.shards import Shards
from fourm.data.transforms import image
from fourm.data.unified_datasets import build_train_loader
from fourm.utils.errors import run_cli
from fourm.utils.tokenizer import TextEncoder

Sample = dict[str, dict[str, Tensor]]
DATA = Path(__file__).parent.parent / "cfgs/default/4m/data"
PUBLISHED = {
    7: "cc12m/main/mix_mod7_all2all_rgb2all_a0.5.yaml",
    21: "cc12m+coyo+c4/main/mix_mod21_all2allmix_rgb2all_capT5bias_C4.yaml",
}
"""Number of modalities → data configuration, whose data set CC12M is measured."""
TOKENS = {7: 128, 21: 256}
"""Number of modalities → token budget of inputs and of targets."""
STAGES = (
    (Shards, "_join", "index"),
    (RawSample, "values", "read"),
    (OpenFiles, "read", "read_files"),
    (UnifiedMasking, "draw_budgets", "budgets"),
    (UnifiedDataTransform, "preprocess", "preprocess"),
    (UnifiedDataTransform, "augment", "transform"),
    (UnifiedDataTransform, "__call__", "transform"),
    (EncodedImage, "pixels", "transform_decode"),
    (image, "resize", "transform_resize"),
    (PixelTransform, "postprocess", "transform_normalise"),
    (UnifiedMasking, "apply", "masking"),
    (TextEncoder, "__call__", "masking_text"),
    (unified_datasets, "collate", "collate"),
    (unified_datasets, "single", "collate"),
)
"""Class or module, function, and the stage that it is; ``read_files`` is a part of ``read``."""
TIMES: defaultdict[str, float] = defaultdict(float)
TOKENIZER = Path(fourm.__file__).parent / "utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json"


def published(modalities: int) -> dict[str, Any]:
    """Return the data set of CC12M in a published data configuration."""
    return yaml.safe_load((DATA / PUBLISHED[modalities]).read_text())["train"]["datasets"]["cc12m"]


def write_samples(root: Path, tokenizer: Path, modalities: int, num_shards: int, per_shard: int) -> str:
    """Write shards with the folders of a published data set, and return their ``data_path``."""
    folders = published(modalities)["data_path"].split("[")[1].split("]")[0].split(",")
    samples = ToySamples(photographs(), vocabulary(tokenizer))
    return write_shards(root, samples, folders, num_shards, per_shard)


def config(root: Path, data_path: str, modalities: int, repeats: int) -> Path:
    """Write the data configuration of a published data set with another ``data_path``."""
    dataset = published(modalities) | {"data_path": data_path, "wds_n_repeats": repeats}
    dataset["alphas_config"] = str(DATA.parents[3] / dataset["alphas_config"])
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump({"train": {"datasets": {"benchmark": dataset}}}))
    return path


def timed(owner: Any, method: str, stage: str) -> None:
    """Add the processor time spent in a method to ``TIMES[stage]``."""
    original = getattr(owner, method)

    def wrapper(*args, **kwargs):
        start = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            TIMES[stage] += time.process_time() - start

    setattr(owner, method, wrapper)


def batches(data: Path, tokenizer: Path, tokens: int, **options: Any) -> Iterator[Sample]:
    """Return the batches of a training run."""
    loaded = load_data_config(data, num_input_tokens=tokens, num_target_tokens=tokens)
    stream = {"batches_per_epoch": 10**9, "rank": 0, "world_size": 1, "seed": 0}
    return (batch.mod_dict for batch in build_train_loader(loaded, tokenizer, **stream, **options))


def single_samples(data: Path, tokenizer: Path, tokens: int, num_workers: int = 0) -> Iterator[Sample]:
    """Return single samples of the published function, with the data set's crops, buffers and repeats."""
    (dataset,) = load_data_config(data, num_input_tokens=tokens, num_target_tokens=tokens).train.values()
    augmenter = build_sample_transform(dataset, training=True).image_augmenter
    loader = build_wds_fm_pretraining_dataloader(
        dataset.data_path,
        list(dataset.modalities),
        dataset.modalities,
        MODALITY_TRANSFORMS,
        augmenter,
        tokenizer,
        tokens,
        tokens,
        num_gpus=1,
        num_workers=num_workers,
        batch_size=None,
        epoch_size=None,
        sampling_weights=dataset.sampling_weights,
        shuffle_buffer_load=dataset.wds_shuffle_buffer_tar,
        shuffle_buffer_repeat=dataset.wds_shuffle_buffer_repeat,
        n_repeats=dataset.wds_n_repeats,
    )
    return iter(loader)


def measure(loader: Iterator[Sample], samples: int, batch_size: int) -> Iterator[dict[str, float]]:
    """Yield samples/s, milliseconds per sample and stage, MB of a batch, and growth of the resident memory in MB."""
    count = samples // batch_size
    for _ in range(count // 2):  # until the buffers are full and contain their maximum number of decoded samples
        next(loader)
    TIMES.clear()
    memory = _resident_mb(os.getpid())
    start, start_cpu = time.perf_counter(), _cpu_seconds()
    for _ in range(count):
        batch = next(loader)
    seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - start_cpu
    milliseconds = {f"{stage}_ms": round(1000 * t / (count * batch_size), 3) for stage, t in TIMES.items()}
    yield {
        "samples_per_s": round(count * batch_size / seconds, 1),
        "samples_per_cpu_s": round(count * batch_size / cpu_seconds, 1),
        **milliseconds,
        "batch_mb": round(sum(t.nbytes for entry in batch.values() for t in entry.values()) / 1e6, 2),
        "memory_growth_mb": round(_resident_mb(os.getpid()) - memory, 1),
    }


def measure_memory(loader: Iterator[Sample], samples: int, batch_size: int) -> Iterator[dict[str, float]]:
    """Yield the resident memory of the worker processes in MB after each tenth of the samples."""
    for tenth in range(1, 11):
        for _ in range(samples // batch_size // 10):
            next(loader)
        resident = sum(_resident_mb(worker.pid) for worker in multiprocessing.active_children())
        yield {"samples": samples * tenth // 10, "workers_resident_mb": round(resident, 1)}


def _cpu_seconds() -> float:
    """Return the processor time of the worker processes or, if there are none, of this process."""
    workers = multiprocessing.active_children()
    if not workers:
        return time.process_time()
    # The fields after the name of the process, which is in parentheses.
    fields = [Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split() for worker in workers]
    return sum(int(user) + int(system) for *_, user, system in (row[:13] for row in fields)) / os.sysconf("SC_CLK_TCK")


def _resident_mb(process: int | None) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modalities", type=int, nargs="+", default=[7], choices=list(PUBLISHED))
    parser.add_argument("--samples", type=int, default=4000, help="number of samples to measure")
    parser.add_argument(
        "--memory_samples", type=int, help="measure the memory of a worker over this number of samples instead"
    )
    parser.add_argument("--repeats", type=int, nargs="+", default=[4, 1], help="values of wds_n_repeats")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0, help="0 runs in this process, with times per stage")
    parser.add_argument("--single", action="store_true", help="single samples instead of batches")
    parser.add_argument("--float_pixels", action="store_true", help="normalize in the loader instead of on the device")
    parser.add_argument("--text_tokenizer_path", type=Path, default=TOKENIZER)
    parser.add_argument("--shards", type=int, default=10)
    parser.add_argument("--per_shard", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for owner, method, stage in STAGES:
        if hasattr(owner, method):  # other versions of the code may have other steps
            timed(owner, method, stage)
    tokenizer, batch_size = options.text_tokenizer_path, 1 if options.single else options.batch_size
    num_workers = options.num_workers or int(options.memory_samples is not None)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for modalities in options.modalities:
            shards = root / str(modalities)
            data_path = write_samples(shards, tokenizer, modalities, options.shards, options.per_shard)
            for repeats in options.repeats:
                data = config(root, data_path, modalities, repeats)
                if options.single:
                    loader = single_samples(data, tokenizer, TOKENS[modalities], num_workers)
                else:
                    loader = batches(
                        data,
                        tokenizer,
                        TOKENS[modalities],
                        batch_size=batch_size,
                        num_workers=num_workers,
                        raw_pixels=not options.float_pixels,
                    )
                if options.memory_samples is None:
                    results = measure(loader, options.samples, batch_size)
                else:
                    results = measure_memory(loader, options.memory_samples, batch_size)
                settings = {"modalities": modalities, "repeats": repeats, "num_workers": num_workers}
                for result in results:
                    print(json.dumps(settings | result), flush=True)


if __name__ == "__main__":
    run_cli(main)
