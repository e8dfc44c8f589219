"""Choose the crops of an image that are tokenized, and read their pixels in worker processes.

A crop is (top, left, height, width, flip) in pixels of the original image (method: aligned augmentation). It depends
only on the seed, the key of the sample and the size of the image, so that all modalities get the same crops, in
whatever order they are tokenized.
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
WORKERS = min(4, os.cpu_count() or 1)  # default number of processes that read images


def draw_crops(
    key: str, size: tuple[int, int], num_crops: int, hflip: float, seed: int, min_scale: float = MIN_SCALE
) -> np.ndarray:
    """Draw the crops of a sample: the largest centred square, and then random ones.

    Args:
        key: The key of the sample.
        size: (height, width) of the image.
        num_crops: The number of crops.
        hflip: The probability that a random crop is flipped.
        seed: The seed of the random crops.
        min_scale: The smallest share of the image's area in a random crop.

    Returns:
        (num_crops, 5) int32.
    """
    rng = generator(seed, "crops", key)
    crops = [(*center_crop(size), False)]
    while len(crops) < num_crops:
        crops.append((*random_crop(size, (min_scale, 1.0), RATIO, rng), rng.random() < hflip))
    return np.array(crops, dtype=np.int32)


def tokenizer_transform(modality: str, options: Mapping[str, object]) -> ImageTransform:
    """Return the transform of a modality for tokenizers, with colours in [-1, 1].

    Args:
        modality: A key of ``MODALITY_TRANSFORMS``.
        options: Fields of the transform to set, for example ``{"standardize_depth": False}``.

    Raises:
        UserError: The modality has no pixels, or its transform has no such option.
    """
    transform = MODALITY_TRANSFORMS.get(modality)
    if not isinstance(transform, ImageTransform):
        known = [name for name, value in MODALITY_TRANSFORMS.items() if isinstance(value, ImageTransform)]
        raise UserError(
            f"'{modality}' is not a modality of pixels that can be tokenized{did_you_mean(modality, known)}; "
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
    """The reason why a sample cannot be read."""

    reason: str
    message: str


class CropBatch(NamedTuple):
    """The crops of n samples.

    Attributes:
        keys: The keys of the samples.
        pixels: (n, K, C, size, size) float32, or features (n, K, C, h, w).
        crops: (n, K, 5) int32.
    """

    keys: list[str]
    pixels: Tensor
    crops: np.ndarray


@dataclasses.dataclass(frozen=True)
class CropDataset(Dataset):
    """A data set whose items are the crops of a sample, or the error of a sample that cannot be read.

    Attributes:
        samples: Samples with the member ``PIXELS`` and perhaps ``MAIN``.
        transform: The transform of the modality.
        size: The side length in pixels to which crops are resized.
        num_crops, hflip, seed, min_scale: See :func:`draw_crops`.
        stored: The crops (K, 5) by key, for samples whose crops were drawn before, or the error of their file.
        resample_mode: How crops are resized; None for the mode of the transform.
        only_stored: Raise an error for samples without stored crops, instead of drawing crops.
        files: The open files of this process.
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
            return self._read(RawSample(sample.key, sample.members))  # a copy, so that decoded values are not kept
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
        """Cut the crops (K, 5) from an image, and transform them to the input of a tokenizer."""
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
        """Return the stored crops, after checking them, or else draw them."""
        crops = self.stored.get(key)
        if crops is None and self.only_stored:
            raise UserError("it has no crop_settings, and with force_load_crop no new crops are drawn")
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
    """Features from files: (C, h, w) of the centre crop, or (K, C, h, w) with one map for each stored crop.

    ``transform`` is a :class:`GridTransform` of several maps.
    """

    def _cut(self, key: str, value: Any, crops: np.ndarray, orig_size: tuple[int, int]) -> list[np.ndarray]:
        maps = np.asarray(value)
        maps = maps[None] if maps.ndim == 3 else maps
        if len(maps) != len(crops):
            raise DataError(f"expected features of {len(crops)} crops (num_crops), not {len(maps)}")
        if len(maps) > 1 and key not in self.stored:
            raise DataError("the crops of its features are not known, because it has no crop_settings")
        return list(self.transform.postprocess(self.transform.preprocess(maps)))


def read_crops(
    dataset: CropDataset,
    batch_size: int,
    num_workers: int,
    ledger: BadSampleLedger,
    pin_memory: bool = False,
    log: str = "",
) -> Iterator[CropBatch]:
    """Yield the crops of all samples in order, without those that cannot be read, which ``ledger`` counts.

    Args:
        dataset: The samples.
        batch_size: Samples per batch; batches with bad samples are smaller.
        num_workers: Number of worker processes; 0 reads in this process.
        ledger: Counts and reports the bad samples.
        pin_memory: Return the batches in pinned memory, from which GPUs can fetch them.
        log: A file to which one line is added for each bad sample; empty for none.

    Raises:
        UserError: Too many samples are bad, or a sample contradicts the options.
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
