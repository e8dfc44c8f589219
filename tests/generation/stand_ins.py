"""Tiny stand-ins of the published models and tokenizers: their names, modalities and sizes, with random weights."""

from pathlib import Path

import torch

from fourm.models import FM
from fourm.utils.config import load_yaml
from fourm.vq.divae import DiVAE
from fourm.vq.vqvae import VQVAE
from tests.models.toy_models import randomise_

ROOT = Path(__file__).parents[2]
HUB = "EPFL-VILAB"
DATA = "cfgs/default/4m/data"
MODELS = {
    "4M-7_B_CC12M": "cc12m/main/mix_mod7_all2all_rgb2all_a0.5",
    "4M-21_XL_CC12M": "cc12m+coyo+c4/main/mix_mod21_all2allmix_rgb2all_capT5bias_C4",
    "4M-7-SR_L_CC12M": "cc12m/superres/mix_mod7_superres_caption_rgb_bias",
}
VIT = {"enc_type": "vit/B_1-Wi_8-H_2", "latent_dim": 4}
FEATURES = VIT | {"dec_type": "vit/B_1-Wi_8-H_2", "patch_proj": False, "codebook_size": 8192}
PIXELS = VIT | {"dec_type": "unet_patched/Wi_32", "codebook_size": 8192}
MLP = {
    "enc_type": "BottleneckMLP/B_1-Wi_8",
    "dec_type": "BottleneckMLP/B_1-Wi_8",
    "quant_type": "memcodes",
    "codebook_size": 8192,
    "num_codebooks": 16,
    "latent_dim": 32,
}
TOKENIZERS = {
    "rgb_16k_224-448": (DiVAE, PIXELS | {"codebook_size": 16384}),
    "depth_8k_224-448": (DiVAE, PIXELS | {"n_channels": 1}),
    "normal_8k_224-448": (DiVAE, PIXELS),
    "edge_8k_224-512": (DiVAE, PIXELS | {"n_channels": 1}),
    "semseg_4k_224-448": (
        VQVAE,
        VIT | {"dec_type": "vit/B_1-Wi_8-H_2", "codebook_size": 4096, "n_labels": 134, "n_channels": 4},
    ),
    "CLIP-B16_8k_224-448": (VQVAE, FEATURES | {"n_channels": 512}),
    "DINOv2-B14_8k_224-448": (VQVAE, FEATURES | {"n_channels": 768, "patch_size": 14}),
    "ImageBind-H14_8k_224-448": (VQVAE, FEATURES | {"n_channels": 1280, "patch_size": 14}),
    "DINOv2-B14-global_8k_16_224": (VQVAE, MLP | {"n_channels": 768}),
    "ImageBind-H14-global_8k_16_224": (VQVAE, MLP | {"n_channels": 1280}),
    "human-poses_1k_8": (VQVAE, MLP | {"n_channels": 207, "codebook_size": 1024, "num_codebooks": 8}),
    "sam-instance_1k_64": (
        VQVAE,
        VIT | {"dec_type": "vit/B_1-Wi_8-H_2", "codebook_size": 1024, "image_size": 64, "n_channels": 1},
    ),
}


def write_model(name: str, folder: Path) -> None:
    """Write a model with the modalities of the published one below ``folder``."""
    domains: dict[str, list[str]] = {"in": [], "out": []}
    for dataset in load_yaml(ROOT / DATA / f"{MODELS[name]}.yaml")["train"]["datasets"].values():
        for way, names in domains.items():
            names += [d for d in dataset.get(f"{way}_domains", "").split("-") if d and d not in names]
    config = {"dim": 8, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "mlp_ratio": 2}
    torch.manual_seed(0)
    model = FM(config | {f"domains_{way}": names for way, names in domains.items()})
    randomise_(model)
    model.save_pretrained(folder / HUB / name)


def write_tokenizer(name: str, folder: Path) -> None:
    """Write a tokenizer with the channels, codes and grid of the published one below ``folder``."""
    cls, options = TOKENIZERS[name]
    torch.manual_seed(0)
    model = cls(**{"image_size": 224, **options})
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if not parameter.any():  # otherwise, what a diffusion model begins as does not read its tokens
                parameter.normal_(std=0.1)
    model.save_pretrained(folder / HUB / f"4M_tokenizers_{name}")
