"""Fits a codebook of patches or features to the images of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.raw_sample import RawSample
from fourm.utils.config import resolve_options
from fourm.utils.device import choose_device
from fourm.utils.errors import UserError
from fourm.utils.options import option, parse_options
from fourm.utils.paths import AnyPath
from fourm.utils.plugin import PluginOptions, load_plugin
from fourm.utils.seeds import generator
from fourm.vq.codebook import Codebook
from fourm.vq.crops import WORKERS, CropDataset, read_crops, tokenizer_transform
from fourm.vq.dataset import PIXELS, ImageSet, open_images
from fourm.vq.feature_codebook import FeatureCodebook, FeatureCodebookConfig, create_backbone
from fourm.vq.kmeans import KMeansReport
from fourm.vq.patch_codebook import PatchCodebook, PatchCodebookConfig
from fourm.vq.tokenizer import check_output


@dataclass(frozen=True)
class FitOptions(PluginOptions):
    """Images and codebook"""

    data_root: AnyPath = option(
        "folder of the data set: images in DATA_ROOT/MODALITY/, as shards or as files in folders"
    )
    modality: str = option("folder of the images")
    output: AnyPath = option("folder for the codebook")
    vocab_size: int = option("codes", 1024, at_least=1, at_most=2**31)
    patch_size: int = option("side of a patch in pixels", 16, at_least=1, at_most=10_000)
    input_size: int = option("side in pixels that crops are resized to", 224, at_least=1, at_most=100_000)
    one_hot_classes: int | None = option(
        "for maps of class ids: the number of classes", None, at_least=1, at_most=10**6
    )
    backbone: str | None = option(
        "for tokens of features instead of patches: the network in timm; its feature map of stride PATCH_SIZE is taken",
        None,
    )
    backbone_weights: AnyPath | None = option(
        "file of the network's weights (default: those that timm downloads)", None
    )
    transform: str | None = option("how files are read, a key of MODALITY_TRANSFORMS (default: MODALITY)", None)
    transform_options: dict = option("options of the transform, e.g. '{standardize_depth: false}'", {})
    shards: str | None = option("only these shards, e.g. shard-{00000..00099}.tar (default: all)", None)
    num_images: int = option("images that patches are taken from, at most", 2000, at_least=1)
    num_crops: int = option("crops of each image, as save_vq_tokens.py draws them", 5, at_least=1, at_most=10_000)
    num_patches: int = option("patches to fit to", 100_000, at_least=1)
    epochs: int = option("passes over the patches", 10, at_least=1)
    seed: int = option("seed of everything random", 0, at_least=0, at_most=2**62)
    batch_size: int = option("images per batch", 32, at_least=1, at_most=10**6)
    num_workers: int = option("processes that read images; 0 = none but this one", WORKERS, at_least=0, at_most=512)
    device: str = option("'auto' = cuda where there is one, else cpu", "auto")
    max_bad_fraction: float = option(
        "stop when more than this share of the images cannot be read", 0.01, at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        resolve_options(self)
        if self.backbone and self.one_hot_classes:
            raise UserError("'one_hot_classes' is for patches: leave it out, or 'backbone'")
        if self.backbone_weights and not self.backbone:
            raise UserError("'backbone_weights' needs a 'backbone', the name of the network in timm")


def fit_codebook(options: FitOptions) -> tuple[Codebook, KMeansReport]:
    """Fit the codebook and save it to ``options.output``.

    Returns:
        The codebook, and how well it fits.

    Raises:
        UserError: The options contradict each other or the images, there are fewer items than codes, or ``output``
            cannot be written.
    """
    load_plugin(options.plugin)
    check_output(options.output)
    modality = options.transform or options.modality
    transform = tokenizer_transform(modality, options.transform_options)
    ledger = BadSampleLedger(options.modality, options.max_bad_fraction)
    images = open_images(options.data_root, {PIXELS: options.modality}, options.shards, ledger)
    samples = _choose_images(images, options)
    codebook = _new_codebook(options, modality, transform.channels).to(choose_device(options.device))
    rng = torch.Generator().manual_seed(int(generator(options.seed, "codebook").integers(2**63)))
    dataset = CropDataset(samples, transform, options.input_size, options.num_crops, hflip=0.5, seed=options.seed)
    per_image = -(-options.num_patches // len(samples))
    chosen = []
    with tqdm(desc=f"patches of {options.modality}", total=len(samples), unit=" images", disable=None) as bar:
        for batch in read_crops(dataset, options.batch_size, options.num_workers, ledger):
            items = codebook.items(batch.inputs.to(codebook.device)).flatten(0, 2).cpu()
            chosen.append(items[torch.randperm(len(items), generator=rng)[: per_image * len(batch.samples)]])
            bar.update(len(batch.samples))
    if not chosen:
        raise UserError(
            f"{images.root / options.modality}: none of the images can be read; the warnings above name them"
        )
    pool = torch.cat(chosen)[: options.num_patches].to(codebook.device)
    if len(pool) < options.vocab_size:
        raise UserError(
            f"{images.root / options.modality} gives only {len(pool)} patches for {options.vocab_size} codes: "
            "lower vocab_size, or raise num_patches, num_images or num_crops"
        )
    report = codebook.fit(pool, epochs=options.epochs, generator=rng)
    codebook.save(options.output)
    return codebook.eval(), report


def _new_codebook(options: FitOptions, modality: str, num_channels: int) -> Codebook:
    common: dict[str, Any] = {
        key: getattr(options, key) for key in ("vocab_size", "patch_size", "input_size", "transform_options")
    }
    common |= {"modality": modality, "num_channels": num_channels}
    if options.backbone is None:
        return PatchCodebook(PatchCodebookConfig(**common, one_hot_classes=options.one_hot_classes))
    config = FeatureCodebookConfig(**common, backbone=options.backbone)
    weights = options.backbone_weights
    return FeatureCodebook(config, create_backbone(config, weights, download=weights is None))


def _choose_images(images: ImageSet, options: FitOptions) -> list[RawSample]:
    """Choose up to ``num_images`` random samples, from as few random parts as possible."""
    rng = generator(options.seed, "images")
    samples: list[RawSample] = []
    parts = images.parts()
    for index in rng.permutation(len(parts)):
        samples += images.samples(parts[index])
        if len(samples) >= options.num_images:
            break
    return [samples[index] for index in sorted(rng.permutation(len(samples))[: options.num_images])]


def main(argv: list[str] | None = None) -> None:
    """Run the command ``fourm fit-codebook``."""
    options = parse_options(FitOptions, argv, "Fit a codebook, of patches or of features, to the images of a data set.")
    _, report = fit_codebook(options)
    print(
        f"{options.output}: {report.used_codes} of {options.vocab_size} codes in use, "
        f"perplexity {report.perplexity:.0f}, {report.error:.1%} of the variance left"
    )
