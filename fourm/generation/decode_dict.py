"""Decodes a batch to plain arrays and texts, with the names and arguments of the published notebooks.

:func:`decode_dict` decodes a whole batch, and the other functions one modality. Tokenizers are a dict or ``ModuleDict``
with the keys tok_rgb, tok_depth, tok_normal, tok_canny_edge, tok_sam_edge, tok_semseg, tok_clip, tok_dinov2,
tok_imagebind, tok_dinov2_global, tok_imagebind_global, sam_instance, human_poses and controlnet. Results of a batch of
one sample have no batch axis. The side of a grid of tokens follows from their number, so ``image_size`` and
``patch_size`` only have a meaning where pictures are drawn.

:func:`fourm.generation.decoding.decode` returns more: units, tokens without a meaning, and what can be an input again.

Shapes: B batch, H x W pixels, h x w tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor, nn

from fourm.data.collate import ModDict
from fourm.generation.decoding import DETOKENIZER, Detokenizer
from fourm.generation.instances import decode_instances, draw_instances
from fourm.generation.plotting import IMAGES, colormap, principal_colors
from fourm.generation.poses import decode_poses, draw_pose
from fourm.generation.sequences import SEQUENCES, read_words
from fourm.utils.errors import UserError
from fourm.utils.normalization import denormalize
from fourm.utils.tokenizer import TextEncoder, merge_spans
from fourm.utils.tokenizer.special_tokens import EOS
from fourm.vq import ImageTokenizer

Images = Mapping[str, Any] | nn.ModuleDict
"""Maps modalities without their resolution to tokenizers; a dict or a ``torch.nn.ModuleDict``."""


def decode_dict(
    mod_dict: ModDict,
    tokenizers: Images,
    text_tokenizer: Tokenizer,
    image_size: int = 224,
    patch_size: int = 16,
    decoding_steps: int = 25,
    activate_controlnet: bool = False,
    controlnet_guidance_scale: float = 2.5,
    controlnet_cond_scale: float = 0.8,
    to_rgb: bool = True,
    seed: int | None = None,
) -> dict[str, Any]:
    """Decode every modality of a batch, inputs as well as targets.

    Args:
        mod_dict: The batch.
        tokenizers: The tokenizers.
        text_tokenizer: The text vocabulary.
        image_size: Side in pixels of what is drawn, such as a palette.
        patch_size: Ignored.
        decoding_steps: Steps of decoding by diffusion.
        activate_controlnet: Decode colours by ``tokenizers["controlnet"]``.
        controlnet_guidance_scale, controlnet_cond_scale: See :class:`fourm.generation.decoding.Detokenizer`.
        to_rgb: Draw depth and classes in colours; otherwise, they are numbers and logits.
        seed: Seed of decoding by diffusion; by default, the same tokens always give the same picture.

    Returns:
        Modality → value. RGB, normals and edges: (H, W, 3) in [0, 1]; depth: (H, W, 3), or (H, W) as it is; semantic
        segmentation: (H, W, 3), or logits (C, H, W); feature maps: (h, w, 3), principal components; global features: a
        vector; captions and boxes: a list of strings; metadata: name → number; palettes, poses and instances: a picture
        (H, W, 3); T5 embeddings: a sentence that says how many there are.

    Raises:
        UserError: If a tokenizer is missing.
    """
    if activate_controlnet:
        tokenizers = {**tokenizers, "tok_rgb": _tokenizer(tokenizers, "controlnet")}
    images: dict[str, Any] = {"image_size": image_size, "patch_size": patch_size, "t": decoding_steps, "seed": seed}
    scales: dict[str, Any] = {
        "controlnet_guidance_scale": controlnet_guidance_scale,
        "controlnet_cond_scale": controlnet_cond_scale,
    }
    decoders: dict[str, Callable[[str], Any]] = {
        "rgb": lambda key: decode_input_rgb(mod_dict, key),
        "tok_rgb": lambda key: decode_tok_rgb(mod_dict, tokenizers, key, **images, **scales),
        "tok_normal": lambda key: decode_tok_normal(mod_dict, tokenizers, key, **images),
        "tok_canny_edge": lambda key: decode_tok_canny_edge(mod_dict, tokenizers, key, **images),
        "tok_sam_edge": lambda key: decode_tok_sam_edge(mod_dict, tokenizers, key, **images),
        "tok_depth": lambda key: decode_tok_depth(mod_dict, tokenizers, key, **images, to_rgb=to_rgb),
        "tok_semseg": lambda key: decode_tok_semseg(None, mod_dict, tokenizers, key, to_rgb=to_rgb),
        "tok_clip": lambda key: decode_tok_clip(mod_dict, tokenizers, key),
        "tok_dinov2": lambda key: decode_tok_dinov2(mod_dict, tokenizers, key),
        "tok_imagebind": lambda key: decode_tok_imagebind(mod_dict, tokenizers, key),
        "tok_dinov2_global": lambda key: decode_tok_dinov2_global(mod_dict, tokenizers, key),
        "tok_imagebind_global": lambda key: decode_tok_imagebind_global(mod_dict, tokenizers, key),
        "metadata": lambda key: decode_metadata(mod_dict, key, text_tokenizer),
        "color_palette": lambda key: decode_color_palette(mod_dict, key, text_tokenizer, image_size),
        "human_poses": lambda key: decode_human_poses(mod_dict, tokenizers, key, text_tokenizer, image_size),
        "sam_instance": lambda key: decode_sam_instances(mod_dict, tokenizers, key, text_tokenizer, image_size),
        "t5_caption": lambda key: _t5_caption(mod_dict[key]),
    }
    texts: Callable[[str], Any] = lambda key: _without_end(decode_text(mod_dict, key, text_tokenizer)[2])  # noqa: E731
    return {key: decoders.get(key.split("@")[0], texts)(key) for key in mod_dict}


# Images.


def decode_input_rgb(mod_dict: ModDict, key: str) -> np.ndarray:
    """Return pixels that were normalised by the statistics of ImageNet: (H, W, 3) in [0, 1]."""
    return tensor_to_images(denormalize(mod_dict[key]["tensor"].detach().float()))


def decode_tok_rgb(
    mod_dict: ModDict,
    tokenizers: Images,
    key: str,
    image_size: int = 224,
    patch_size: int = 16,
    t: int = 25,
    seed: int | None = None,
    controlnet_guidance_scale: float = 2.5,
    controlnet_cond_scale: float = 0.8,
) -> np.ndarray:
    """Decode colours, normals or edges.

    Args:
        mod_dict: The batch.
        tokenizers: The tokenizers.
        key: The modality.
        image_size, patch_size: Ignored.
        t: Steps of decoding by diffusion.
        seed: Seed of the first sample, which those of the others follow.
        controlnet_guidance_scale, controlnet_cond_scale: Of a ControlNet.

    Returns:
        (H, W, 3) in [0, 1].

    Raises:
        UserError: If the tokenizer is missing.
    """
    detokenizer = Detokenizer(t, controlnet_guidance_scale, controlnet_cond_scale)
    pixels = _decode(mod_dict, tokenizers, key, detokenizer, seed)
    return tensor_to_images(pixels.expand(-1, 3, -1, -1) * 0.5 + 0.5)


decode_tok_normal = decode_tok_rgb
decode_tok_canny_edge = decode_tok_rgb
decode_tok_sam_edge = decode_tok_rgb


def decode_tok_depth(
    mod_dict: ModDict,
    tokenizers: Images,
    key: str,
    image_size: int = 224,
    patch_size: int = 16,
    t: int = 25,
    seed: int | None = None,
    to_rgb: bool = True,
) -> np.ndarray:
    """Decode depth.

    Args:
        to_rgb: Draw the range of each image in colours.

    The other arguments are those of :func:`decode_tok_rgb`.

    Returns:
        (H, W, 3) in [0, 1], or (H, W) as the tokenizer decodes it.
    """
    depth = _decode(mod_dict, tokenizers, key, Detokenizer(t), seed)[:, 0].numpy()
    if not to_rgb:
        return _squeezed(depth)
    low, high = (bound(depth, axis=(1, 2), keepdims=True) for bound in (np.min, np.max))
    return _squeezed(colormap("turbo", (depth - low) / np.maximum(high - low, 1e-6)))


def decode_tok_semseg(
    rgb_img: Any,
    mod_dict: ModDict,
    tokenizers: Images,
    key: str,
    image_size: int = 224,
    patch_size: int = 16,
    to_rgb: bool = True,
    **ignored: Any,
) -> Any:
    """Decode classes.

    Args:
        rgb_img: Ignored; the published function drew the classes upon it.
        to_rgb: Draw the classes in colours.

    The other arguments are those of :func:`decode_tok_rgb`.

    Returns:
        (H, W, 3) in [0, 1], or the logits as a tensor, (C, H, W).
    """
    logits = _decode(mod_dict, tokenizers, key)
    if not to_rgb:
        return logits[0] if len(logits) == 1 else logits
    ids = (logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0].round().long()).numpy()
    return _squeezed(IMAGES["semseg"](ids) / np.float32(255))


def decode_tok_clip(mod_dict: ModDict, tokenizers: Images, key: str, *sizes: Any, **ignored: Any) -> np.ndarray:
    """Decode a feature map: (h, w, 3), its principal components in [0, 1]. Further arguments are ignored."""
    return _squeezed(np.stack([pca_visualize(features) for features in _decode(mod_dict, tokenizers, key)]))


decode_tok_dinov2 = decode_tok_clip
decode_tok_imagebind = decode_tok_clip


def decode_tok_dinov2_global(mod_dict: ModDict, tokenizers: Images, key: str, *sizes: Any, **ignored: Any) -> Tensor:
    """Decode a global feature to its vector, (C,). Further arguments are ignored."""
    vectors = _decode(mod_dict, tokenizers, key).flatten(1)
    return vectors[0] if len(vectors) == 1 else vectors


decode_tok_imagebind_global = decode_tok_dinov2_global


def pca_visualize(features: Any, n_components: int = 3) -> np.ndarray:
    """Draw a feature map.

    Args:
        features: A tensor (C, h, w) or (1, C, h, w), or an array (h, w, C).
        n_components: Number of principal components.

    Returns:
        The components of each position, (h, w, ``n_components``), scaled to [0, 1].
    """
    if isinstance(features, Tensor):
        features = features.detach().float().cpu().reshape(features.shape[-3:]).permute(1, 2, 0).numpy()
    return principal_colors([features], n_components)(features).clip(0, 1)


def tensor_to_images(tensor: Tensor) -> np.ndarray:
    """Convert pixels (B, C, H, W) in [0, 1] to an array (B, H, W, C), or (H, W, C) if there is one image."""
    return _squeezed(tensor.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())


def _decode(
    mod_dict: ModDict, tokenizers: Images, key: str, detokenizer: Detokenizer = DETOKENIZER, seed: int | None = None
) -> Tensor:
    return detokenizer.decode(_tokenizer(tokenizers, key.split("@")[0]), mod_dict[key]["tensor"].flatten(1), seed)


def _tokenizer(tokenizers: Images, name: str) -> ImageTokenizer:
    if name not in tokenizers:
        raise UserError(f"{name} cannot be decoded without its tokenizer; add it to tokenizers as '{name}'")
    tokenizer: Any = tokenizers[name]
    return tokenizer


def _squeezed(values: Any) -> Any:
    return values[0] if len(values) == 1 else values


# Sequences.


def decode_text(mod_dict: ModDict, key: str, text_tokenizer: Tokenizer) -> tuple[list[str], list[str], list[str]]:
    """Return the texts of a sequence modality: inputs, targets, and targets in their places within the inputs."""
    entry, sentinels = mod_dict[key], TextEncoder(text_tokenizer).sentinels
    inputs, targets = (_ids(entry, mask) for mask in ("input_mask", "target_mask"))
    merged = [merge_spans(*rows, sentinels) for rows in zip(inputs, targets, strict=True)]
    as_input, as_target, as_merged = (
        [text_tokenizer.decode(ids, skip_special_tokens=False) for ids in rows] for rows in (inputs, targets, merged)
    )
    return as_input, as_target, as_merged


def decode_metadata(mod_dict: ModDict, key: str, text_tokenizer: Tokenizer) -> Any:
    """Return name → number; of a batch of several samples, a list."""
    return _squeezed(_parsed(mod_dict, key, text_tokenizer))


def decode_color_palette(mod_dict: ModDict, key: str, text_tokenizer: Tokenizer, image_size: int = 224) -> np.ndarray:
    """Draw the colours of a palette side by side: (H, W, 3) in [0, 1], white without colours."""
    pictures = []
    for colors in _parsed(mod_dict, key, text_tokenizer):
        row = np.array(colors or [[255] * 3], np.float32) / 255
        columns = row[np.arange(image_size) * len(row) // image_size]
        pictures.append(np.broadcast_to(columns, (image_size, image_size, 3)).copy())
    return _squeezed(np.stack(pictures))


def decode_human_poses(
    mod_dict: ModDict, tokenizers: Images, key: str, text_tokenizer: Tokenizer, image_size: int = 224
) -> np.ndarray:
    """Draw people: (H, W, 3) in [0, 1]."""
    return _drawn(decode_poses, draw_pose, mod_dict, tokenizers, key, text_tokenizer, image_size)


def decode_sam_instances(
    mod_dict: ModDict,
    tokenizers: Images,
    key: str,
    text_tokenizer: Tokenizer,
    image_size: int = 224,
    token_len: int = 16,
) -> np.ndarray:
    """Draw segmented instances: (H, W, 3) in [0, 1].

    Raises:
        UserError: If ``token_len``, the number of codes of an instance, is not 16.
    """
    if token_len != 16:
        raise UserError(f"token_len: an instance has 16 codes, not {token_len}")
    return _drawn(decode_instances, draw_instances, mod_dict, tokenizers, key, text_tokenizer, image_size)


def _drawn(
    decode: Callable, draw: Callable, mod_dict: ModDict, tokenizers: Images, key: str, text_tokenizer: Any, size: int
) -> np.ndarray:
    tokenizer = _tokenizer(tokenizers, key.split("@")[0])
    values = [decode(value, tokenizer)[0] for value in _parsed(mod_dict, key, text_tokenizer)]
    return _squeezed(np.stack([draw(value, size=size) for value in values]) / np.float32(255))


def _parsed(mod_dict: ModDict, key: str, text_tokenizer: Tokenizer) -> list[Any]:
    """Return what the parser of the modality reads in each sample."""
    parse = SEQUENCES[key.split("@")[0]]
    return [parse(read_words(ids, text_tokenizer)[0])[0] for ids in _ids(mod_dict[key], "input_mask")]


def _ids(entry: Mapping[str, Tensor], mask: str) -> list[list[int]]:
    return [row[~masked.bool()].tolist() for row, masked in zip(entry["tensor"], entry[mask], strict=True)]


def _without_end(texts: Sequence[str]) -> list[str]:
    return [text.replace(f" {EOS}", "").removesuffix(EOS) for text in texts]


def _t5_caption(entry: Mapping[str, Tensor]) -> Any:
    return _squeezed([f"{count} embeddings of a T5 caption" for count in (~entry["input_mask"].bool()).sum(1).tolist()])
