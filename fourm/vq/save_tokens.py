"""Tokenizes the images of a data set: writes the tokens of each image, and the crops that they stand for.

The input of a tokenizer may also be features or objects, such as people, that files hold for the images.

Results that already exist are kept, so that an interrupted run can simply be started again. ``.made_with.json`` in the
output folder records how its tokens were made; a run with other options does not add to them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.backends import cudnn
from tqdm import tqdm

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.modality_transforms import AbstractTransform, GridTransform
from fourm.data.transforms.instances import NUM_CODES
from fourm.data.transforms.objects import ObjectTransform
from fourm.utils.device import choose_device
from fourm.utils.errors import DataError, UserError
from fourm.utils.files import atomic_path, check_file
from fourm.utils.memory import keep_freed_memory
from fourm.utils.options import option, parse_options
from fourm.utils.paths import AnyPath
from fourm.utils.plugin import PluginOptions, load_plugin
from fourm.utils.ranks import torchrun_ranks
from fourm.vq.crops import (
    MIN_SCALE,
    WORKERS,
    CropDataset,
    FeatureDataset,
    InputBatch,
    ObjectDataset,
    read_crops,
    tokenizer_transform,
)
from fourm.vq.dataset import MAIN, PIXELS, Results, open_images
from fourm.vq.domains import DOMAINS, transform_of
from fourm.vq.features import FeatureNetwork, FeatureOptions, timm_network
from fourm.vq.registry import find_weights, load_tokenizer
from fourm.vq.tokenizer import CONFIG, ImageTokenizer

log = logging.getLogger(__name__)

RECORD = ".made_with.json"
_CROP_SIZE = 224  # side length in pixels of the crops whose global features or objects are tokenized


@dataclass(frozen=True, kw_only=True)
class SaveTokensOptions(FeatureOptions, PluginOptions):
    """Images and tokens"""

    tokenizer: AnyPath = option(
        "the tokenizer: its folder, a .safetensors file, or an id on the Hugging Face hub", alias="tokenizer_id"
    )
    tokenizers_root: AnyPath = option(
        "folder of published .pth files; --tokenizer may be the name of one of them", "./tokenizer_ckpts"
    )
    data_root: AnyPath = option(
        "folder of the data set: images, features or objects in DATA_ROOT/MODALITY/, as shards or as files in folders"
    )
    split: str = option("part of the data set, if DATA_ROOT has a folder for each: train", "")
    modality: str | None = option(
        "folder of the images (default: the tokenizer's modality, or rgb if a network extracts features from them)",
        None,
        alias="task",
    )
    output_modality: str | None = option("folder for the tokens (default: tok_MODALITY@INPUT_SIZE)", None)
    folder_suffix: str = option("write the tokens to MODALITY_SUFFIX instead, as the published script does", "")
    shards: str | None = option("only these shards, e.g. shard-{00000..00099}.tar (default: all)", None)
    main_modality: str | None = option("folder of the images in whose pixels crops are given (default: MODALITY)", None)
    input_size: int | None = option(
        "side in pixels that crops are resized to (default: the tokenizer's; 224 for global features and objects)",
        None,
        at_least=1,
        at_most=100_000,
    )
    num_crops: int = option(
        "crops per image; the first is the centre crop, the others are random",
        10,
        at_least=1,
        at_most=10_000,
        alias="n_crops",
    )
    min_crop_scale: float = option("smallest share of the image's area in a random crop", MIN_SCALE, above=0, at_most=1)
    hflip: float = option("share of the random crops that are flipped", 0.5, at_least=0, at_most=1)
    seed: int = option("seed of the random crops", 0, at_least=0, at_most=2**62)
    force_load_crop: bool = option("stop at an image without stored crops, instead of drawing crops", False)
    resample_mode: Literal["nearest", "bilinear", "bicubic"] | None = option(
        "how crops are resized (default: as in training)", None
    )
    batch_size: int = option("crops that are tokenized at a time", 64, at_least=1, at_most=10**6)
    batch_size_dataloader: int | None = option(
        "images that are read at a time (default: enough for batch_size crops)", None, at_least=1, at_most=10**6
    )
    bf16: bool = option("compute in bfloat16, which is faster on a GPU but changes some of the tokens", False)
    num_workers: int = option("processes that read images; 0 = none but this one", WORKERS, at_least=0, at_most=512)
    pin_mem: bool = option("read into pinned memory, from which GPUs copy faster", True)
    device: str = option("'auto' = cuda where there is one, else cpu", "auto")
    max_bad_fraction: float = option(
        "stop when more than this share of the images cannot be read", 0.01, at_least=0, at_most=1
    )
    corrupt_samples_log: AnyPath = option("file to which a line is added for each image that cannot be read", "")
    overwrite: bool = option("tokenize again what is finished", False)
    dry_run: bool = option("say what would be done, and stop", False, alias="dryrun")
    verbose: bool = option("ignored: the progress is always shown in a terminal", False)


@dataclass(frozen=True)
class TokenizerInput:
    """The input of a tokenizer and how it is read.

    Attributes:
        folder: The folder of the images, features or objects.
        output: The folder of the tokens.
        size: The side length of the crops in pixels.
        transform: The transform of the files.
        dataset: The class that reads the files.
        network: The network of timm that extracts the features from the images; empty if there is none.
    """

    folder: str
    output: str
    size: int
    transform: AbstractTransform
    dataset: type[CropDataset] = CropDataset
    network: str = ""


def tokenizer_input(options: SaveTokensOptions, tokenizer: ImageTokenizer) -> TokenizerInput:
    """Determine how the input of ``tokenizer`` is read.

    Raises:
        UserError: The modality of the tokenizer is not known, or ``options`` do not fit the tokenizer.
    """
    modality = tokenizer.info.modality or options.modality
    if not modality:
        raise UserError(f"{options.tokenizer} does not name the modality that it tokenizes: set 'modality'")
    transform = transform_of(modality)
    if isinstance(transform, GridTransform):
        network = options.feature_network or tokenizer.feature_network
        network = network or (DOMAINS[modality].network if modality in DOMAINS else None) or "none"
        if network != "none":
            return _pictures_of_features(options, tokenizer, modality, network)
        return _features(options, tokenizer, modality, transform)
    if options.feature_network:
        raise UserError(f"'feature_network': {options.tokenizer} tokenizes {modality}, not features of a network")
    if isinstance(transform, ObjectTransform):
        return _objects(options, tokenizer, modality, transform)
    return _pictures(options, tokenizer, modality)


def _pictures(options: SaveTokensOptions, tokenizer: ImageTokenizer, modality: str) -> TokenizerInput:
    size = options.input_size or tokenizer.info.input_size
    _check_size(size, tokenizer)
    folder = options.modality or modality
    transform = tokenizer_transform(modality, tokenizer.info.transform_options)
    return TokenizerInput(folder, _output(options, folder, f"@{size}", folder), size, transform)


def _pictures_of_features(
    options: SaveTokensOptions, tokenizer: ImageTokenizer, modality: str, network: str
) -> TokenizerInput:
    """Return the input of a network that extracts the features which are tokenized."""
    folder = "rgb" if options.modality in (None, modality) else options.modality
    # The networks and the tokenizers of their features were trained on ImageNet-standardised colours.
    rgb = tokenizer_transform("rgb", {"imagenet_default_mean_and_std": True})
    size, output = _size_and_output_of_features(options, tokenizer, modality)
    return TokenizerInput(folder, output, size, rgb, network=network)


def _features(
    options: SaveTokensOptions, tokenizer: ImageTokenizer, modality: str, transform: GridTransform
) -> TokenizerInput:
    _check_main_modality(options, "the features in files")
    size, output = _size_and_output_of_features(options, tokenizer, modality)
    if not tokenizer.takes_vectors:
        _check_size(size, tokenizer)
    side = 1 if tokenizer.takes_vectors else size // tokenizer.info.patch_size
    grids = dataclasses.replace(transform, per_crop=True, shape=(tokenizer.num_channels, side, side))
    return TokenizerInput(options.modality or modality, output, size, grids, FeatureDataset)


def _objects(
    options: SaveTokensOptions, tokenizer: ImageTokenizer, modality: str, transform: ObjectTransform
) -> TokenizerInput:
    _check_main_modality(options, f"the {modality} in files")
    info = tokenizer.info
    side = 1 if tokenizer.takes_vectors else info.input_size // info.patch_size
    codes = tokenizer.num_codebooks * side**2
    if codes != transform.num_codes or tokenizer.vocab_size > NUM_CODES:
        raise UserError(
            f"{options.tokenizer} has {codes} codes below {tokenizer.vocab_size} for each of the {modality}, but a 4M "
            f"model reads {transform.num_codes} codes below {NUM_CODES}"
        )
    size = options.input_size or _CROP_SIZE
    transform = transform.for_sizes(info.input_size, size)
    folder = options.modality or modality
    return TokenizerInput(folder, _output(options, _kind(modality), "", folder), size, transform, ObjectDataset)


def _kind(modality: str) -> str:
    """Return the kind of the modality in 4M-21 that consists of the tokens of ``modality``."""
    return (modality in DOMAINS and DOMAINS[modality].tokens) or modality


def _size_and_output_of_features(
    options: SaveTokensOptions, tokenizer: ImageTokenizer, modality: str
) -> tuple[int, str]:
    size = options.input_size or (_CROP_SIZE if tokenizer.takes_vectors else tokenizer.info.input_size)
    suffix = "" if tokenizer.takes_vectors else f"@{size}"
    return size, _output(options, _kind(modality), suffix, options.modality or modality)


def _output(options: SaveTokensOptions, kind: str, size: str, task: str) -> str:
    """Return the folder of the tokens."""
    return (
        f"{task}_{options.folder_suffix}" if options.folder_suffix else options.output_modality or f"tok_{kind}{size}"
    )


def _check_main_modality(options: SaveTokensOptions, content: str) -> None:
    if options.main_modality is None:
        raise UserError(
            f"'main_modality' is not set: name the folder of the pictures that {content} were made of, because crops "
            "are measured in their pixels"
        )


def _check_size(size: int, tokenizer: ImageTokenizer) -> None:
    if size % tokenizer.info.patch_size:
        raise UserError(
            f"'input_size' {size} is not a multiple of the tokenizer's patch_size {tokenizer.info.patch_size}"
        )


def save_tokens(options: SaveTokensOptions) -> int:
    """Tokenize the images of a data set. Processes that torchrun started share the images.

    Returns:
        The number of images that were tokenized, or that would be with ``dry_run``.

    Raises:
        UserError: The options contradict each other or the existing tokens, more than ``max_bad_fraction`` of the
            images cannot be read, or a value breaks the contract of the modality.
    """
    load_plugin(options.plugin)
    rank, world_size, local_rank = torchrun_ranks()
    if options.overwrite and world_size > 1:
        raise UserError("'overwrite': several processes would remove each other's tokens; remove their folder yourself")
    device = choose_device(options.device, local_rank if world_size > 1 else None)
    if device.type == "cpu":
        keep_freed_memory()
    published = Path(options.tokenizers_root, f"{options.tokenizer}.pth")
    place = str(published) if published.is_file() else options.tokenizer
    tokenizer = load_tokenizer(place, device)
    source = tokenizer_input(options, tokenizer)
    ledger = BadSampleLedger(source.folder, options.max_bad_fraction)
    folders = {PIXELS: source.folder} | ({MAIN: options.main_modality} if options.main_modality else {})
    images = open_images(Path(options.data_root, options.split), folders, options.shards, ledger, (rank, world_size))
    parts = images.parts()
    weights = options.feature_weights if source.network else ""
    made_with = {
        "modality": source.folder,
        "input_size": source.size,
        "num_crops": options.num_crops,
        "tokenizer": _digest(find_weights(place)),
        "feature_network": source.network or None,
        "feature_weights": _digest(Path(weights)) if weights else None,
        "resample_mode": options.resample_mode,
        "bf16": options.bf16 or None,
    }
    overwritten = parts if options.overwrite else []
    output = source.output
    _check_record(images.root / output, made_with, [p for p in images.tokenized(output) if p not in overwritten])
    if options.dry_run:
        find = images.samples if options.overwrite else lambda part: images.pending(part, output)
        return sum(len(find(part)) for part in parts)
    encode = _Encoder(tokenizer, _feature_network(source, options, tokenizer), options)
    for part in overwritten:
        images.remove(part, output)
    with atomic_path(images.root / output / RECORD) as path:
        path.write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")
    images_at_a_time = options.batch_size_dataloader or max(options.batch_size // options.num_crops, 1)
    done = 0
    with tqdm(desc=output, unit=" images", disable=None) as bar:
        for number, part in enumerate(parts):
            samples = images.pending(part, output)
            if not samples:
                continue
            bar.total = done + len(samples) * (len(parts) - number)  # as if the parts to come were like this one
            dataset = source.dataset(
                samples,
                source.transform,
                source.size,
                options.num_crops,
                options.hflip,
                options.seed,
                images.crops(part),
                options.min_crop_scale,
                options.resample_mode,
                options.force_load_crop,
            )
            pin_memory = options.pin_mem and device.type == "cuda"
            batches = read_crops(
                dataset, images_at_a_time, options.num_workers, ledger, pin_memory, options.corrupt_samples_log
            )
            done += images.write(part, output, _tokenized(batches, encode, dataset, bar))
    return done


def _feature_network(
    source: TokenizerInput, options: SaveTokensOptions, tokenizer: ImageTokenizer
) -> FeatureNetwork | None:
    """Build the network that extracts the features which are tokenized; None if there is none.

    Raises:
        UserError: The tokenizer takes another number of features, or the size is not a multiple of the patch size.
    """
    if not source.network:
        return None
    network = timm_network(source.network, options.feature_weights, dynamic_img_size=True)
    patch = network.patch_embed.patch_size[0]
    if source.size % patch:
        raise UserError(f"'input_size' {source.size} is not a multiple of {patch}, the patch size of {source.network}")
    features = FeatureNetwork(network, tokenizer.takes_vectors).to(tokenizer.device)
    channels = features(torch.zeros(1, 3, patch, patch, device=tokenizer.device)).shape[1]
    if channels != tokenizer.num_channels:
        raise UserError(
            f"'feature_network': {source.network} gives {channels} features, but the tokenizer "
            f"takes {tokenizer.num_channels}"
        )
    return features


class _Encoder:
    """Tokenizes crops, in float32 unless ``bf16`` is set."""

    def __init__(self, tokenizer: ImageTokenizer, network: FeatureNetwork | None, options: SaveTokensOptions):
        self.tokenizer, self._network = tokenizer, network
        self._batch_size, self._bf16 = options.batch_size, options.bf16
        if options.bf16:
            log.warning(
                "bf16: some of the tokens differ from those in float32, which models are trained and generate with; "
                "use it to try things out"
            )

    def __call__(self, inputs: Tensor) -> Tensor:
        """Tokenize (N, C, H, W) → ids (N, L) on the CPU, where L counts all places and codebooks."""
        device = self.tokenizer.device
        # By default, convolutions on GPUs round float32 to TF32.
        with torch.autocast(device.type, torch.bfloat16, self._bf16), cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat([self._tokenize(part.to(device)) for part in inputs.split(self._batch_size)])

    def _tokenize(self, x: Tensor) -> Tensor:
        return self.tokenizer.tokenize(self._network(x) if self._network else x).flatten(1).cpu()


def _tokenized(batches: Iterable[InputBatch], encode: _Encoder, dataset: CropDataset, bar: tqdm) -> Results:
    vocab_size = encode.tokenizer.vocab_size
    dtype = token_dtype(vocab_size)
    for samples, counts, inputs in batches:
        try:
            ids = encode(inputs) if len(inputs) else torch.empty(0, 0, dtype=torch.int64)
        except DataError as error:
            raise DataError(f"one of the keys '{samples[0].key}' to '{samples[-1].key}': {error}") from error
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise DataError(f"the tokenizer gave ids {ids.min()} to {ids.max()} for a vocabulary of {vocab_size}")
        for sample, own in zip(samples, ids.split(counts), strict=True):
            yield sample.key, dataset.value(own.numpy().astype(dtype), sample.objects), sample.crops
        bar.update(len(samples))


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest signed integer type that can hold every id, of at least 16 bits as in published data sets."""
    return np.dtype(np.int16 if vocab_size <= 2**15 else np.int32)


def _digest(weights: Path) -> str:
    """Return a digest that differs for tokenizers that may give different tokens."""
    config = weights.with_name(CONFIG)
    digest = hashlib.sha256(config.read_bytes() if config.exists() else b"")
    with weights.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()[:16]


def _check_record(folder: Path, made_with: dict, kept: list[str]) -> None:
    """Check that ``folder`` contains nothing but tokens, and that the parts ``kept`` were made with these options.

    Raises:
        UserError: It contains other files or other tokens.
    """
    check_file(folder / RECORD)
    try:
        before = json.loads((folder / RECORD).read_bytes())
        if not isinstance(before, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / RECORD} is damaged, so it is unknown how its tokens were made: use another output_modality, "
            "or remove this folder"
        ) from error
    except FileNotFoundError:
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(
                f"{folder} holds files that save_vq_tokens did not write: use another output_modality, or move them"
            ) from None
        return
    for name, value in made_with.items():
        if kept and before.get(name) != value:
            raise UserError(
                f"{folder / kept[0]} was made with another {name} ({before.get(name)}, now {value}): use --overwrite, "
                "for all shards at once, or another output_modality"
            )


def main(argv: list[str] | None = None) -> None:
    """Run the command ``save_vq_tokens.py``."""
    options = parse_options(SaveTokensOptions, argv, "Tokenize the images of a data set.")
    count = save_tokens(options)
    print(f"{count} images {'would be' if options.dry_run else 'were'} tokenized")
