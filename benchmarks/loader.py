"""Samples per second of the data pipeline on one core: seven modalities, JPEGs of 256 to 400 px, 128/128 tokens.

    OMP_NUM_THREADS=1 python benchmarks/loader.py

Prints one JSON line per number of repeats: samples/s, the time of each stage, and how memory grew during the measurement.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
import yaml
from PIL import Image

import fourm
from fourm.data import unified_datasets
from fourm.data.data_config import load_data_config
from fourm.data.masking import UnifiedMasking
from fourm.data.modality_transforms import UnifiedDataTransform
from fourm.data.raw_sample import RawSample
from fourm.data.unified_datasets import build_train_loader
from fourm.utils.errors import MissingDependency, run_cli

TOKENS = {"tok_rgb": 16384, "tok_depth": 8192, "tok_normal": 8192, "tok_semseg": 4096, "tok_clip": 8192}
CROPS = 10
STAGES = (
    (RawSample, "values", "read"),
    (UnifiedMasking, "draw_budgets", "budgets"),
    (UnifiedDataTransform, "__call__", "transform"),
    (UnifiedMasking, "apply", "masking"),
    (unified_datasets, "collate", "collate"),
)
TIMES: defaultdict[str, float] = defaultdict(float)
TOKENIZER = Path(fourm.__file__).parent / "utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json"
CLASSES = ("person", "dog", "car", "bicycle", "dining table")


def photographs() -> list[Image.Image]:
    """The pictures bundled with scikit-image."""
    try:
        from skimage import data
    except ImportError:
        raise MissingDependency("scikit-image", "the benchmark of the loader") from None
    return [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "chelsea", "coffee")]


def vocabulary(path: Path) -> list[str]:
    """The words that a text vocabulary holds as a whole, in the order of their ids: that of their frequency."""
    pieces = json.loads(path.read_text())["model"]["vocab"]
    return sorted((piece for piece in pieces if piece.isalpha() and len(piece) > 1), key=pieces.get)


def members(index: int, pictures: list[Image.Image], words: list[str]) -> dict[str, bytes]:
    """{"folder.extension": content} of one sample."""
    rng = np.random.default_rng(index)
    width, height = (int(side) for side in rng.integers(256, 401, 2))
    picture = pictures[index % len(pictures)]
    left, top = (int(rng.integers(0, side // 4)) for side in picture.size)
    part = picture.crop((left, top, left + picture.width * 3 // 4, top + picture.height * 3 // 4))
    jpeg = io.BytesIO()
    part.resize((width, height)).save(jpeg, "JPEG", quality=90)
    crops = []
    for _ in range(CROPS):
        side = int(min(width, height) * rng.uniform(0.45, 1))
        crops.append((rng.integers(height - side + 1), rng.integers(width - side + 1), side, side, rng.integers(2)))
    corners = rng.random((10, 2, 2))
    boxes = [
        {"boxes": [*c.min(0).tolist(), *c.max(0).tolist()], "class_name": CLASSES[i % 5], "score": 0.9}
        for i, c in enumerate(corners)
    ]
    frequency = 1 / np.arange(10, 10 + len(words))
    captions = rng.choice(words, (CROPS, 14), p=frequency / frequency.sum())
    arrays = {name: rng.integers(0, vocab, (CROPS, 196)).astype(np.int16) for name, vocab in TOKENS.items()}
    arrays["crop_settings"] = np.array(crops)
    return {
        "rgb.jpg": jpeg.getvalue(),
        "caption.json": json.dumps([" ".join(row) for row in captions]).encode(),
        "det.json": json.dumps({"instances": boxes}).encode(),
        **{f"{name}.npy": _npy(array) for name, array in arrays.items()},
    }


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_shards(root: Path, tokenizer: Path, num_shards: int, per_shard: int) -> str:
    """The data_path of freshly written shards, one tar per modality."""
    pictures, words = photographs(), vocabulary(tokenizer)
    for shard in range(num_shards):
        writers: dict[str, webdataset.TarWriter] = {}
        for index in range(shard * per_shard, (shard + 1) * per_shard):
            for name, content in members(index, pictures, words).items():
                folder, _, extension = name.partition(".")
                if folder not in writers:
                    (root / folder).mkdir(exist_ok=True)
                    writers[folder] = webdataset.TarWriter(f"{root}/{folder}/shard-{shard:05d}.tar")
                writers[folder].write({"__key__": f"{index:07d}", extension: content})
        for writer in writers.values():
            writer.close()
    return f"{root}/[{','.join(writers)}]/shard-{{00000..{num_shards - 1:05d}}}.tar"


def config(root: Path, data_path: str, repeats: int) -> Path:
    targets = "-".join(["caption", "det", *(f"{name}@224" for name in TOKENS)])
    dataset = {
        "in_domains": f"rgb@224-{targets}", "out_domains": targets, "data_path": data_path, "use_wds": True,
        "alphas_config": str(root / "alphas.yaml"), "wds_n_repeats": repeats,
        "modality_name_map": {name: f"{name}@224" for name in TOKENS},
    }  # fmt: skip
    both = {"input_alphas": [0.0, 0.5], "target_alphas": [0.5, 0.5]}
    alphas = {name: dict(both) for name in targets.split("-")}
    alphas |= {"rgb@224": {"input_alphas": [1000.0, 0.5], "target_alphas": [0.0, 0.0]}}
    for name in ("caption", "det"):
        alphas[name]["keep"] = ["random", "random"]
    (root / "alphas.yaml").write_text(yaml.safe_dump(alphas))
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump({"train": {"datasets": {"benchmark": dataset}}}))
    return path


def timed(owner: Any, method: str, stage: str) -> None:
    """Add up the time spent in a function under ``stage``."""
    original = getattr(owner, method)

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            TIMES[stage] += time.perf_counter() - start

    setattr(owner, method, wrapper)


def measure(
    data: Path, tokenizer: Path, samples: int, batch_size: int, num_workers: int, raw_pixels: bool
) -> dict[str, float]:
    """Samples/s, milliseconds per sample of each stage, MB of a batch, and growth of the resident memory in MB."""
    loader = iter(
        build_train_loader(
            load_data_config(data, num_input_tokens=128, num_target_tokens=128), tokenizer, batch_size=batch_size,
            batches_per_epoch=10**9, num_workers=num_workers, rank=0, world_size=1, seed=0, raw_pixels=raw_pixels,
        )
    )  # fmt: skip
    count = samples // batch_size
    for _ in range(count // 2):  # until the buffers are full and hold as many decoded samples as they ever will
        next(loader)
    TIMES.clear()
    memory, start, start_cpu = _resident_mb(), time.perf_counter(), time.process_time()
    for _ in range(count):
        batch = next(loader)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    milliseconds = {f"{stage}_ms": round(1000 * t / (count * batch_size), 3) for stage, t in TIMES.items()}
    return {
        "samples_per_s": round(count * batch_size / seconds, 1),
        **({} if num_workers else {"samples_per_cpu_s": round(count * batch_size / cpu_seconds, 1)}),
        **milliseconds,
        "batch_mb": round(sum(t.nbytes for entry in batch.mod_dict.values() for t in entry.values()) / 1e6, 2),
        "memory_growth_mb": round(_resident_mb() - memory, 1),
    }


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000, help="samples to measure")
    parser.add_argument("--repeats", type=int, nargs="+", default=[4, 1], help="values of wds_n_repeats")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0, help="0: all in this process, with times per stage")
    parser.add_argument("--float_pixels", action="store_true", help="normalise in the loader instead of on the device")
    parser.add_argument("--text_tokenizer_path", type=Path, default=TOKENIZER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for owner, method, stage in STAGES:
        timed(owner, method, stage)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data_path = write_shards(root, options.text_tokenizer_path, num_shards=10, per_shard=200)
        for repeats in options.repeats:
            result = measure(
                config(root, data_path, repeats), options.text_tokenizer_path, options.samples, options.batch_size,
                options.num_workers, not options.float_pixels,
            )  # fmt: skip
            print(json.dumps({"repeats": repeats, "num_workers": options.num_workers, **result}), flush=True)


if __name__ == "__main__":
    run_cli(main)
