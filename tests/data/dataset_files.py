"""Small data sets on disk, written on the fly."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import tokenizers
import webdataset
from PIL import Image

CROPS = 3
MAX_SAMPLES = 80  # tokens of sample i are 3 i + crop, below VOCAB
VOCAB = 256

MODALITIES = {
    "rgb@32": {"type": "img", "input_size": 32, "patch_size": 16, "num_channels": 3, "path": "rgb"},
    "tok_rgb@32": {"type": "img", "vocab_size": VOCAB, "input_size": 32, "patch_size": 16, "path": "tok_rgb"},
    "caption": {"max_tokens": 12},
    "det": {"max_tokens": 20},
}


def text_tokenizer() -> tokenizers.Tokenizer:
    """A word is a token."""
    words = ["[PAD]", "[UNK]", "[SOS]", "[EOS]", *(f"[S_{i}]" for i in range(200))]
    words += [f"v{i}={value}" for i in range(4) for value in range(1000)] + ["dog", "sample", "crop"]
    words += [f"s{i}" for i in range(MAX_SAMPLES)] + [f"c{i}" for i in range(CROPS)]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:204])
    return tokenizer


def jpeg(rng: np.random.Generator, size: tuple[int, int] = (48, 40)) -> bytes:
    buffer = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def crop_settings(rng: np.random.Generator, height: int = 48, width: int = 40, crops: int = CROPS) -> np.ndarray:
    rows = [(4, 0, 40, 40, 0)]
    for _ in range(crops - 1):
        side = int(rng.integers(20, 40))
        rows.append((rng.integers(height - side), rng.integers(width - side), side, side, rng.integers(2)))
    return np.array(rows)


def sample(index: int) -> dict[str, tuple[str, bytes]]:
    """{folder: (extension, content)}; which sample it is can be read off its caption and its tokens."""
    rng = np.random.default_rng(index)
    boxes = [{"boxes": sorted(rng.random(2).tolist()) * 2, "class_name": "dog", "score": 0.9} for _ in range(index % 3)]
    return {
        "rgb": ("jpg", jpeg(rng)),
        "caption": ("json", json.dumps([f"sample s{index} crop c{crop}" for crop in range(CROPS)]).encode()),
        "det": ("json", json.dumps({"instances": boxes}).encode()),
        "tok_rgb": ("npy", npy(np.repeat(index * CROPS + np.arange(CROPS, dtype=np.int16)[:, None], 4, axis=1))),
        "crop_settings": ("npy", npy(crop_settings(rng))),
    }


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for name, content in members:
            key, _, extension = name.partition(".")
            tar.write({"__key__": key, extension: content})


def write_shards(root: Path, num_shards: int, per_shard: int, change=None, shuffle: bool = True) -> str:
    """One tar per modality, the order of members different in each; returns the data_path.

    Args:
        change: (folder, index, extension, content) → what to write instead, None to leave the member out.
    """
    folders = list(sample(0))
    for shard in range(num_shards):
        samples = {i: sample(i) for i in range(shard * per_shard, (shard + 1) * per_shard)}
        for number, folder in enumerate(folders):
            order = list(samples)
            if shuffle:
                np.random.default_rng(number).shuffle(order)
            members = []
            for i in order:
                extension, content = samples[i][folder]
                if change is not None:
                    content = change(folder, i, extension, content)
                if content is not None:
                    members.append((f"{i:05d}.{extension}", content))
            write_tar(root / folder / f"shard-{shard:05d}.tar", members)
    return f"{root}/[{','.join(folders)}]/shard-{{00000..{num_shards - 1:05d}}}.tar"


def write_folders(root: Path, count: int, leave_out=()) -> str:
    for index in range(count):
        for folder, (extension, content) in sample(index).items():
            path = root / folder / f"part{index % 2}" / f"{index:05d}.{extension}"
            if (folder, index) not in leave_out:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    return str(root)
