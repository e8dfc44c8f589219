"""Converts pictures, texts and boxes to a batch, with the transforms of the data pipeline but without random crops."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fourm.data.data_config import split_domains
from fourm.data.decoding import EncodedImage, decode_value
from fourm.data.image_augmenter import center_crop
from fourm.data.modality_info import Modality
from fourm.data.modality_transforms import MODALITY_TRANSFORMS, GridTransform, ScalarTransform, transforms_for
from fourm.data.transforms.image import ImageTransform, image_size
from fourm.generation.batch_entries import init_full_input_modality
from fourm.generation.decoding import Decoded, Tokenizers, kind_of
from fourm.utils.errors import DataError, UserError, did_you_mean
from fourm.utils.tokenizer.special_tokens import EOS_ID, PAD_ID
from fourm.utils.tokenizer.text_tokenizer import escape_control_tokens
from fourm.vq.crops import tokenizer_transform
from fourm.vq.domains import transform_of
from fourm.vq.tokenizer import ImageTokenizer


def find_modality(name: str, known: Mapping[str, Modality], role: str, avoid: Collection[str] = ()) -> str:
    """Find a modality by its name or by an abbreviation: ``depth`` → ``tok_depth@224``.

    Of several matches, pixels are preferred to tokens, and smaller pictures to larger ones.

    Args:
        name: The name or abbreviation.
        known: The modalities of the model.
        role: What the modality is to be, for the error message, e.g. ``an input``.
        avoid: Modalities that are chosen only if nothing else matches.

    Raises:
        UserError: If no modality matches.
    """
    if name in known:
        return name
    short = {candidate: candidate.split("@")[0] for candidate in known}
    matches = [candidate for candidate in known if short[candidate] in (name, f"tok_{name}")]
    if not matches:
        options = [*known, *(value.removeprefix("tok_") for value in short.values())]
        raise UserError(f"'{name}' is not {role} of this model{did_you_mean(name, options)}")
    return min(matches, key=lambda m: (m in avoid, not known[m].is_pixels, known[m].input_size or 0))


def split_names(names: str | Sequence[str], known: Mapping[str, Modality], where: str) -> tuple[str, ...]:
    """Split full or short names joined by ``-``.

    Raises:
        UserError: If a name is unknown or repeated, or there is none.
    """
    short = {name.split("@")[0].removeprefix("tok_") for name in known} | {name.split("@")[0] for name in known}
    return split_domains(names, {*known, *short}, where)


def is_given(target: Modality, inputs: Mapping[str, Modality]) -> bool:
    """Return whether one of the inputs has the same content as the target, such as the pixels of its tokens."""
    return any(
        name == target.name or (kind_of(m), m.type, m.input_size) == (kind_of(target), "img", target.input_size)
        for name, m in inputs.items()
    )


def make_batch(
    samples: Sequence[Mapping[str, Any]],
    modality_info: Mapping[str, Modality],
    tokenizers: Tokenizers,
    text_tokenizer: Tokenizer | None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Make a batch that has all of ``samples`` as input. Tokens of a grid that are −1 are unknown and may be generated.

    Args:
        samples: Samples that map the same modalities to values; see :func:`read_value`.
        modality_info: The modalities of the model.
        tokenizers: Tokenizers of images.
        text_tokenizer: Text vocabulary.
        device: Device of the batch.

    Raises:
        UserError: If the modalities of the samples differ, or a value does not fit its modality.
    """
    names = list(samples[0])
    for sample in samples:
        if sample.keys() != set(names):
            raise UserError(f"all samples need the same inputs: {', '.join(names)}, but one has {', '.join(sample)}")
    batch: dict[str, Any] = {}
    for name in names:
        values = [
            read_value(sample[name], modality_info[name], tokenizers, text_tokenizer, _frame(sample, modality_info))
            for sample in samples
        ]
        batch[name] = {"tensor": _stack(values)}
        batch = init_full_input_modality(batch, modality_info, name, device)
        if modality_info[name].type == "img" and not modality_info[name].is_pixels:
            tensor = batch[name]["tensor"]
            batch[name] |= {"tensor": tensor.clamp(min=0), "input_mask": tensor < 0, "target_mask": tensor >= 0}
    return batch


def _frame(sample: Mapping[str, Any], modality_info: Mapping[str, Modality]) -> tuple[int, int] | None:
    """Return height and width of the picture of the sample, to which the boxes refer."""
    for name, value in sample.items():
        if modality_info[name].is_pixels and modality_info[name].transform in MODALITY_TRANSFORMS:
            try:
                return None if isinstance(value, Decoded) else image_size(_load(value))  # results are square
            except (OSError, ValueError):
                return None  # reading the picture itself reports the error
    return None


def read_value(
    value: Any,
    modality: Modality,
    tokenizers: Tokenizers,
    text_tokenizer: Tokenizer | None,
    frame: tuple[int, int] | None = None,
) -> Tensor:
    """Convert one value to the tensor that the model takes. Pictures are cropped to their centre square.

    Args:
        value: For pictures, a file, a PIL image or an array. For tokens, one of these, unless their tokenizer reads
            features, or ids, which are −1 where they are unknown. For texts, a string, or the content of the modality's
            files (boxes: ``[{"boxes": …, "class_name": …}]``, a palette: ``[[r, g, b], …]``). For any modality, a
            result, whose ids or pixels the model gets unchanged.
        modality: The modality.
        tokenizers: Tokenizers of images.
        text_tokenizer: Text vocabulary.
        frame: Height and width of the picture to which boxes refer; the model gets the boxes in its centre square.

    Raises:
        UserError: If the value does not fit the modality, or its tokenizer or vocabulary is missing.
        DataError: If the value or its file cannot be read.
    """
    try:
        if isinstance(value, Decoded):
            return _reuse(value, modality)
        transform = transforms_for({modality.name: modality})[modality.name]
        if modality.type == "seq_token" or isinstance(transform, (ScalarTransform, GridTransform)):
            return _numbers(value, modality, transform)
        if modality.is_pixels:
            return read_pixels(value, transform, modality.input_size)
        if modality.type == "img":
            return _tokens(value, modality, tokenizers)
        if modality.type == "seq_emb":
            return torch.as_tensor(value, dtype=torch.float32)
        return _text(value, modality, text_tokenizer, frame)
    except UserError as error:
        raise type(error)(f"{modality.name}: {error}") from error
    except (TypeError, KeyError, ValueError, OSError) as error:
        description = str(value) if isinstance(value, Path) else str(value)[:80]
        raise DataError(f"{modality.name}: {description} cannot be read: {error}") from error


def _reuse(result: Decoded, modality: Modality) -> Tensor:
    """Return what a model has read or generated, unchanged."""
    if result.tensor is None or result.tensor.is_floating_point() != (modality.vocab_size is None):
        raise UserError(
            f"this {result.kind} does not hold {'values' if modality.vocab_size is None else 'ids'} of a model: name "
            "results by their full modality names, and pass files for results that were read from disk"
        )
    if modality.is_pixels:
        return result.tensor
    return _tokens(result.tensor, modality, {}) if modality.type == "img" else result.tensor[: modality.max_tokens]


def read_pixels(value: Any, transform: Any, size: int | None) -> Tensor:
    """Read the centre square of a picture at ``size`` through its transform: (C, H, W), or (H, W) for class ids."""
    assert isinstance(transform, ImageTransform)
    picture = transform.preprocess(_load(value))
    crop = center_crop(image_size(picture))
    target = None if size is None else (size, size)
    pixels = transform.postprocess(transform.image_augment(picture, crop, False, None, target, None))
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _tokens(value: Any, modality: Modality, tokenizers: Tokenizers) -> Tensor:
    """Return ids as they are (the first of several stored crops), and tokenize pictures."""
    value = _load(value)
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind == "i"):
        ids = torch.as_tensor(np.asarray(value)).long().reshape(-1, modality.max_tokens or 1)[0]
        if ids.min() < -1 or ids.max() >= (modality.vocab_size or 0):
            raise DataError(
                f"ids must be below {modality.vocab_size}, and -1 where they are unknown, but they range from "
                f"{int(ids.min())} to {int(ids.max())}"
            )
        return ids
    tokenizer = tokenizers.get(kind_of(modality))
    if tokenizer is None:
        raise UserError(f"a picture needs the tokenizer of {kind_of(modality)}; pass it in tokenizers, or pass ids")
    if not reads_pictures(tokenizer):
        raise UserError(
            f"its tokenizer reads features ({tokenizer.info.modality}), not pictures: pass ids, such as those that "
            "`fourm tokenize` has written"
        )
    transform = tokenizer_transform(tokenizer.info.modality, tokenizer.info.transform_options)
    pixels = read_pixels(value, transform, modality.input_size)
    pixels = pixels if pixels.ndim == 3 else pixels[None]
    return tokenizer.tokenize(pixels[None].float().to(tokenizer.device)).flatten().cpu()


def reads_pictures(tokenizer: ImageTokenizer) -> bool:
    """Return whether a tokenizer can be given pictures; others read the features of another network."""
    return not isinstance(transform_of(tokenizer.info.modality), GridTransform)


def _numbers(value: Any, modality: Modality, transform: Any) -> Tensor:
    """Read a scalar, a grid of numbers, or codes followed by [EOS] (the first of several stored crops)."""
    value = transform.preprocess(_load(value))
    numbers = torch.from_numpy(transform.postprocess(transform.image_augment(value, None, False, None, None, 0)))
    if modality.type == "seq_token":
        end = [EOS_ID] if modality.vocab_offset > EOS_ID else []
        return torch.cat([numbers + modality.vocab_offset, torch.tensor(end, dtype=torch.long)])[: modality.max_tokens]
    return numbers


def _text(value: Any, modality: Modality, text_tokenizer: Tokenizer | None, frame: tuple[int, int] | None) -> Tensor:
    """Return the ids of a text and [EOS], truncated to the maximum length of training."""
    if text_tokenizer is None:
        raise UserError("texts need the text vocabulary; pass text_tokenizer")
    value = _load(value) if isinstance(value, Path) else value
    if not isinstance(value, str):
        value = _to_text(value, modality, frame)
    ids = text_tokenizer.encode(escape_control_tokens(value), add_special_tokens=False).ids
    return torch.tensor([*ids, EOS_ID][: modality.max_tokens])


def _to_text(value: Any, modality: Modality, frame: tuple[int, int] | None) -> str:
    """Convert a value to text for the centre crop, which is also the first of several stored crops."""
    transform = MODALITY_TRANSFORMS.get(str(modality.transform), MODALITY_TRANSFORMS["caption"])
    kind = kind_of(modality)
    if kind == "det" and not isinstance(value, Mapping):
        value = {"instances": value}
    if kind == "color_palette" and not isinstance(value[0], Mapping):
        return transform.postprocess(value)
    crop = None if frame is None else center_crop(frame)
    cropped = transform.image_augment(transform.preprocess(value), crop, False, frame, None, 0)
    text = transform.postprocess(transform.choose(cropped, np.random.default_rng(0)))
    return text if isinstance(text, str) else " ".join(text)


def _load(value: Any) -> Any:
    """Read a value from its file; return other values as they are."""
    if isinstance(value, (str, Path)):
        path = Path(value)
        if not path.is_file():
            raise UserError(f"there is no file {value}")
        try:
            value = decode_value(path.name, path.read_bytes())
            return EncodedImage(value, False) if isinstance(value, bytes) else value
        except Exception as error:  # decoders raise many types of errors for damaged files
            raise DataError(f"{path} cannot be read: {error}") from error
    return value


def _stack(values: Iterable[Tensor]) -> Tensor:
    """Stack values; rows of ids are padded to the longest."""
    values = list(values)
    if values[0].ndim == 1:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=PAD_ID)
    return torch.stack(values)
