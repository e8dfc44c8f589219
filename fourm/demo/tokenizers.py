"""Stage 3: a tokenizer for each image modality.

Those of 64-pixel pictures are learned and come with the package, in ``trained/``. They can also be trained anew. For
any other declaration of tokens, and for the features of a network, a codebook is fitted.

    python -m fourm.demo.tokenizers RUN_FOLDER FOLDER    # saves the tokenizer of a training run in half precision
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourm.demo import network
from fourm.demo.scene import CLASSES
from fourm.demo.training import command, train
from fourm.utils.errors import UserError, run_cli
from fourm.utils.files import atomic_folder
from fourm.vq import load_tokenizer
from fourm.vq.fit_codebook import FitOptions, fit_codebook
from fourm.vq.tokenizer import CONFIG, WEIGHTS

TRAINED = Path(__file__).with_name("trained")
RECIPE = "cfgs/demo/tokenizer.yaml"
OPTIONS: dict[str, dict[str, Any]] = {
    "rgb": {"levels": [8, 8, 8, 4], "out_conv": True, "decoder_type": "vit/B_6-Wi_128-H_4"},
    "depth": {"levels": [8, 8, 8]},
    "normal": {"levels": [8, 8, 8], "out_conv": True},
    "semseg": {"levels": [8, 8, 8], "loss_fn": "cross_entropy", "n_labels": len(CLASSES), "n_channels": 16},
    "canny_edge": {"levels": [8, 8, 8]},
}
"""Modality → the options of ``run_training_vqvae.py`` that it adds to :data:`RECIPE`."""


def make_tokenizer(
    modality: str,
    declared: Mapping[str, Any],
    data: Path,
    folder: Path,
    recipe: Path,
    epochs: int,
    seed: int,
    workers: int,
) -> str:
    """Copy, train or fit the tokenizer of one modality, unless ``folder`` has it already.

    Args:
        modality: The modality of the pictures.
        declared: The declaration of its tokens in the data configuration.
        data: Folder of the demo's data.
        folder: The folder of the tokenizer.
        recipe: Training configuration of learned tokenizers.
        epochs: Train a learned tokenizer for this number of epochs, where the package has one; 0 uses that one.
        seed: Seed of the training or fitting.
        workers: Number of processes that read data.

    Returns:
        A description of the tokenizer.
    """
    if not (folder / WEIGHTS).exists():
        if not _fits(TRAINED / modality, declared):
            return _fit(modality, declared, data, folder, seed, workers)
        if epochs:
            options = OPTIONS[modality] | {"domain": modality, "epochs": epochs, "seed": seed, "output_dir": folder}
            paths = {"data_path": data / "train", "eval_data_path": data / "val"}
            train(command("train-vqvae", recipe, **paths, **options), folder)
        else:
            with atomic_folder(folder) as temporary:
                shutil.copytree(TRAINED / modality, temporary, dirs_exist_ok=True)
    info = load_tokenizer(folder).info
    return f"{info.vocab_size} ids for patches of {info.patch_size} pixels"


def _fits(folder: Path, declared: Mapping[str, Any]) -> bool:
    """Return whether there is a tokenizer in ``folder`` that gives the declared tokens."""
    if not (folder / CONFIG).exists():
        return False
    info = load_tokenizer(folder).info
    return all(getattr(info, key) == declared[key] for key in ("vocab_size", "patch_size", "input_size"))


def _fit(modality: str, declared: Mapping[str, Any], data: Path, folder: Path, seed: int, workers: int) -> str:
    """Fit a codebook and describe it."""
    images: dict[str, Any] = {"modality": modality}
    if modality == network.MODALITY:
        weights = folder.parent.parent / f"{modality}.safetensors"
        network.write_weights(weights)
        images = {"modality": "rgb", "backbone": network.BACKBONE, "backbone_weights": str(weights)}
    _, fitted = fit_codebook(
        FitOptions(
            **images,
            data_root=str(data / "train"),
            output=str(folder),
            vocab_size=declared["vocab_size"],
            patch_size=declared["patch_size"],
            input_size=declared["input_size"],
            one_hot_classes=len(CLASSES) if modality == "semseg" else None,
            num_images=1000,
            num_crops=1,
            num_patches=20_000,
            seed=seed,
            num_workers=workers,
        )
    )
    return (
        f"codebook, {fitted.used_codes} of {declared['vocab_size']} codes used, perplexity {fitted.perplexity:.0f}, "
        f"{1 - fitted.error:.0%} of the variance explained"
    )


def main(argv: list[str] | None = None) -> None:
    """Save the tokenizer of a finished training run in half precision, without what only the training needs."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2:
        raise UserError("give the run folder of a tokenizer, and the folder to save it in")
    run, folder = arguments
    tokenizer = load_tokenizer(run).half()
    (Path(folder) / "README.md").unlink(
        missing_ok=True
    )  # a card that is there is kept, but it is that of other weights
    tokenizer.save(folder)


if __name__ == "__main__":
    run_cli(main)
