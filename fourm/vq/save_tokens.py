"""Tokenizes the images of a data set: writes tokens (crops, tokens) for each image, and the crops that they stand for.

Results that already exist are kept, so that an interrupted run can simply be started again. ``.made_with.json`` in the output
folder records how its tokens were made; a run with other options does not add to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from tqdm import tqdm

from fourm.data.bad_samples import BadSampleLedger
from fourm.utils.config import resolve_options
from fourm.utils.device import choose_device
from fourm.utils.errors import DataError, UserError
from fourm.utils.files import atomic_path, check_file
from fourm.utils.options import option, parse_options
from fourm.utils.paths import AnyPath
from fourm.vq.crops import WORKERS, CropBatch, CropDataset, read_crops, tokenizer_transform
from fourm.vq.dataset import MAIN, PIXELS, Results, open_images
from fourm.vq.registry import find_weights, load_tokenizer
from fourm.vq.tokenizer import CONFIG, ImageTokenizer

RECORD = ".made_with.json"


@dataclass(frozen=True)
class SaveTokensOptions:
    """Images and tokens"""

    tokenizer: AnyPath = option("the tokenizer: its folder, a .safetensors file, or an id on the Hugging Face hub")
    data_root: AnyPath = option(
        "folder of the data set: images in DATA_ROOT/MODALITY/, as shards or as files in folders"
    )
    modality: str | None = option("folder of the images (default: the tokenizer's modality)", None)
    output_modality: str | None = option("folder for the tokens (default: tok_MODALITY@INPUT_SIZE)", None)
    shards: str | None = option("only these shards, e.g. shard-{00000..00099}.tar (default: all)", None)
    main_modality: str | None = option("folder of the images in whose pixels crops are given (default: MODALITY)", None)
    input_size: int | None = option(
        "side in pixels that crops are resized to (default: the tokenizer's)", None, at_least=1, at_most=100_000
    )
    num_crops: int = option(
        "crops per image; the first is the centre crop, the others are random", 10, at_least=1, at_most=10_000
    )
    hflip: float = option("share of the random crops that are flipped", 0.5, at_least=0, at_most=1)
    seed: int = option("seed of the random crops", 0, at_least=0, at_most=2**62)
    batch_size: int = option("images per batch", 32, at_least=1, at_most=10**6)
    num_workers: int = option("processes that read images; 0 = none but this one", WORKERS, at_least=0, at_most=512)
    device: str = option("'auto' = cuda where there is one, else cpu", "auto")
    max_bad_fraction: float = option(
        "stop when more than this share of the images cannot be read", 0.01, at_least=0, at_most=1
    )
    overwrite: bool = option("tokenize again what is finished", False)
    dry_run: bool = option("say what would be done, and stop", False)

    def __post_init__(self) -> None:
        resolve_options(self)


def save_tokens(options: SaveTokensOptions) -> int:
    """Tokenize the images of a data set.

    Returns:
        The number of images that were tokenized, or that would be with ``dry_run``.

    Raises:
        UserError: The options contradict each other or the existing tokens, more than ``max_bad_fraction`` of the images
            cannot be read, or a value breaks the contract of the modality.
    """
    tokenizer = load_tokenizer(options.tokenizer, choose_device(options.device))
    info = tokenizer.info
    modality = options.modality or info.modality
    if not modality:
        raise UserError(f"{options.tokenizer} does not tell whose images it is for: name their 'modality'")
    size = options.input_size or info.input_size
    if size % info.patch_size:
        raise UserError(f"'input_size' {size} is not a multiple of the tokenizer's patch_size {info.patch_size}")
    output = options.output_modality or f"tok_{modality}@{size}"
    transform = tokenizer_transform(info.modality or modality, info.transform_options)
    ledger = BadSampleLedger(modality, options.max_bad_fraction)
    folders = {PIXELS: modality} | ({MAIN: options.main_modality} if options.main_modality else {})
    images = open_images(options.data_root, folders, options.shards, ledger)
    parts = images.parts()
    made_with = {
        "modality": modality,
        "input_size": size,
        "num_crops": options.num_crops,
        "tokenizer": _digest(find_weights(options.tokenizer)),
    }
    overwritten = parts if options.overwrite else []
    _check_record(images.root / output, made_with, [p for p in images.tokenized(output) if p not in overwritten])
    if options.dry_run:
        find = images.samples if options.overwrite else lambda part: images.pending(part, output)
        return sum(len(find(part)) for part in parts)
    for part in overwritten:
        images.remove(part, output)
    with atomic_path(images.root / output / RECORD) as path:
        path.write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")
    done = 0
    with tqdm(desc=output, unit=" images", disable=None) as bar:
        for number, part in enumerate(parts):
            samples = images.pending(part, output)
            if not samples:
                continue
            bar.total = done + len(samples) * (len(parts) - number)  # as if the parts to come were like this one
            dataset = CropDataset(
                samples, transform, size, options.num_crops, options.hflip, options.seed, images.crops(part)
            )
            batches = read_crops(dataset, options.batch_size, options.num_workers, ledger)
            done += images.write(part, output, _tokenized(batches, tokenizer, bar))
    return done


def _tokenized(batches: Iterable[CropBatch], tokenizer: ImageTokenizer, bar: tqdm) -> Results:
    dtype = token_dtype(tokenizer.vocab_size)
    for batch in batches:
        pixels = rearrange(batch.pixels, "n k c h w -> (n k) c h w").to(tokenizer.device, non_blocking=True)
        try:
            ids = tokenizer.tokenize(pixels)
        except DataError as error:
            raise DataError(f"one of the keys '{batch.keys[0]}' to '{batch.keys[-1]}': {error}") from error
        tokens = rearrange(ids, "(n k) ... -> n k (...)", n=len(batch.keys)).cpu().numpy()
        if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
            raise DataError(
                f"the tokenizer gave ids {tokens.min()} to {tokens.max()} for a vocabulary of {tokenizer.vocab_size}"
            )
        yield from zip(batch.keys, tokens.astype(dtype), batch.crops, strict=True)
        bar.update(len(batch.keys))


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
    """Check that ``folder`` contains nothing but tokens, and that those of the parts ``kept`` were made with these options.

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
            f"{folder / RECORD} is damaged, so nobody knows how its tokens were made: use another output_modality, or remove "
            "this folder"
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
