"""The options of learned tokenizers: encoder, quantizer and decoder, under their published names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fourm.utils.errors import UserError
from fourm.utils.options import Options, option
from fourm.utils.paths import InputPath


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(Options):
    """Encoder"""

    encoder_type: str = option("vit_s_enc, vit_b_enc, vit_l_enc, or BottleneckMLP/B_6-Wi_1024", "vit_s_enc", fixed=True)
    patch_size: int = option(
        "side length in pixels of the patch that a token stands for", 16, at_least=1, at_most=10_000, fixed=True
    )
    post_mlp: bool = option("end the encoder and the decoder with an MLP", True, fixed=True)
    input_size_enc: int | None = option(
        "image size in pixels of the encoder's position table (default: input_size_max)",
        None,
        at_least=1,
        at_most=10_000,
        fixed=True,
    )
    undo_std: bool = option("convert ImageNet-standardised pictures to [-1, 1]", False, fixed=True)
    freeze_enc: bool = option("train only the decoder", False, fixed=True)
    full_ckpt: InputPath = option(
        "start from this whole tokenizer: a run folder, .safetensors, .pth, s3:// URL, or a hub id", ""
    )
    encoder_ckpt: InputPath = option("the same, but start only from its encoder and quantizer", "")

    def check(self) -> None:
        if self.full_ckpt and self.encoder_ckpt:
            raise UserError("set only one of full_ckpt and encoder_ckpt")


@dataclass(frozen=True, kw_only=True)
class QuantizerOptions(Options):
    """Quantizer"""

    quantizer_type: Literal["lucid", "memcodes", "fsq"] = option("kind of codebook", "lucid", fixed=True)
    codebook_size: int = option("number of codes", 8192, at_least=2, at_most=2**24, fixed=True)
    num_codebooks: int = option("number of codes per position (memcodes)", 1, at_least=1, at_most=1024, fixed=True)
    latent_dim: int = option("width of a code", 32, at_least=1, at_most=2**16, fixed=True)
    levels: list[int] = option(
        "fsq: number of levels of each channel, instead of codebook_size and latent_dim", [], fixed=True
    )
    norm_codes: bool = option("compare latents and codes by their direction", True, fixed=True)
    norm_latents: bool = option("normalise latents before they are quantized", False, fixed=True)
    quantizer_ema_decay: float = option("share of a code that each step keeps", 0.8, at_least=0, at_most=1, fixed=True)
    coef_ema_dead_code: float = option(
        "replace codes that are used this many times less often than on average; 0 = never",
        4.0,
        at_least=0,
        fixed=True,
    )
    code_replacement_policy: Literal["batch_random", "linde_buzo_gray"] = option(
        "how codes are replaced: by random latents of the step, or by copies of frequent codes",
        "batch_random",
        fixed=True,
    )
    commitment_weight: float = option(
        "weight of the distance between latents and their codes; for fsq, of that from the range of its levels",
        1.0,
        at_least=0,
        fixed=True,
    )
    kmeans_init: bool = option("initialise the codes by k-means on the first batch", False, fixed=True)

    def check(self) -> None:
        if self.quantizer_type == "fsq":
            if not self.levels:
                raise UserError(
                    "'levels' is not set: quantizer_type fsq needs them, such as [8, 5, 5, 5] for 1000 codes"
                )
            object.__setattr__(self, "codebook_size", math.prod(self.levels))
            object.__setattr__(self, "latent_dim", len(self.levels))

    def quantizer_arguments(self) -> dict[str, Any]:
        """Return the arguments of the quantizer for the model's constructor."""
        return {
            "quant_type": self.quantizer_type,
            "codebook_size": self.codebook_size,
            "num_codebooks": self.num_codebooks,
            "latent_dim": self.latent_dim,
            "levels": self.levels,
            "norm_codes": self.norm_codes,
            "norm_latents": self.norm_latents,
            "sync_codebook": False,
            "kmeans_init": self.kmeans_init,
            "ema_decay": self.quantizer_ema_decay,
            "code_replacement_policy": self.code_replacement_policy,
            "commitment_weight": self.commitment_weight,
        }


@dataclass(frozen=True, kw_only=True)
class DecoderOptions(Options):
    """Decoder"""

    decoder_type: str = option(
        "vit_s_dec, vit_b_dec, vit_l_dec or BottleneckMLP/B_6-Wi_1024; diffusion: unet_patched or uvit_b_p4_f16",
        "vit_b_dec",
        fixed=True,
    )
    out_conv: bool = option("end the decoder with two convolutional blocks at full resolution", False, fixed=True)
    input_size_dec: int | None = option(
        "image size in pixels of the decoder (default: input_size_max)", None, at_least=1, at_most=10_000, fixed=True
    )
    patch_size_dec: int | None = option(
        "side length of its patches (default: patch_size); for unet_patched always 4",
        None,
        at_least=1,
        at_most=10_000,
        fixed=True,
    )


@dataclass(frozen=True, kw_only=True)
class ConditionOptions(Options):
    """Conditioning of a diffusion model"""

    num_train_timesteps: int = option("number of noise levels", 1000, at_least=1, at_most=10**6, fixed=True)
    cls_free_guidance_dropout: float = option(
        "share of the samples whose tokens are hidden in training", 0.0, at_least=0, at_most=1, fixed=True
    )
    masked_cfg: bool = option("hide only some of these samples' tokens", False, fixed=True)
    masked_cfg_low: int = option("minimum number of tokens that are hidden then", 0, at_least=0, fixed=True)
    masked_cfg_high: int | None = option("maximum number (default: all)", None, at_least=0, fixed=True)
    num_eval_timesteps: int = option("denoising steps of evaluations", 50, at_least=1, at_most=1000)

    def condition_arguments(self) -> dict[str, Any]:
        """Return the arguments of the conditioning for the model's constructor."""
        names = ("cls_free_guidance_dropout", "masked_cfg", "masked_cfg_low", "masked_cfg_high")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(ConditionOptions):
    """Diffusion decoder"""

    beta_schedule: str = option(
        "noise schedule: linear, scaled_linear, squaredcos_cap_v2 or shifted_cosine:SHIFT", "linear", fixed=True
    )
    prediction_type: Literal["sample", "epsilon", "v_prediction", "v_prediction-epsilon_loss"] = option(
        "what the decoder predicts: the picture, the noise or the velocity", "sample", fixed=True
    )
    zero_terminal_snr: bool = option("make the last noise level pure noise", True, fixed=True)
    conditioning: Literal["concat"] = option("how a U-ViT sees the tokens", "concat", fixed=True)
    dec_transformer_dropout: float = option("dropout in a U-ViT", 0.2, at_least=0, below=1, fixed=True)
    thresholding: bool | None = option(
        "clamp predicted pictures to [-1, 1] while sampling (default: if the domain's values lie there)", None
    )
    clip_sample: bool = option("the same, by another published name", False)
    eval_noise_schedule: Literal["DDIMScheduler", "DDPMScheduler"] = option("sampler of evaluations", "DDIMScheduler")

    def diffusion_arguments(self, bounded: bool) -> dict[str, Any]:
        """Return the arguments of the diffusion decoder for the model's constructor.

        Args:
            bounded: Whether the values of the images lie in [-1, 1].
        """
        names = (
            "num_train_timesteps",
            "beta_schedule",
            "zero_terminal_snr",
            "conditioning",
            "dec_transformer_dropout",
            "clip_sample",
        )
        return (
            {name: getattr(self, name) for name in names}
            | self.condition_arguments()
            | {
                "prediction_type": self.prediction_type.removesuffix("-epsilon_loss"),
                "thresholding": bounded if self.thresholding is None else self.thresholding,
                "scheduler": "ddim" if self.eval_noise_schedule == "DDIMScheduler" else "ddpm",
            }
        )


@dataclass(frozen=True, kw_only=True)
class ControlNetOptions(ConditionOptions):
    """Stable Diffusion with a ControlNet"""

    sd_path: str = option("Stable Diffusion 1.5: a folder or a hub id", "runwayml/stable-diffusion-v1-5", fixed=True)
    input_size_sd: int | None = option(
        "side in pixels of its pictures (default: input_size_max)", None, at_least=1, at_most=10_000, fixed=True
    )
    max_input_size: bool = option("read pictures at the larger of input_size_max and input_size_sd", False, fixed=True)
    pretrained_cn: bool = option("start the ControlNet from the UNet's weights", False, fixed=True)
    use_xformer: bool = option("published; attention always runs in memory-efficient kernels", False)
    guidance_scale: float = option("classifier-free guidance of evaluations", 2.5, at_least=0)
    cond_scale: float = option("weight of the ControlNet in evaluations", 1.0, at_least=0)
    include_caption: bool = option("published; texts are not read", False)


@dataclass(frozen=True, kw_only=True)
class PublishedOptions(Options):
    """Published keys of tokenizers that change nothing"""

    min_lr: float = option("only 0 is accepted: set min_blr, the final learning rate per 256 samples", 0.0, at_least=0)
    warmup_lr: float = option("ignored: the warm-up begins at 0", 1e-6, at_least=0)
    model_ema_update_freq: int = option(
        "only 1 is accepted: the moving average is updated in every step", 1, at_least=1
    )
    epoch_eval: bool = option("ignored: step_eval decides", False)
    eval_metrics_freq: int = option("ignored: every evaluation has the metrics", 0, at_least=0)
    eval_image_log_freq: int = option("ignored: every evaluation has its picture", 0, at_least=0)
    standardize_surface_normals: bool = option("only false is accepted: normals are in [-1, 1]", False)

    def check(self) -> None:
        if self.min_lr:
            raise UserError("'min_lr' is not scaled with the batch: set 'min_blr', the final rate per 256 samples")
        if self.model_ema_update_freq != 1:
            raise UserError("'model_ema_update_freq' can only be 1; to average over more steps, raise model_ema_decay")
        if self.standardize_surface_normals:
            raise UserError("'standardize_surface_normals': normals are always in [-1, 1]; leave it out")
