"""The training data of tokenizers: one domain of a data set, in random crops, with a seed for each sample.

Samples are read and ordered as in :mod:`fourm.data.unified_datasets`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.data_config import DatasetConfig, build_sample_transform
from fourm.data.layout import is_remote
from fourm.data.modality_info import Modality
from fourm.data.options import RemoteDataOptions
from fourm.data.raw_sample import RawSample
from fourm.data.sample_dataset import SampleDataset, Source, name_file_in_errors, open_source
from fourm.data.transforms.image import standardise_depth
from fourm.utils.errors import DataError, UserError
from fourm.utils.options import option
from fourm.utils.paths import AnyPath
from fourm.utils.s3 import check_endpoint
from fourm.vq.crops import RATIO
from fourm.vq.domains import Domain, domain_named
from fourm.vq.features import FeatureOptions

_BOUNDED = ("rgb", "normal", "canny_edge", "sam_edge")  # domains whose values lie in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class ImageDataOptions(RemoteDataOptions, FeatureOptions):
    """Images"""

    domain: str = option("kind of images to tokenize: rgb, depth, semseg_coco, CLIP-B16, ...", "rgb", fixed=True)
    data_path: AnyPath = option(
        "training data: a folder that contains a folder with the name of the domain, or shards with use_wds", ""
    )
    eval_data_path: AnyPath = option("validation data: a folder, or shards (default: no evaluation)", "")
    use_wds: bool = option("data_path names shards, root/[rgb]/shard-{00000..00099}.tar, or their folder", False)
    n_labels: int | None = option(
        "number of classes of class maps, including 'none' (default: the domain's)",
        None,
        at_least=2,
        at_most=10**5,
        fixed=True,
    )
    n_channels: int | None = option(
        "number of channels of features in files (default: the domain's)", None, at_least=1, at_most=10**5, fixed=True
    )
    input_size_min: int = option("smallest size of the pictures in pixels", 224, at_least=1, at_most=10_000, fixed=True)
    input_size_max: int = option(
        "largest size, to which pictures are cropped", 512, at_least=1, at_most=10_000, fixed=True
    )
    resolution_step: int = option(
        "each step trains at a random size: input_size_min plus a multiple of this", 32, at_least=1, fixed=True
    )
    input_size_eval: int | None = option(
        "another size to evaluate, in addition to the smallest and the largest one", None, at_least=1, at_most=10_000
    )
    mask_size: int = option("size of the masks of instances in pixels", 64, at_least=1, at_most=10_000, fixed=True)
    min_crop_scale: float = option(
        "minimum share of a picture's area in a random crop", 0.2, above=0, at_most=1, fixed=True
    )
    hflip: float = option("share of the pictures that are mirrored", 0.5, at_least=0, at_most=1, fixed=True)
    imagenet_default_mean_and_std: bool = option(
        "standardise RGB pictures with the mean and deviation of ImageNet instead of to [-1, 1]", False, fixed=True
    )

    def check(self) -> None:
        self.sizes()
        info = self.domain_info
        if info.kind == "classes" and not self.labels:
            raise UserError(f"'n_labels' is not set: set it to the number of classes of {self.domain}, 'none' included")
        if self.feature_network not in ("", "none") and info.kind not in ("map", "vector"):
            raise UserError(f"'feature_network' makes features, but the domain {self.domain} is not of features")
        if is_remote(self.data_path) and not self.use_wds:
            raise UserError("'data_path': files in folders must be local; set use_wds for shards in a store")
        if any(path.startswith("s3://") for path in (self.data_path, self.eval_data_path)):
            check_endpoint(self, "s3_data_endpoint", "s3_endpoint")

    @property
    def domain_info(self) -> Domain:
        return domain_named(self.domain)

    @property
    def labels(self) -> int | None:
        """The number of classes of class maps; None for other domains."""
        info = self.domain_info
        return (self.n_labels or info.labels) if info.kind == "classes" else None

    @property
    def channels(self) -> int:
        """The number of channels of the encoder's input."""
        return self.n_channels or self.domain_info.channels

    @property
    def network(self) -> str:
        """The network of timm that extracts the features; empty if features or pixels are read from files."""
        return "" if self.feature_network == "none" else self.feature_network or self.domain_info.network or ""

    @property
    def are_cropped(self) -> bool:
        """Whether the files are pictures, of which random crops at random sizes are used."""
        return bool(self.network) or self.domain_info.kind in ("picture", "classes")

    def sizes(self) -> list[int]:
        """Return the sizes in pixels of training, in ascending order; for features, those of the pictures.

        Raises:
            UserError: The smallest and the largest size do not fit ``resolution_step``.
        """
        if self.domain_info.kind == "mask":
            return [self.mask_size]
        sizes = list(range(self.input_size_min, self.input_size_max + 1, self.resolution_step))
        if not sizes or sizes[-1] != self.input_size_max:
            raise UserError(
                f"'input_size_max' {self.input_size_max} must be input_size_min {self.input_size_min} plus a multiple "
                f"of resolution_step {self.resolution_step}"
            )
        return sizes

    def evaluated_sizes(self) -> list[int]:
        """Return the sizes in pixels of evaluations, in ascending order."""
        sizes = self.sizes()
        return sorted({sizes[0], sizes[-1], self.input_size_eval or sizes[0]})

    def loaded_size(self, training: bool) -> int:
        """Return the size in pixels of the images that are read, or the side of a grid of features."""
        info = self.domain_info
        if info.kind == "mask":
            return self.mask_size
        if not self.are_cropped:
            return 1 if info.kind == "vector" else self.input_size_max // self.patch_size  # type: ignore[attr-defined]
        return max(self.sizes()[-1], 0 if training else self.evaluated_sizes()[-1])

    @property
    def bounded(self) -> bool:
        """Whether the values of the images lie in [-1, 1]."""
        return self.domain in _BOUNDED and not self.imagenet_default_mean_and_std

    def keeps_depth(self, training: bool) -> bool:
        """Return whether the samples also hold their depth before it is standardised, for metrics."""
        return self.domain == "depth" and not training

    def dataset(self, training: bool) -> DatasetConfig:
        """Return the configuration of the training or the validation data.

        Raises:
            UserError: Its path is not set.
        """
        path = self.data_path if training else self.eval_data_path
        if not path:
            raise UserError(f"'{'data_path' if training else 'eval_data_path'}' is not set")
        modality = self._modality(training)
        use_wds = self.use_wds if training else path.endswith(".tar") or self.use_wds and _holds_shards(path, modality)
        if use_wds and not path.endswith(".tar"):
            path = f"{path}/[{modality.path}]/*.tar"
        return DatasetConfig(
            name=self.domain,
            in_domains=(modality.name,),
            out_domains=(),
            modalities={modality.name: modality},
            data_path=path,
            use_wds=use_wds,
            main_augment_domain=modality.name if self.are_cropped else None,
            hflip=self.hflip,
            crop_scale=(self.min_crop_scale, 1.0),
            crop_ratio=RATIO,
            sampling_weights=None,
            input_tokens_range=(0, 0),
            target_tokens_range=(0, 0),
            remote=self.remote(),
        )

    def _modality(self, training: bool) -> Modality:
        """Return the modality of the files. It has the name of the transform that reads them."""
        info = self.domain_info
        name, folder, channels = info.transform or self.domain, self.domain, self.channels
        if self.network:
            name, folder, channels = "rgb", "rgb", 3
        options = {"standardize_depth": False} if self.keeps_depth(training) else self.transform_options()
        return Modality(
            name,
            "img",
            input_size=self.loaded_size(training),
            patch_size=1,
            num_channels=channels,
            path=folder,
            transform_options=options,
        )

    def transform_options(self) -> dict[str, Any]:
        """Return the options of the transform that reads the files."""
        if self.domain == "rgb" or self.network:
            return {"imagenet_default_mean_and_std": self.imagenet_default_mean_and_std or bool(self.network)}
        return self.domain_info.options


def _holds_shards(path: str, modality: Modality) -> bool:
    return any(Path(path, modality.path or modality.name).glob("*.tar"))


@dataclass
class TokenizerSamples(SampleDataset):
    """Samples of one modality, as rows ``{modality: {"tensor": (C, H, W), "seed": ()}}``; class maps are (H, W).

    Attributes:
        labels: The number of classes of class maps.
        keep_depth: The values are depth that is not standardised yet: it is kept under ``"depth"``, and standardised
            under ``"tensor"``.
    """

    masking: Any = None  # tokenizers use whole samples
    labels: int | None = None
    keep_depth: bool = False

    def masked(self, sample: RawSample, rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
        values = self.prepared(sample)
        with name_file_in_errors(sample):
            (name, value), *_ = self.transform.augment(values, rng).items()
            value = value if value.dtype.kind != "b" else value.astype(np.float32)
            if self.labels is not None and not 0 <= value.min() <= value.max() < self.labels:
                raise DataError(
                    f"class ids {value.min()} to {value.max()} are not all below n_labels = {self.labels}", name
                )
        row = {"tensor": value, "seed": rng.integers(2**62)}
        return {name: row | ({"tensor": standardise_depth(value), "depth": value} if self.keep_depth else {})}


@dataclass(frozen=True)
class FirstSamples:
    """The first samples of a source, for evaluations.

    Attributes:
        source: The source.
        number: The number of samples; None uses all.
    """

    source: Source
    number: int | None

    def draw(self, key: tuple, stream: int, num_streams: int, ledger: BadSampleLedger) -> Iterator[RawSample]:
        return self.source.draw(key, stream, num_streams, ledger)

    def all(self, ledger: BadSampleLedger) -> Sequence[RawSample]:
        return list(itertools.islice(self.source.all(ledger), self.number))


def open_samples(
    config: DatasetConfig,
    labels: int | None,
    training: bool,
    max_bad_fraction: float,
    first: int | None = None,
    keep_depth: bool = False,
) -> TokenizerSamples:
    """Open the samples of a data set.

    Args:
        config: The data set, with one modality.
        labels, keep_depth: See :class:`TokenizerSamples`.
        training: Whether to crop at random.
        max_bad_fraction: The share of unreadable samples above which reading stops.
        first: The number of samples to use; None uses all.

    Raises:
        UserError: The files do not exist, or are of a type that cannot be read.
    """
    source = open_source(config, BadSampleLedger(config.name, max_bad_fraction))
    return TokenizerSamples(
        config.name,
        FirstSamples(source, first),
        config.modalities,
        build_sample_transform(config, training, raw_pixels=True),
        shuffle_buffer=config.wds_shuffle_buffer_tar,
        max_bad_fraction=max_bad_fraction,
        labels=labels,
        keep_depth=keep_depth,
        presence=config.presence,
    )
