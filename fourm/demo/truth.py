"""Read the truth of validation scenes in the form of generated results, and guess it without using the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.folders import Folders
from fourm.data.raw_sample import OpenFiles, RawSample
from fourm.data.shards import Shards
from fourm.demo.scene import CLASSES
from fourm.demo.simulator import FAR
from fourm.generation.decoding import Decoded, decode_pixels
from fourm.generation.inputs import read_pixels
from fourm.vq.crops import tokenizer_transform

DecodedScene = Mapping[str, Decoded]
"""Kind of value → its value in a scene."""

PICTURES = ("rgb", "depth", "normal", "semseg", "canny_edge")
TEXTS = ("det", "caption", "color_palette", "metadata")
KINDS = (*PICTURES, "feature", *TEXTS)


def read_scenes(root: Path, shard: str | None = None, kinds: Sequence[str] = (*PICTURES, *TEXTS)) -> list[RawSample]:
    """Read the samples of a split, which is in folders or shards.

    Args:
        root: Folder of the split.
        shard: Read only this shard.
        kinds: What to read of each sample.
    """
    wanted = {kind: kind for kind in kinds}
    ledger = BadSampleLedger(str(root), max_bad_fraction=0.0)
    data_path = f"{root}/[{','.join(wanted)}]"
    shards = [shard] if shard else sorted(path.name for path in (root / kinds[0]).glob("*.tar"))
    if not shards:
        return Folders(data_path, wanted, None, ledger).all(ledger)
    return [sample for name in shards for sample in Shards(f"{data_path}/{name}", wanted).all(ledger)]


def truth(sample: RawSample, size: int) -> DecodedScene:
    """Return the true values of a scene that were read, at ``size`` × ``size`` pixels and with depth in metres."""
    values = sample.values(OpenFiles(), keep_pixels=False)
    scene: dict[str, Decoded] = {}
    for kind in PICTURES:
        if kind in values:
            transform = tokenizer_transform(kind, {"standardize_depth": False} if kind == "depth" else {})
            pixels = read_pixels(values[kind], transform, size)
            pixels = pixels if pixels.ndim == 3 else pixels[None]
            scene[kind] = decode_pixels(kind, pixels[None].float(), ((0.5,), (0.5,)))
    if "depth" in scene:
        scene["depth"] = Decoded("depth", scene["depth"].value * FAR)
    if "semseg" in scene:
        scene["semseg"] = Decoded("semseg", scene["semseg"].value, names=CLASSES)
    texts: dict[str, Callable[[Any], Any]] = {
        "det": lambda value: value["instances"],
        "caption": str,
        "color_palette": lambda value: value[0]["7"],
        "metadata": dict,
    }
    return scene | {kind: Decoded(kind, read(values[kind])) for kind, read in texts.items() if kind in values}


def guesses(scenes: Sequence[DecodedScene], count: int) -> list[DecodedScene]:
    """Make the best guesses about ``count`` unseen scenes.

    For pictures this is the mean, or most frequent, value of each pixel in ``scenes``; for boxes and captions those of
    one of these scenes.
    """
    values: dict[str, Any] = {kind: np.stack([scene[kind].value for scene in scenes]) for kind in PICTURES}
    counts = np.stack([(values["semseg"] == label).sum(0) for label in range(len(CLASSES))])
    mean = {
        "depth": Decoded("depth", values["depth"].mean(0)),
        "normal": Decoded("normal", values["normal"].mean(0)),
        "semseg": Decoded("semseg", counts.argmax(0)),
    }
    return [mean | {kind: scenes[i % len(scenes)][kind] for kind in ("det", "caption")} for i in range(count)]
