"""Stage 1: render scenes to files in the published layout, as shards for training and folders for validation.

The unit of work is a shard or a folder of validation samples. One process renders all of it and writes each file or
folder atomically, so that an interrupted run loses at most the units in progress, and renders them identically when it
is restarted.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fourm.demo import annotations as note
from fourm.demo.scene import draw_scene
from fourm.demo.simulator import FAR, Simulator
from fourm.utils.files import atomic_path
from fourm.utils.seeds import generator

EXTENSIONS = {
    "rgb": "jpg",
    "depth": "png",
    "normal": "png",
    "semseg": "png",
    "canny_edge": "png",
    "det": "json",
    "caption": "txt",
    "color_palette": "json",
    "metadata": "json",
}


@dataclass(frozen=True)
class Unit:
    """The samples [start, stop) of a split, which are written together.

    Attributes:
        root: Folder of the data set.
        split: ``train`` for a tar file per modality, or ``val`` for a folder per modality.
        number: Number of the shard or folder.
        start: Index of the first sample.
        stop: Index after the last sample.
    """

    root: Path
    split: str
    number: int
    start: int
    stop: int

    def path(self, modality: str) -> Path:
        name = f"shard-{self.number:05d}.tar" if self.split == "train" else f"{self.number:05d}"
        return self.root / self.split / modality / name

    def is_done(self) -> bool:
        return all(self.path(modality).exists() for modality in EXTENSIONS)


def units(root: Path, split: str, count: int, size: int) -> list[Unit]:
    """Divide ``count`` samples of a split into units of ``size`` samples."""
    starts = range(0, count, size)
    return [Unit(root, split, number, start, min(start + size, count)) for number, start in enumerate(starts)]


def render_sample(simulator: Simulator, size: int, key: tuple) -> dict[str, bytes]:
    """Render one sample, which depends on ``size`` and ``key`` only.

    Returns:
        Modality → content of its file.
    """
    random = generator(*key)
    views = (simulator.render(draw_scene(random, simulator.footprint), size) for _ in itertools.count())
    view = next(view for view in views if note.is_clear(view))
    seen = note.visible_toys(view)
    normal = note.normals(view.depth, view.camera)
    text = note.caption(seen, view.scene.ground, random)
    values: dict[str, Any] = {
        "rgb": view.rgb,
        "depth": (view.depth.clip(0, FAR) / FAR * 65535).round().astype(np.uint16),
        "normal": ((normal + 1) * 127.5).round().astype(np.uint8),
        "semseg": note.class_ids(view),
        "canny_edge": note.edges(view.rgb).astype(np.uint8) * 255,
        "det": note.detections(seen),
        "caption": text,
        "color_palette": note.color_palette(view.rgb),
        "metadata": note.metadata(view, seen, normal, text),
    }
    return {modality: _encode(values[modality], extension) for modality, extension in EXTENSIONS.items()}


def render_unit(unit: Unit, size: int, seed: int, simulator: Simulator) -> int:
    """Render and write one unit, and return its number of samples."""
    keys = [f"{index:06d}" for index in range(unit.start, unit.stop)]
    samples = [render_sample(simulator, size, (seed, "scene", unit.split, int(key))) for key in keys]
    write = _write_tar if unit.split == "train" else _write_folder
    for modality, extension in EXTENSIONS.items():
        files = {f"{key}.{extension}": sample[modality] for key, sample in zip(keys, samples, strict=True)}
        with atomic_path(unit.path(modality)) as path:
            write(path, files)
    return len(keys)


def render_all(all_units: list[Unit], size: int, seed: int, workers: int) -> None:
    """Render the units that do not exist yet, in ``workers`` processes."""
    missing = [unit for unit in all_units if not unit.is_done()]
    total = sum(unit.stop - unit.start for unit in all_units)
    done = total - sum(unit.stop - unit.start for unit in missing)
    with tqdm(total=total, initial=done, unit=" scenes", desc="render", disable=None) as bar:
        for count in _render_in_parallel(missing, size, seed, workers):
            bar.update(count)
    print(f"{total} scenes, {total - done} of them rendered now")


def _render_in_parallel(missing: list[Unit], size: int, seed: int, workers: int) -> Iterator[int]:
    if not missing:
        return
    context = multiprocessing.get_context("spawn")  # the renderer does not survive a fork
    with context.Pool(min(workers, len(missing)), _start_worker) as pool:
        yield from pool.imap_unordered(partial(_render_in_worker, size=size, seed=seed), missing)


_simulator: Simulator | None = None  # one per worker process, because loading the meshes takes a second


def _start_worker() -> None:
    global _simulator
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process stops its workers
    _simulator = Simulator()


def _render_in_worker(unit: Unit, size: int, seed: int) -> int:
    assert _simulator is not None
    return render_unit(unit, size, seed, _simulator)


def _encode(value: Any, extension: str) -> bytes:
    if extension == "txt":
        return value.encode()
    if extension == "json":
        return json.dumps(value).encode()
    buffer = io.BytesIO()
    options = {"quality": 92} if extension == "jpg" else {}
    Image.fromarray(value).save(buffer, {"jpg": "JPEG", "png": "PNG"}[extension], **options)
    return buffer.getvalue()


def _write_tar(path: Path, files: dict[str, bytes]) -> None:
    import webdataset

    with path.open("wb") as tar, webdataset.TarWriter(tar, mtime=0) as writer:
        for name, content in files.items():
            key, extension = name.split(".")
            writer.write({"__key__": key, extension: content})


def _write_folder(path: Path, files: dict[str, bytes]) -> None:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
