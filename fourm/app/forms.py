"""Reads what a user uploads and types. Everything is untrusted: files, texts and numbers are checked before use."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourm.data.images import EncodedImage, UnreadableImage
from fourm.generation.decoding import Decoded, decode, kind_of
from fourm.generation.inputs import find_modality, make_batch, reads_pictures
from fourm.generation.plotting import titles_of
from fourm.generation.sampler import Sampler
from fourm.utils.errors import UserError

MAX_CHARACTERS = 4000
"""Maximum length of a text; models read at most a few hundred tokens of it."""
MAX_COLORS = 7
COLUMNS = ("modality", "temperature", "guidance", "steps")
"""Columns of the table of settings."""

_COLOR = re.compile(r"#?([0-9a-fA-F]{6})")


@dataclass(frozen=True)
class Field:
    """A form field for a kind of text.

    Attributes:
        label: Its title.
        placeholder: An example.
        read: Converts the text to an input of the sampler.
    """

    label: str
    placeholder: str
    read: Callable[[str], Any]


def picture_modalities(sampler: Sampler) -> list[str]:
    """Return the inputs that can be read from a picture, one of each kind: RGB first, pixels rather than tokens."""
    readable = {kind for kind, tokenizer in sampler.tokenizers.items() if reads_pictures(tokenizer)}
    names = [
        name
        for name, modality in sampler.inputs.items()
        if modality.type == "img" and (modality.is_pixels or kind_of(modality) in readable)
    ]
    kinds = dict.fromkeys(kind_of(sampler.inputs[name]) for name in names)
    known = {name: sampler.inputs[name] for name in names}
    return sorted((find_modality(kind, known, "an input") for kind in kinds), key=lambda n: kind_of(known[n]) != "rgb")


def text_modalities(sampler: Sampler) -> list[str]:
    """Return the inputs that can be typed."""
    known = sampler.inputs.items() if sampler.text_tokenizer else ()
    return [name for name, modality in known if modality.type == "seq" and kind_of(modality) in FIELDS]


def target_modalities(sampler: Sampler) -> list[str]:
    """Return the targets: the default ones in their order, then the others. Texts need the vocabulary."""
    names = [name for name, m in sampler.targets.items() if m.type != "seq" or sampler.text_tokenizer]
    return [*dict.fromkeys([*sampler.default_targets, *names])]


def read_picture(path: str | Path, name: str, sampler: Sampler, max_bytes: int) -> Decoded:
    """Read an uploaded picture as the model will see it.

    Args:
        path: The file.
        name: The modality that it shows, one of :func:`picture_modalities`.
        sampler: The model.
        max_bytes: Maximum size of the file.

    Raises:
        UserError: If the file is too large, or is not a picture that fits the modality.
    """
    if name not in picture_modalities(sampler):
        raise UserError(f"'{name}' is not a picture that this model reads")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f"the file is larger than {max_bytes / 2**20:.3g} MiB; choose a smaller picture")
    try:
        picture = EncodedImage(content)
        batch = make_batch([{name: picture}], sampler.info, sampler.tokenizers, None)
    except UnreadableImage as error:
        raise UserError(f"the file cannot be read as a picture: {error}") from error
    ((result,),) = (sample.values() for sample in decode(batch, sampler.info, sampler.tokenizers))
    return result


def read_texts(texts: Mapping[str, str], sampler: Sampler) -> dict[str, Any]:
    """Convert texts to inputs of the sampler; blank ones are left out.

    Args:
        texts: Maps each of :func:`text_modalities` to what was typed.
        sampler: The model.

    Raises:
        UserError: If a text is too long or cannot be read.
    """
    inputs = {}
    for name, text in texts.items():
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"{name}: the text has {len(text)} characters; the maximum is {MAX_CHARACTERS}")
        if text.strip():
            inputs[name] = FIELDS[kind_of(sampler.inputs[name])].read(_clean(text.strip()))
    return inputs


def _clean(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("the text contains characters that are not valid; type it again")
    return text


def _read_boxes(text: str) -> list[dict[str, Any]]:
    """Read a line per box: the class, then xmin, ymin, xmax and ymax in [0, 1]."""
    boxes = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        words = line.replace(",", " ").split()
        corners = [_number(word) for word in words[-4:]]
        if len(words) < 5 or None in corners:
            raise UserError(f"boxes, line {number}: write the class and four numbers, such as 'cup 0.1 0.2 0.5 0.9'")
        xmin, ymin, xmax, ymax = (corner for corner in corners if corner is not None)
        if not (0 <= xmin < xmax <= 1 and 0 <= ymin < ymax <= 1):
            raise UserError(
                f"boxes, line {number}: xmin ymin xmax ymax are fractions of the picture, from 0 to 1, and the minimum "
                "is below the maximum"
            )
        boxes.append({"boxes": [xmin, ymin, xmax, ymax], "class_name": " ".join(words[:-4])})
    return boxes


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _read_palette(text: str) -> list[list[int]]:
    """Read colours such as ``#ff8800``."""
    words = text.replace(",", " ").split()
    colors = [_COLOR.fullmatch(word) for word in words]
    if len(words) > MAX_COLORS or not all(colors):
        raise UserError(f"palette: write 1 to {MAX_COLORS} colours, such as '#ff8800 #2040a0'")
    return [[*bytes.fromhex(match[1])] for match in colors if match]


FIELDS: dict[str, Field] = {
    "caption": Field("Caption", "a red cup and a yellow duck", str),
    "det": Field("Boxes: class, xmin ymin xmax ymax", "cup 0.1 0.2 0.5 0.9", _read_boxes),
    "color_palette": Field("Palette", "#ff8800 #2040a0", _read_palette),
}
"""Maps each kind of text that can be typed to its field."""


def default_rows(sampler: Sampler) -> list[list[Any]]:
    """Return the table of settings: a row of :data:`COLUMNS` for each target."""
    names = target_modalities(sampler)
    return [
        [title, defaults["temps"], defaults["cfg_scales"], defaults["decoding_steps"]]
        for title, defaults in zip(titles_of(names), map(sampler.default_settings, names), strict=True)
    ]


def read_settings(rows: Iterable[Sequence[Any]], sampler: Sampler) -> dict[str, dict[str, Any]]:
    """Convert the table of settings to arguments of the sampler; values that are the defaults are left out.

    Raises:
        UserError: If a value is not a number in its range.
    """
    names = target_modalities(sampler)
    settings: dict[str, dict[str, Any]] = {"temps": {}, "cfg_scales": {}, "decoding_steps": {}}
    for name, title, row in zip(names, titles_of(names), rows, strict=False):
        modality = sampler.targets[name]
        defaults = sampler.default_settings(name)
        max_steps = (modality.max_tokens or 1) if modality.type == "img" else 1
        for column, (key, low, high) in enumerate(
            (("temps", 0.0, 100.0), ("cfg_scales", -20.0, 20.0), ("decoding_steps", 1, max_steps)), 1
        ):
            value = _number(str(row[column])) if len(row) == len(COLUMNS) else None
            whole = key == "decoding_steps"
            if value is None or not low <= value <= high or (whole and value != int(value)):
                kind = "whole number" if whole else "number"
                raise UserError(f"{title}: {COLUMNS[column]} must be a {kind} from {low:g} to {high:g}")
            if value != defaults[key]:
                settings[key][name] = int(value) if whole else value
    return {key: values for key, values in settings.items() if values}
