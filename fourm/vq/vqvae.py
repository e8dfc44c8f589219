"""Learned tokenizers (arXiv 2312.06647, section 2 and appendix): an encoder, a quantizer and a decoder.

All share the encoder and the quantizer of :class:`VQ`. :class:`VQVAE` decodes with a plain network, :class:`DiVAE` and
:class:`VQControlNet` decode by diffusion. The arguments, the methods and the names of the weights are those of the
published tokenizers.

Shapes: B images, C channels, H x W pixels, h x w tokens, L latent width, G codebooks.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fourm.data.transforms.image import IMAGENET_MEAN, IMAGENET_STD
from fourm.models.fm_utils import init_weights
from fourm.models.hub import HubModel
from fourm.models.modality_embedding import image_grid
from fourm.models.model_card import Tables
from fourm.utils.checkpoints import WEIGHTS
from fourm.utils.errors import DataError, UserError
from fourm.vq.mlp import BottleneckMLP, MLPSize, mlp_size
from fourm.vq.options import VQOptions, VQVAEOptions, read_options
from fourm.vq.quantizers import FSQ, WHOLE, LucidQuantizer, MemcodesQuantizer, Part, Quantized, Quantizer
from fourm.vq.tokenizer import ImageTokenizer, TokenizerConfig
from fourm.vq.vit import SIZES, ViTDecoder, ViTEncoder, vit_size
from fourm.vq.weights import Shapes, download, load_model, open_weights

_DIFFUSION = {"DiVAE": "fourm.vq.divae", "VQControlNet": "fourm.vq.controlnet"}
_NOT_OF_THE_MODEL = ("ckpt_path", "ignore_keys")  # options that only set the initial weights


class VQ(ImageTokenizer, HubModel, tags=["tokenizer"]):
    """An encoder and a quantizer.

    A subclass with a decoder sets ``options_class``, builds the decoder in :meth:`build_decoder`, and implements
    :meth:`decode_quant` and ``forward``.

    Args:
        config: The options as a mapping, instead of ``arguments``. Unknown options are ignored.
        arguments: The fields of :class:`VQOptions`; each becomes an attribute.

    Raises:
        UserError: An option is out of range, or options contradict each other.
    """

    title = "learned tokenizer"
    marks = frozenset({"enc_type", "quant_type"})
    summary = (
        "A tokenizer of the kind that 4M models use ([4M](https://arxiv.org/abs/2312.06647)): it converts what it "
        "was trained on to discrete tokens, and tokens back."
    )
    options_class: ClassVar[type[VQOptions]] = VQOptions
    quantize: Quantizer
    freeze_enc: bool
    undo_std: bool
    n_labels: int | None
    image_size: int

    def __init__(self, config: Mapping[str, Any] | None = None, **arguments: Any):
        options = read_options(self.options_class, arguments if config is None else config)
        vectors = "MLP" in options.enc_type
        super().__init__(
            TokenizerConfig(
                modality=options.modality,
                vocab_size=options.codebook_size,
                patch_size=options.image_size if vectors else options.patch_size,
                num_channels=1 if options.n_labels else options.n_channels,
                input_size=options.image_size,
                transform_options=options.transform_options,
            )
        )
        values = dataclasses.asdict(options)
        self.config = {name: value for name, value in values.items() if name not in _NOT_OF_THE_MODEL}
        for name, value in values.items():
            setattr(self, name, value)
        self.image_size_enc = options.image_size_enc or options.image_size
        self.takes_vectors = vectors
        self.input_patch = options.patch_size if options.patch_proj and not vectors else 1
        if options.n_labels:
            self.cls_emb = nn.Embedding(options.n_labels, options.n_channels)
        self.enc_dim, self.encoder = self._build_encoder(options)
        self.quant_proj = nn.Conv2d(self.enc_dim, options.latent_dim, 1)
        self.quantize = _build_quantizer(options)
        self.build_decoder(options)
        self.init_weights()
        if options.ckpt_path:
            self.init_from_ckpt(options.ckpt_path, options.ignore_keys)
        if options.freeze_enc:
            for part in self._encoding_parts():
                part.requires_grad_(False)
        self.train()

    def _build_encoder(self, options: VQOptions) -> tuple[int, nn.Module]:
        if "MLP" in options.enc_type:
            size = mlp_size(options.enc_type)
            return size.dim, BottleneckMLP(size, options.n_channels, size.dim)
        vit = vit_size(options.enc_type)
        grid = image_grid(self.image_size_enc, options.patch_size)
        return vit.dim, ViTEncoder(vit, options.n_channels, grid, self.input_patch, options.post_mlp)

    def build_decoder(self, options: Any) -> None:
        """Build the decoder and its projections."""

    def init_weights(self) -> None:
        """Initialise all parameters and buffers, for a model built on the meta device after ``to_empty``."""
        for part in self._encoding_parts():
            init_weights(part, std=1.0)

    def _encoding_parts(self) -> list[nn.Module]:
        parts = [self.encoder, self.quant_proj, self.quantize]
        return [self.cls_emb, *parts] if self.n_labels else parts

    def train(self, mode: bool = True) -> VQ:
        super().train(mode)
        if self.freeze_enc:
            for part in self._encoding_parts():
                part.eval()
        return self

    # Encoding

    def prepare_input(self, x: Tensor) -> Tensor:
        """Convert the input of :meth:`encode` to that of the encoder: colours in [-1, 1], and embeddings of class ids.

        Args:
            x: (B, C, H, W); class maps are (B, H, W) or (B, 1, H, W).

        Raises:
            DataError: The input has another shape.
        """
        x = x[:, None] if self.n_labels and x.ndim == 3 else x
        self.check_images(x)
        if self.undo_std:
            mean, std = (
                torch.tensor(values).view(3, 1, 1).to(x.device, non_blocking=True)
                for values in (IMAGENET_MEAN, IMAGENET_STD)
            )
            x = 2 * (x * std + mean) - 1
        return rearrange(self.cls_emb(x[:, 0].long()), "b h w c -> b c h w") if self.n_labels else x

    def quantized(self, x: Tensor, part: Part = WHOLE) -> Quantized:
        """Encode and quantize (B, C, H, W), without gradients if the encoder is frozen.

        Args:
            x: The input, see :meth:`prepare_input`.
            part: Which micro-batch of a training step this is.
        """
        with torch.no_grad() if self.freeze_enc else nullcontext():
            return self.quantize(self.quant_proj(self.encoder(self.prepare_input(x))), part)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode (B, C, H, W) → latents (B, L, h, w), loss (1,), ids (B, h, w) or (B, G, h, w)."""
        quantized = self.quantized(x)
        return quantized.latents, quantized.loss, quantized.ids

    @torch.no_grad()
    def tokenize(self, x: Tensor) -> Tensor:
        """Return the ids of (B, C, H, W), (B, h, w) or (B, G, h, w).

        Raises:
            DataError: The input has another shape, or contains a class id of at least ``n_labels``.
        """
        if self.n_labels and (x.min() < 0 or x.max() >= self.n_labels):
            raise DataError(
                f"class ids of {self.modality_name} must be below n_labels = {self.n_labels}, "
                f"not {x.min():.0f} to {x.max():.0f}"
            )
        return self.quantized(x).ids

    @property
    def modality_name(self) -> str:
        """The name of the modality in messages."""
        return self.info.modality or "this tokenizer"

    # Decoding

    def tokens_to_embedding(self, tokens: Tensor) -> Tensor:
        """Look up ids, (B, h, w) or (B, G, h, w) → latents (B, L, h, w)."""
        return self.quantize.embed(tokens)

    def decode_quant(self, quant: Tensor, **options: Any) -> Tensor:
        """Decode latents, (B, L, h, w) → (B, C, H, W); for class maps the channels are logits of the classes."""
        raise UserError("VQ is the encoder half of a tokenizer: load it as VQVAE, DiVAE or VQControlNet to decode")

    def decode_tokens(self, tokens: Tensor, **options: Any) -> Tensor:
        """Decode ids, (B, h, w) or (B, G, h, w), with the options of :meth:`decode_quant`."""
        return self.decode_quant(self.tokens_to_embedding(tokens), **options)

    def autoencode(self, x: Tensor, **options: Any) -> Tensor:
        """Reconstruct (B, C, H, W), with the options of :meth:`decode_quant`."""
        return self.decode_quant(self.encode(x)[0], **options)

    def forward(self, x: Tensor, part: Part = WHOLE, return_statistics: bool = False) -> tuple[Any, ...]:
        """Return latents, the loss of the quantizer (1,) and, if ``return_statistics``, its statistics."""
        quantized = self.quantized(x, part)
        return outputs(quantized.latents, quantized, return_statistics)

    @property
    def colorize(self) -> Tensor:
        """A fixed colour for each class, (3, n_labels, 1, 1)."""
        colours = torch.randn(3, self.n_labels or self.num_channels, 1, 1, generator=torch.Generator().manual_seed(0))
        return colours.to(self.device)

    def to_rgb(self, x: Tensor) -> Tensor:
        """Show scores of classes (B, n_labels, H, W) as colours (B, 3, H, W) in [0, 1]."""
        y = F.conv2d(x, self.colorize.to(x))
        return (y - y.min()) / (y.max() - y.min()).clamp(min=1e-8)

    # Files

    def save(self, folder: str | Path) -> None:
        """Save the tokenizer with :meth:`save_pretrained`."""
        self.save_pretrained(folder)

    def init_from_ckpt(self, path: str | Path, ignore_keys: Sequence[str] = ()) -> None:
        """Load the weights that the model and a file have in common.

        Args:
            path: The file of weights.
            ignore_keys: Prefixes of the names that are not loaded.

        Raises:
            UserError: The file cannot be read, a tensor has another shape, or no weight is in common.
        """
        own, loaded = self.state_dict(), 0
        with open_weights(Path(path)) as file:
            for name, shape in file.shapes.items():
                target = name
                for old, new in (("post_quant_conv", "post_quant_proj"), ("quant_conv", "quant_proj")):
                    if target.startswith(old):
                        target = f"{new}.{target.rpartition('.')[2]}"
                if target not in own or target.startswith(tuple(ignore_keys)):
                    continue
                if shape != tuple(own[target].shape):
                    raise UserError(f"{path}: {name} has shape {shape}, the model's is {tuple(own[target].shape)}")
                own[target].copy_(file.tensor(name))
                loaded += 1
        if not loaded:
            raise UserError(f"{path} holds none of the model's weights")

    def model_facts(self) -> Tables:
        config = self.config
        return {
            "Tokenizer": [
                {
                    "modality": self.info.modality,
                    "codes": config["codebook_size"],
                    "codebooks": config["num_codebooks"],
                    "quantizer": config["quant_type"],
                    "width of the codes": config["latent_dim"],
                    "image size": config["image_size"],
                    "patch size": config["patch_size"],
                    "encoder": config["enc_type"],
                    "decoder": config.get("dec_type"),
                    "parameters": sum(parameter.numel() for parameter in self.parameters()),
                }
            ]
        }

    @classmethod
    def names_in_file(cls, name: str) -> tuple[str, ...]:
        """Return the names that a weight of the model may have in a file, its own first."""
        return (name,)

    @classmethod
    def config_of_file(cls, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        """Return the options that follow from the shapes of the weights, where they differ from ``config``."""
        derived: dict[str, Any] = {}
        if positions := shapes.get("encoder.pos_emb"):
            _, derived["n_channels"], _, patch = shapes["encoder.proj.weight"]
            derived["patch_proj"] = patch > 1
            side = patch if patch > 1 else int(config.get("patch_size") or VQOptions.patch_size)
            derived |= {"patch_size": side} | _image_size_of_file("enc", config, positions[2] * side)
            derived["post_mlp"] = "encoder.norm_mlp.weight" in shapes
            derived |= _vit_of_file("enc", config, shapes)
        elif linear := shapes.get("encoder.linear_in.weight"):
            derived["n_channels"] = linear[1]
            derived["enc_type"] = _mlp_of_file("enc", config, shapes)
        if labels := shapes.get("cls_emb.weight"):
            derived["n_labels"] = labels[0]
        if codes := shapes.get("quantize._codebook.embed"):
            derived |= {"quant_type": "lucid", "codebook_size": codes[0], "latent_dim": codes[1], "num_codebooks": 1}
            derived["norm_codes"] = "quantize._codebook.embed_avg" not in shapes
        elif codes := shapes.get("quantize.codes"):
            books, size, width = codes
            derived |= {
                "quant_type": "memcodes",
                "codebook_size": size,
                "latent_dim": books * width,
                "num_codebooks": books,
            }
        return derived

    @classmethod
    def from_file(cls, path: Path, map_location: str = "cpu", **arguments: Any) -> Any:
        with open_weights(path) as file:
            return load_model(cls, file, file.header | arguments, map_location)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: Mapping[str, Any] | None = None,
        map_location: str = "cpu",
        strict: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **arguments: Any,
    ) -> Any:
        if (place := Path(model_id)).is_dir():
            path = place / WEIGHTS
        else:
            path = download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        with open_weights(path) as file:
            return load_model(cls, file, dict(config or file.header) | arguments, map_location)


class VQVAE(VQ):
    """A tokenizer with a plain decoder; for class maps it decodes logits.

    Args:
        arguments: The fields of :class:`VQVAEOptions`.
    """

    options_class = VQVAEOptions
    decoder: nn.Module

    def build_decoder(self, options: VQVAEOptions) -> None:
        channels = options.n_labels or options.n_channels
        self.image_size_dec = options.image_size_dec or options.image_size
        self.patch_size_dec = options.patch_size_dec or options.patch_size
        if "MLP" in options.dec_type:
            size = mlp_size(options.dec_type)
            self.dec_dim, self.decoder = size.dim, BottleneckMLP(size, size.dim, channels)
        else:
            vit = vit_size(options.dec_type)
            grid = image_grid(self.image_size_dec, self.patch_size_dec)
            patch = self.patch_size_dec if options.patch_proj else 1
            self.dec_dim = vit.dim
            self.decoder = ViTDecoder(vit, channels, grid, patch, options.post_mlp, options.out_conv)
        self.post_quant_proj = nn.Conv2d(options.latent_dim, self.dec_dim, 1)

    def init_weights(self) -> None:
        super().init_weights()
        init_weights(self.decoder)
        init_weights(self.post_quant_proj)

    def decode_quant(self, quant: Tensor, **options: Any) -> Tensor:
        """Decode latents as in the base class; the options of other decoders are ignored."""
        return self.decoder(self.post_quant_proj(quant))

    def forward(self, x: Tensor, part: Part = WHOLE, return_statistics: bool = False) -> tuple[Any, ...]:
        """Return the reconstruction, the loss of the quantizer (1,) and, if ``return_statistics``, its statistics."""
        quantized = self.quantized(x, part)
        return outputs(self.decode_quant(quantized.latents), quantized, return_statistics)

    @classmethod
    def config_of_file(cls, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        derived = super().config_of_file(config, shapes)
        if positions := shapes.get("decoder.pos_emb"):
            patch = int(config.get("patch_size_dec") or derived.get("patch_size") or VQOptions.patch_size)
            derived |= _image_size_of_file("dec", {**config, **derived}, positions[2] * patch)
            derived["out_conv"] = "decoder.out_conv.0.gamma" in shapes
            derived |= _vit_of_file("dec", config, shapes)
        elif "decoder.linear_in.weight" in shapes:
            derived["dec_type"] = _mlp_of_file("dec", config, shapes)
        return derived


def outputs(decoded: Tensor, quantized: Quantized, return_statistics: bool) -> tuple[Any, ...]:
    """Return the results of ``forward``: the published pair and, for training, the statistics of the quantizer."""
    return (decoded, quantized.loss, quantized.statistics) if return_statistics else (decoded, quantized.loss)


def _build_quantizer(options: VQOptions) -> Quantizer:
    if options.quant_type == "fsq":
        return FSQ(options.levels, options.commitment_weight)
    if options.quant_type == "memcodes":
        return MemcodesQuantizer(options.codebook_size, options.latent_dim, options.num_codebooks)
    return LucidQuantizer(
        options.codebook_size,
        options.latent_dim,
        options.ema_decay,
        options.commitment_weight,
        options.threshold_ema_dead_code,
    )


def _vit_of_file(side: str, config: Mapping[str, Any], shapes: Shapes) -> dict[str, str]:
    """Return the type of the encoder (``enc``) or decoder (``dec``) as an option if the configured one is not right."""
    root = f"{side}oder"
    dim, depth = shapes[f"{root}.pos_emb"][1], _count(f"{root}.blocks.", shapes)
    configured = config.get(f"{side}_type")
    if isinstance(configured, str) and "vit" in configured:
        size = vit_size(configured)
        if (size.dim, size.depth) == (dim, depth):
            return {}
    return {f"{side}_type": f"{name}_{side}" for name, size in SIZES.items() if (size.dim, size.depth) == (dim, depth)}


def _image_size_of_file(side: str, config: Mapping[str, Any], pixels: int) -> dict[str, int]:
    """Return the image size of the position table of the encoder (``enc``) or decoder (``dec``), as an option.

    The result is empty if the configured size is right. If no size is configured, it also becomes ``image_size``.
    """
    if not config.get("image_size"):
        return {"image_size": pixels, f"image_size_{side}": pixels}
    configured = config.get(f"image_size_{side}") or config["image_size"]
    return {} if configured == pixels else {f"image_size_{side}": pixels}


def _mlp_of_file(side: str, config: Mapping[str, Any], shapes: Shapes) -> str:
    """Return the type of the MLP that is the encoder (``enc``) or decoder (``dec``)."""
    root, configured = f"{side}oder", config.get(f"{side}_type")
    width = shapes[f"{root}.linear_in.weight"][0]
    hidden = shapes.get(f"{root}.blocks.0.block.0.weight", (width, width))[0]
    size = MLPSize(_count(f"{root}.blocks.", shapes), width, hidden // width)
    if isinstance(configured, str) and "MLP" in configured and mlp_size(configured) == size:
        return configured
    return f"BottleneckMLP/B_{size.depth}-Wi_{size.dim}-E_{size.expansion}"


def _count(prefix: str, shapes: Shapes) -> int:
    """Return the number of modules in the list whose names start with ``prefix``."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})


def __getattr__(name: str) -> Any:
    """Import the tokenizers with a diffusion decoder on demand, because their modules import this one."""
    if name in _DIFFUSION:
        return getattr(importlib.import_module(_DIFFUSION[name]), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
