"""The crops of an image that are tokenized: which they are, and the reading of their pixels by worker processes.

A crop is (top, left, height, width, flip) in pixels of the original image (method: aligned augmentation). It depends on
the seed, the sample's key and the image's size only, so whichever modality is tokenized first, all get the same ones.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.image_augmenter import center_crop, random_crop
from fourm.data.modality_transforms import MODALITY_TRANSFORMS
from fourm.data.raw_sample import BadSample, OpenFiles, RawSample
from fourm.data.transforms.image import ImageTransform, RGBTransform, image_size
from fourm.utils.errors import DataError, UserError, did_you_mean, sanitize
from fourm.utils.seeds import generator
from fourm.vq.dataset import MAIN, PIXELS

MIN_SCALE, RATIO = 0.2, (3 / 4, 4 / 3)  # of the random crops: smallest share of the area, width / height
WORKERS = min(4, os.cpu_count() or 1)  # processes that read images, unless somebody says otherwise


def draw_crops(
    key: str, size: tuple[int, int], num_crops: int, hflip: float, seed: int, min_scale: float = MIN_SCALE
) -> np.ndarray:
    """The crops of sample ``key``: the largest centred square, then random ones, each flipped with probability ``hflip``.

    Args:
        size: (height, width) of the image.
        min_scale: smallest share of the image's area in a random crop.

    Returns:
        (num_crops, 5) int32.
    """
    rng = generator(seed, "crops", key)
    crops = [(*center_crop(size), False)]
    while len(crops) < num_crops:
        crops.append((*random_crop(size, (min_scale, 1.0), RATIO, rng), rng.random() < hflip))
    return np.array(crops, dtype=np.int32)


def tokenizer_transform(modality: str, options: Mapping[str, object]) -> ImageTransform:
    """How tokenizers see the images of ``modality``: its transform, with colours in [-1, 1].

    Args:
        options: fields of the transform to set, e.g. ``{"standardize_depth": False}``.

    Raises:
        UserError: a modality without pixels, or an option that its transform does not have.
    """
    transform = MODALITY_TRANSFORMS.get(modality)
    if not isinstance(transform, ImageTransform):
        known = [name for name, value in MODALITY_TRANSFORMS.items() if isinstance(value, ImageTransform)]
        raise UserError(
            f"'{modality}' is no modality of pixels that can be tokenized{did_you_mean(modality, known)}; "
            f"there are {', '.join(known)}"
        )
    if isinstance(transform, RGBTransform):
        options = {"imagenet_default_mean_and_std": False} | dict(options)
    # The size is the tokenizer's, and nothing but the crops is random.
    fields = {item.name for item in dataclasses.fields(transform)} - {"size", "color_jitter"}
    for name in options:
        if name not in fields:
            raise UserError(f"transform_options of {modality}: unknown option '{name}'{did_you_mean(name, fields)}")
    return dataclasses.replace(transform, **options)  # type: ignore[arg-type]


class Skipped(NamedTuple):
    """A sample that cannot be read."""

    reason: str
    message: str


class CropBatch(NamedTuple):
    """The crops of n samples.

    Attributes:
        keys: of the samples.
        pixels: (n, K, C, size, size) float32, or features (n, K, C, h, w).
        crops: (n, K, 5) int32.
    """

    keys: list[str]
    pixels: Tensor
    crops: np.ndarray


@dataclasses.dataclass(frozen=True)
class CropDataset(Dataset):
    """The crops of one sample per item; a sample that cannot be read is its error instead.

    Attributes:
        samples: with the member ``PIXELS`` and perhaps ``MAIN``.
        transform: of the modality.
        size: side in pixels that crops are resized to.
        num_crops, hflip, seed: of the crops that have to be drawn.
        stored: (K, 5) by key, of the samples whose crops were drawn before; or why they cannot be read.
        min_scale: of the crops that have to be drawn.
        resample_mode: how crops are resized, if not as the transform says.
        only_stored: crops that are not stored are an error.
    """

    samples: Sequence[RawSample]
    transform: Any
    size: int
    num_crops: int
    hflip: float
    seed: int
    stored: Mapping[str, np.ndarray | BadSample] = dataclasses.field(default_factory=dict)
    min_scale: float = MIN_SCALE
    resample_mode: str | None = None
    only_stored: bool = False
    files: OpenFiles = dataclasses.field(default_factory=OpenFiles)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, np.ndarray, np.ndarray] | Skipped | UserError:
        sample = self.samples[index]
        try:
            return self._read(RawSample(sample.key, sample.members))  # a fresh one, which does not keep what it decodes
        except BadSample as problem:
            return Skipped(problem.reason, str(problem))
        except UserError as error:  # raised again outside the worker, without its traceback
            return error

    def _read(self, sample: RawSample) -> tuple[str, np.ndarray, np.ndarray]:
        values = sample.values(self.files, keep_pixels=True)
        try:
            orig_size = image_size(values.get(MAIN, values[PIXELS]))
            crops = self._crops(sample.key, orig_size)
            pixels = self._cut(sample.key, values[PIXELS], crops, orig_size)
        except BadSample:
            raise
        except UserError as error:
            raise DataError(f"{sample.where(PIXELS)}: {error}") from error
        except Exception as error:  # the decoder of the image: its bytes are damaged
            raise BadSample("corrupt member", f"{sample.where(PIXELS)}: {error}") from error
        stacked = np.stack(pixels).astype(np.float32, copy=False)
        return sample.key, stacked if stacked.ndim == 4 else stacked[:, None], crops

    def _cut(self, key: str, value: Any, crops: np.ndarray, orig_size: tuple[int, int]) -> list[np.ndarray]:
        """The parts of an image that its crops (K, 5) stand for, as tokenizers see them."""
        image = self.transform.preprocess(value)
        target = (self.size, self.size)
        return [
            self.transform.postprocess(
                self.transform.image_augment(
                    image, tuple(crop), bool(flip), orig_size, target, index, self.resample_mode
                )
            )
            for index, (*crop, flip) in enumerate(crops.tolist())
        ]

    def _crops(self, key: str, orig_size: tuple[int, int]) -> np.ndarray:
        """The stored crops, which must fit; else those that the seed draws."""
        crops = self.stored.get(key)
        if crops is None and self.only_stored:
            raise UserError("it has no crop_settings, and force_load_crop does not let new crops be drawn")
        if crops is None:
            return draw_crops(key, orig_size, self.num_crops, self.hflip, self.seed, self.min_scale)
        if isinstance(crops, BadSample):
            raise crops
        if crops.shape != (self.num_crops, 5):
            raise UserError(
                f"crop_settings has shape {crops.shape}, not ({self.num_crops}, 5): set num_crops to {len(crops)}, "
                "or remove crop_settings and all tokens made with it"
            )
        if np.abs(crops[0, :4] - center_crop(orig_size)).max() > 1:  # others may round differently
            raise UserError(
                f"crop_settings does not begin with the centre crop of an image of {orig_size[0]}x{orig_size[1]}: "
                "set main_modality to the modality that it was made for"
            )
        return crops


class FeatureDataset(CropDataset):
    """Features out of files: (C, h, w) of the centre crop, or (K, C, h, w), one map for each stored crop.

    ``transform`` is a :class:`GridTransform` of several maps.
    """

    def _cut(self, key: str, value: Any, crops: np.ndarray, orig_size: tuple[int, int]) -> list[np.ndarray]:
        maps = np.asarray(value)
        maps = maps[None] if maps.ndim == 3 else maps
        if len(maps) != len(crops):
            raise DataError(f"expected features of {len(crops)} crops (num_crops), not {len(maps)}")
        if len(maps) > 1 and key not in self.stored:
            raise DataError("which crops its features were made of is not known: there is no crop_settings of it")
        return list(self.transform.postprocess(self.transform.preprocess(maps)))


def read_crops(
    dataset: CropDataset, batch_size: int, num_workers: int, ledger: BadSampleLedger, pin_memory: bool = False,
    log: str = "",
) -> Iterator[CropBatch]:  # fmt: skip
    """The crops of all samples in their order, without the bad samples, which ``ledger`` counts.

    Args:
        batch_size: samples per batch; fewer if some are bad.
        num_workers: processes; 0 = read in this one.
        pin_memory: put batches where GPUs can fetch them from.
        log: file to which a line is added for each bad sample.
    """
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=_collate, pin_memory=pin_memory)
    for batch, problems in loader:
        for problem in problems:
            if isinstance(problem, UserError):
                raise problem
            ledger.read(problem.reason)
            ledger.warn(problem.message, f"{problem.message}; skipped")
            if log:
                with open(log, "a", encoding="utf-8") as file:
                    file.write(f"{sanitize(problem.message)}\n")
        if batch is not None:
            for _ in batch.keys:
                ledger.read()
            yield batch


def _collate(items: list) -> tuple[CropBatch | None, list[Skipped | UserError]]:
    problems = [item for item in items if isinstance(item, (Skipped, UserError))]
    good = [item for item in items if not isinstance(item, (Skipped, UserError))]
    if not good:
        return None, problems
    keys, pixels, crops = zip(*good, strict=True)
    return CropBatch(list(keys), torch.from_numpy(np.stack(pixels)), np.stack(crops)), problems
