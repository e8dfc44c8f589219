"""Small data sets of images on disk: noise with one bright square, at the same place in colour and in depth."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

SIZE = (72, 96)  # height, width


def square(index: int) -> tuple[int, int, int]:
    """Top, left and side of the bright square of image ``index``."""
    rng = np.random.default_rng(index)
    return int(rng.integers(20, 30)), int(rng.integers(30, 45)), 20


def image(modality: str, index: int, size: tuple[int, int] = SIZE) -> bytes:
    top, left, side = square(index)
    values = np.random.default_rng(index + 1000).random(SIZE) * 0.2
    values[top : top + side, left : left + side] = 1
    if modality == "rgb":
        picture = Image.fromarray((values * 255).astype(np.uint8)).convert("RGB")
    elif modality == "depth":
        picture = Image.fromarray((values * 65535).astype(np.uint16))
    else:  # semseg: ground and object
        picture = Image.fromarray((values > 0.5).astype(np.uint8) * 3)
    buffer = io.BytesIO()
    picture.resize(size[::-1], Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(root: Path, modality: str, count: int, size: tuple[int, int] = SIZE) -> None:
    for index in range(count):
        path = root / modality / f"part{index % 2}" / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(modality, index, size))


def write_shards(root: Path, modality: str, count: int, per_shard: int) -> None:
    """The same images, under the same keys."""
    (root / modality).mkdir(parents=True, exist_ok=True)
    for start in range(0, count, per_shard):
        with TarWriter(str(root / modality / f"shard-{start // per_shard:05d}.tar")) as tar:
            for index in range(start, min(start + per_shard, count)):
                tar.write({"__key__": f"part{index % 2}/{index:05d}", "png": image(modality, index)})


def read_files(folder: Path) -> dict[str, np.ndarray]:
    paths = sorted(path for path in folder.rglob("*.npy"))
    return {path.relative_to(folder).with_suffix("").as_posix(): np.load(path) for path in paths}
