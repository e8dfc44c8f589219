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
from fourm.vq.dataset import MAIN, PIXELS, Value
from fourm.vq.domains import transform_of

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
        modality: See :func:`fourm.vq.domains.transform_of`.
        options: Fields of the transform to set, for example ``{"standardize_depth": False}``.

    Raises:
        UserError: The modality has no pixels, or its transform has no such option.
    """
    transform = transform_of(modality)
    if not isinstance(transform, ImageTransform):
        known = [name for name, value in MODALITY_TRANSFORMS.items() if isinstance(value, ImageTransform)]
        if modality:
            reason = f"'{modality}' is not a modality of pixels that can be tokenized{did_you_mean(modality, known)}"
        else:
            reason = "the tokenizer does not say what it tokenizes; set 'modality' in its configuration"
        raise UserError(f"{reason}; there are {', '.join(known)}")
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


class SampleInputs(NamedTuple):
    """What a tokenizer gets of one sample.

    Attributes:
        key: The key of the sample.
        inputs: (n, C, h, w) float32: the pixels or features of each crop, or the objects of all crops one after
            another.
        crops: (K, 5) int32.
        objects: The descriptions of the objects in each crop; None if crops are tokenized.
    """

    key: str
    inputs: np.ndarray
    crops: np.ndarray
    objects: list[list[dict[str, Any]]] | None = None


class InputBatch(NamedTuple):
    """The inputs of several samples.

    Attributes:
        samples: The samples, without their inputs.
        counts: The number of inputs of each sample.
        inputs: (N, C, h, w), those of all samples one after another.
    """

    samples: list[SampleInputs]
    counts: list[int]
    inputs: Tensor


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

    def __getitem__(self, index: int) -> SampleInputs | Skipped | UserError:
        sample = self.samples[index]
        try:
            return self._read(RawSample(sample.key, sample.members))  # a copy, so that decoded values are not kept
        except BadSample as problem:
            return Skipped(problem.reason, str(problem))
        except UserError as error:  # raised again outside the worker, without its traceback
            return error

    def value(self, ids: np.ndarray, objects: list[list[dict[str, Any]]] | None) -> Value:
        """Return what is written for a sample.

        Args:
            ids: The ids of its inputs, (n, L).
            objects: See :class:`SampleInputs`.
        """
        return ids

    def _read(self, sample: RawSample) -> SampleInputs:
        values = sample.values(self.files, keep_pixels=True)
        try:
            orig_size = image_size(values.get(MAIN, values[PIXELS]))
            crops = self._crops(sample.key, orig_size)
            return self._inputs(sample.key, values[PIXELS], crops, orig_size)
        except BadSample:
            raise
        except UserError as error:
            raise DataError(f"{sample.where(PIXELS)}: {error}") from error
        except Exception as error:  # the decoder of the image: its bytes are damaged
            raise BadSample("corrupt member", f"{sample.where(PIXELS)}: {error}") from error

    def _inputs(self, key: str, value: Any, crops: np.ndarray, orig_size: tuple[int, int]) -> SampleInputs:
        """Cut the crops (K, 5) from an image, and transform them to the input of a tokenizer."""
        image = self.transform.preprocess(value)
        target = (self.size, self.size)
        pixels = np.stack(
            [
                self.transform.postprocess(
                    self.transform.image_augment(
                        image, tuple(crop), bool(flip), orig_size, target, index, self.resample_mode
                    )
                )
                for index, (*crop, flip) in enumerate(crops.tolist())
            ]
        ).astype(np.float32, copy=False)
        return SampleInputs(key, pixels if pixels.ndim == 4 else pixels[:, None], crops)

    def _check_count(self, key: str, count: int, crops: np.ndarray, content: str) -> None:
        """Check that a file with the ``content`` of several crops has it for those that are stored."""
        if count != len(crops):
            raise DataError(f"expected {content} of {len(crops)} crops (num_crops), not {count}")
        if count > 1 and key not in self.stored:
            raise DataError(f"the crops of its {content} are not known, because it has no crop_settings")

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

    def _inputs(self, key: str, value: Any, crops: np.ndarray, orig_size: tuple[int, int]) -> SampleInputs:
        maps = np.asarray(value)
        maps = maps[None] if maps.ndim == 3 else maps
        self._check_count(key, len(maps), crops, "features")
        return SampleInputs(key, self.transform.postprocess(self.transform.preprocess(maps)), crops)


class ObjectDataset(CropDataset):
    """The objects in each crop, such as people, from files; ``transform`` is an :class:`ObjectTransform`."""

    def value(self, ids: np.ndarray, objects: list[list[dict[str, Any]]] | None) -> Value:
        codes, name = iter(ids.tolist()), self.transform.codes_key
        return [
            [
                {key: item.tolist() if isinstance(item, np.ndarray) else item for key, item in described.items()}
                | {name: next(codes)}
                for described in in_crop
            ]
            for in_crop in objects or ()
        ]

    def _inputs(self, key: str, value: Any, crops: np.ndarray, orig_size: tuple[int, int]) -> SampleInputs:
        count = self.transform.crops_in_file(value)
        if count is not None:
            self._check_count(key, count, crops, "objects")
        found = self.transform.objects(value, crops, orig_size)
        inputs = [own for in_crop in found for _, own in in_crop]
        objects = [[described for described, _ in in_crop] for in_crop in found]
        return SampleInputs(key, np.stack(inputs) if inputs else np.empty((0, 1, 1, 1), np.float32), crops, objects)


def read_crops(
    dataset: CropDataset,
    batch_size: int,
    num_workers: int,
    ledger: BadSampleLedger,
    pin_memory: bool = False,
    log: str = "",
) -> Iterator[InputBatch]:
    """Yield the inputs of all samples in order, without those that cannot be read, which ``ledger`` counts.

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
            for _ in batch.samples:
                ledger.read()
            yield batch


def _collate(items: list) -> tuple[InputBatch | None, list[Skipped | UserError]]:
    problems = [item for item in items if isinstance(item, (Skipped, UserError))]
    good: list[SampleInputs] = [item for item in items if isinstance(item, SampleInputs)]
    if not good:
        return None, problems
    counts = [len(item.inputs) for item in good]
    inputs = np.concatenate([item.inputs for item in good if len(item.inputs)] or [good[0].inputs])
    samples = [item._replace(inputs=item.inputs[:0]) for item in good]
    return InputBatch(samples, counts, torch.from_numpy(inputs)), problems
