"""Write toy shards of any published modalities, with crops of photographs and random values in realistic shapes."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from fourm.data.modality_info import MODALITY_INFO
from fourm.data.transforms.sequence import METADATA
from fourm.utils.tokenizer.special_tokens import COCO_CLASSES

CROPS = 10
WORDS = 14  # per caption
BOXES = 10
PEOPLE = (0, 0, 1, 2, 4)  # equally likely numbers of people in a picture
INSTANCES, OUTLINE = 20, 32  # instances per crop, and points per instance


def photographs() -> list[Image.Image]:
    """Return three pictures that are bundled with scikit-image."""
    from fourm.utils.dependencies import optional_import  # loader_trees.py imports this file with older versions

    with optional_import("scikit-image", "the benchmark of the loader"):
        from skimage import data
    return [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "chelsea", "coffee")]


def vocabulary(path: Path) -> list[str]:
    """Return the whole words in a text vocabulary in the order of their ids, which is that of their frequency."""
    pieces = json.loads(path.read_text())["model"]["vocab"]
    return sorted((piece for piece in pieces if piece.isalpha() and len(piece) > 1), key=pieces.get)


class ToySamples:
    """Makes the files of sample 0, 1, …; word frequencies follow Zipf's law.

    Args:
        pictures: Photographs, whose crops are the samples' pictures.
        words: Words of the captions, the most frequent ones first.
    """

    def __init__(self, pictures: Sequence[Image.Image], words: Sequence[str]):
        self._pictures, self._words = pictures, words
        frequency = 1 / np.arange(10, 10 + len(words))
        self._frequency = frequency / frequency.sum()

    def __call__(self, index: int, folders: Sequence[str]) -> dict[str, tuple[str, bytes]]:
        """Return folder → extension and content of a sample's file."""
        rng = np.random.default_rng(index)
        width, height = (int(side) for side in rng.integers(256, 401, 2))
        makers = {
            "rgb": lambda: ("jpg", self._picture(self._pictures[index % len(self._pictures)], (width, height), rng)),
            "crop_settings": lambda: ("npy", npy(_crops(height, width, rng))),
            "caption": lambda: ("json", _json(self._captions(rng))),
            "det": lambda: ("json", _json({"instances": [_detection(rng) for _ in range(BOXES)]})),
            "metadata": lambda: ("json", _json({key: int(rng.integers(1, 300)) for key in METADATA})),
            "color_palette": lambda: ("json", _json([{str(n): _colors(n, rng) for n in range(1, 8)}])),
            "human_poses": lambda: ("json", _json(_people(rng))),
            "sam_instance": lambda: ("npy", npy(_instances(rng))),
            "t5_caption": lambda: ("npz", _embeddings(rng)),
        }
        return {name: makers[name]() if name in makers else ("npy", npy(_tokens(name, rng))) for name in folders}

    def _picture(self, whole: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> bytes:
        left, top = (int(rng.integers(0, side // 4)) for side in whole.size)
        part = whole.crop((left, top, left + whole.width * 3 // 4, top + whole.height * 3 // 4))
        jpeg = io.BytesIO()
        part.resize(size).save(jpeg, "JPEG", quality=90)
        return jpeg.getvalue()

    def _captions(self, rng: np.random.Generator) -> list[str]:
        return [" ".join(row) for row in rng.choice(self._words, (CROPS, WORDS), p=self._frequency)]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _crops(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    rows = []
    for _ in range(CROPS):
        side = int(min(width, height) * rng.uniform(0.45, 1))
        rows.append((rng.integers(height - side + 1), rng.integers(width - side + 1), side, side, rng.integers(2)))
    return np.array(rows)


def _tokens(folder: str, rng: np.random.Generator) -> np.ndarray:
    modality = MODALITY_INFO[folder]
    assert modality.vocab_size and modality.max_tokens
    return rng.integers(0, modality.vocab_size, (CROPS, modality.max_tokens)).astype(np.int16)


def _box(rng: np.random.Generator) -> list[float]:
    corners = rng.random((2, 2))
    return [*corners.min(0).tolist(), *corners.max(0).tolist()]


def _detection(rng: np.random.Generator) -> dict[str, Any]:
    return {"boxes": _box(rng), "class_name": COCO_CLASSES[rng.integers(len(COCO_CLASSES))], "score": 0.9}


def _colors(count: int, rng: np.random.Generator) -> list[list[int]]:
    return rng.integers(256, size=(count, 3)).tolist()


def _people(rng: np.random.Generator) -> list[list[dict[str, Any]]]:
    count = rng.choice(PEOPLE)
    return [[_person(rng) for _ in range(count)] for _ in range(CROPS)]


def _person(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "box": _box(rng),
        "pose": rng.integers(1024, size=8).tolist(),
        "global": rng.uniform(-1, 1, 9).tolist(),
        "shape": rng.normal(size=10).tolist(),
        "camera": rng.uniform(-1, 19, 3).tolist(),
    }


def _instances(rng: np.random.Generator) -> np.ndarray:
    crops = np.empty(CROPS, object)
    crops[:] = [[_instance(rng) for _ in range(INSTANCES)] for _ in range(CROPS)]
    return crops


def _instance(rng: np.random.Generator) -> Mapping[str, np.ndarray]:
    """Return an ellipse within the crop, with an area between almost nothing and a quarter of the crop."""
    angle = np.linspace(0, 2 * np.pi, OUTLINE, endpoint=False)
    radii = 112 * rng.random(2) ** 2 + 2
    outline = rng.uniform(0, 224, 2) + radii * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return {"points": outline.clip(0, 224).astype(np.float32), "token_ids": rng.integers(1024, size=16)}


def _embeddings(rng: np.random.Generator) -> bytes:
    """Return the embeddings of one caption for all crops: 16-bit vectors, padded to the model's maximum length."""
    modality, file = MODALITY_INFO["t5_caption"], io.BytesIO()
    assert modality.max_tokens
    vectors = np.zeros((1, modality.max_tokens, modality.embedding_options["orig_emb_dim"]), np.float16)
    count = int(rng.integers(WORDS, 2 * WORDS))
    vectors[:, :count] = rng.normal(scale=0.1, size=vectors[:, :count].shape)
    np.savez(file, emb=vectors, mask_valid=np.arange(modality.max_tokens)[None] < count)
    return file.getvalue()


def write_shards(root: Path, samples: ToySamples, folders: Sequence[str], num_shards: int, per_shard: int) -> str:
    """Write one tar per folder and shard, and return their ``data_path``."""
    for shard in range(num_shards):
        writers = {}
        for folder in folders:
            (root / folder).mkdir(parents=True, exist_ok=True)
            writers[folder] = webdataset.TarWriter(str(root / folder / f"shard-{shard:05d}.tar"))
        for index in range(shard * per_shard, (shard + 1) * per_shard):
            for folder, (extension, content) in samples(index, folders).items():
                writers[folder].write({"__key__": f"{index:07d}", extension: content})
        for writer in writers.values():
            writer.close()
    return f"{root}/[{','.join(folders)}]/shard-{{00000..{num_shards - 1:05d}}}.tar"
