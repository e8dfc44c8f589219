"""Pictures in folders, and configurations of tokenizers that are trained on them in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

KEYS = {
    "input_size_min": 16,
    "input_size_max": 32,
    "resolution_step": 16,
    "input_size_eval": 32,
    "min_crop_scale": 0.5,
    "encoder_type": "vit/B_1-Wi_32-H_2",
    "decoder_type": "vit/B_1-Wi_32-H_2",
    "patch_size": 8,
    "codebook_size": 24,
    "latent_dim": 8,
    "quantizer_ema_decay": 0.9,
    "coef_ema_dead_code": 4.0,
    "epoch_size": 40,
    "epochs": 2,
    "batch_size": 4,
    "accum_iter": 1,
    "blr": 0.5,
    "warmup_epochs": 0,
    "clip_grad": 1.0,
    "dtype": "float32",
    "device": "cpu",
    "num_workers": 0,
    "log_interval": 1,
    "keep_last": 0,
    "model_ema": True,
    "model_ema_decay": 0.5,
}


def picture(rng: np.random.Generator, size: int = 40) -> Image.Image:
    """A smooth background with a rectangle in another colour."""
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR)).copy()
    top, left = rng.integers(0, size // 2, 2)
    image[top : top + size // 2, left : left + size // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(image)


def write_pictures(folder: Path, train: int = 20, val: int = 6) -> Path:
    """``train/rgb/0/0.png`` and so on, and the same below ``val``."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("val", val)):
        (folder / split / "rgb" / "0").mkdir(parents=True)
        for index in range(number):
            picture(rng).save(folder / split / "rgb" / "0" / f"{index:02}.png")
    return folder


def write_config(folder: Path, pictures: Path, **keys: object) -> Path:
    """The path of the configuration, whose run folder is ``out`` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"data_path": f"{pictures}/train", "eval_data_path": f"{pictures}/val", "output_dir": f"{folder}/out"}
    (folder / "main.yaml").write_text(yaml.safe_dump(KEYS | own | keys))
    return folder / "main.yaml"
