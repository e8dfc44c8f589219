"""Parses ids of the text vocabulary into captions, boxes, palettes, metadata, poses and instances.

This is the inverse of :mod:`fourm.data.transforms.sequence`. Because a model may generate malformed sequences, parsers
keep what can be read, and drop and count the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders

from fourm.data.transforms.sequence import METADATA
from fourm.utils.tokenizer.special_tokens import EOS_ID, NUM_BINS, PAD_ID, SENTINELS, SOS, UNK

Parsed = tuple[Any, int]
"""The parsed value, and the number of dropped words."""

# Patterns match a text with one word per line, because class names contain spaces.
_WORD = r"(?:(?!v[0-3]=)[^\n]+\n)"
_CODE = r"(?:v[01]=\d+\n)"
_NUMBER = re.compile(r"v[0-3]=\d+$")


def _numbers(roles: Iterable[int]) -> str:
    return "".join(rf"v{role}=(\d+)\n" for role in roles)


def read_words(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[list[str], int]:
    """Return the words up to [EOS], and the number of tokens that belong to none, such as unknown ids and sentinels."""
    words: list[str] = []
    special = {UNK, SOS, *SENTINELS}
    dropped = 0
    for token_id in ids:
        if token_id == EOS_ID:
            break
        token = tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token_id == PAD_ID:
            continue
        if token is None or token in special:
            dropped += 1
        elif token.startswith("##") and words and not _NUMBER.match(words[-1]):
            words[-1] += token[2:]
        else:
            words.append(token.removeprefix("##"))
    return words, dropped


def caption(words: Sequence[str]) -> Parsed:
    """Parse a sentence."""
    sentence = decoders.WordPiece(cleanup=True).decode(list(words)).replace(" ' ", "'")
    return re.sub(r" ([:;)])", r"\1", sentence), 0


def boxes(words: Sequence[str]) -> Parsed:
    """Parse ``[{"boxes": [xmin, ymin, xmax, ymax] in [0, 1], "class_name": …}]``; boxes without an area are dropped."""

    def read(match: re.Match) -> dict[str, Any] | None:
        box = _box(match.groups()[:4])
        return {"boxes": box, "class_name": " ".join(match[5].split("\n")).strip()} if box else None

    return _find_all(rf"{_numbers(range(4))}({_WORD}+)", words, read)


def color_palette(words: Sequence[str]) -> Parsed:
    """Parse ``[[r, g, b], …]``, at most as many colours as the text announces."""

    def read(match: re.Match) -> list[int] | None:
        color = [int(value) for value in match.groups()]
        return color if max(color) < 256 else None

    announced = re.match(r"v1=([1-7])$", words[0]) if words else None
    count, rest = (int(announced[1]), words[1:]) if announced else (7, words)
    colors, dropped = _find_all(_numbers([0, 0, 0]), rest, read)
    return colors[:count], dropped + 3 * len(colors[count:])


def metadata(words: Sequence[str]) -> Parsed:
    """Parse ``{name: value}``; the value of a bin is its middle."""

    def read(match: re.Match) -> tuple[str, float] | None:
        key, number = map(int, match.groups())
        if key >= len(METADATA):
            return None
        name, scale = [*METADATA.items()][key]
        value = scale.decode(number)
        return (name, round(value, 4)) if scale.encode(value) == number else None

    pairs, dropped = _find_all(_numbers([1, 0]), words, read)
    first = dict(reversed(pairs))
    return {name: first[name] for name, _ in pairs}, dropped + 2 * (len(pairs) - len(first))


def human_poses(words: Sequence[str]) -> Parsed:
    """Parse ``[{"box", "pose", "global", "shape", "camera"}]``; a person has the parts that could be read."""
    parts: dict[str, tuple[str, Callable[[list[int]], list[float]]]] = {
        "pose": (rf"pose\n({_CODE}{{8}})", list),
        "global": (r"global\n((?:v0=\d+\n){9})", _rescale(499.5, 499.5)),
        "shape": (r"shape\n((?:v0=\d+\n){10})", _rescale(166.5, 499.5)),
        "camera": (r"camera\n((?:v0=\d+\n)+)", _rescale(49.95, 49.95)),
    }
    blocks, dropped = _blocks("human", words)
    people = []
    for person in blocks:
        match = re.match(_numbers(range(4)), _text(person))
        box = match and _box(match.groups())
        if not box:
            dropped += 1 + len(person)
            continue
        entry: dict[str, Any] = {"box": box}
        person = person[4:]
        for name, (pattern, scale) in parts.items():
            match = re.search(rf"^{pattern}", _text(person), re.M)
            if match:
                entry[name] = scale(_codes(match[1]))
                person = (_text(person)[: match.start()] + _text(person)[match.end() :]).splitlines()
        dropped += len(person)
        people.append(entry)
    return people, dropped


def sam_instances(words: Sequence[str]) -> Parsed:
    """Parse ``[{"point": [row, column], "polygons": [{"box", "codes"}]}]``; points are in pixels at a size of 224."""
    blocks, dropped = _blocks("point", words)
    points = []
    for point in blocks:
        match = re.match(_numbers([0, 1]), _text(point))
        if not match:
            dropped += 1 + len(point)
            continue

        def read(polygon: re.Match) -> dict[str, Any] | None:
            box = _box(polygon.groups()[:4])
            return {"box": box, "codes": _codes(polygon[5])} if box else None

        pattern = rf"polygon\n{_numbers(range(4))}({_CODE}{{16}})"
        rest = point[2:]
        polygons, dropped_words = _find_all(pattern, rest, read) if rest != ["none"] else ([], 0)
        dropped += dropped_words
        points.append({"point": [int(value) for value in match.groups()], "polygons": polygons})
    return points, dropped


SEQUENCES: dict[str, Callable[[Sequence[str]], Parsed]] = {
    "caption": caption,
    "det": boxes,
    "color_palette": color_palette,
    "metadata": metadata,
    "human_poses": human_poses,
    "sam_instance": sam_instances,
}
"""Maps each kind of sequence, which is the name of its transform, to its parser."""


def _text(words: Sequence[str]) -> str:
    return "".join(f"{word}\n" for word in words)


def _find_all(pattern: str, words: Sequence[str], read: Callable[[re.Match], Any]) -> tuple[list[Any], int]:
    """Read all matches, of which ``read`` rejects some by returning None, and count the words outside of the others."""
    values = []
    used = 0
    for match in re.finditer(f"^{pattern}", _text(words), re.M):
        value = read(match)
        if value is not None:
            values.append(value)
            used += match[0].count("\n")
    return values, len(words) - used


def _blocks(head: str, words: Sequence[str]) -> tuple[list[list[str]], int]:
    """Return the words after each ``head``, and the number of words before the first; a single ``none`` means none."""
    starts = [i for i, word in enumerate(words) if word == head]
    ends = [*starts, len(words)]
    dropped = 0 if list(words) == ["none"] else ends[0]
    return [list(words[start + 1 : end]) for start, end in zip(starts, ends[1:], strict=True)], dropped


def _box(numbers: Iterable[str]) -> list[float] | None:
    """Return the corners of a box in [0, 1], or None if it has no area."""
    xmin, ymin, xmax, ymax = (min(int(value) / (NUM_BINS - 1), 1.0) for value in numbers)
    return [round(c, 4) for c in (xmin, ymin, xmax, ymax)] if xmin < xmax and ymin < ymax else None


def _codes(text: str) -> list[int]:
    """Return the codes of a text: ``v0=i`` is i, ``v1=i`` is 512 + i."""
    return [512 * int(role) + int(value) for role, value in re.findall(r"v(\d)=(\d+)", text)]


def _rescale(factor: float, offset: float) -> Callable[[list[int]], list[float]]:
    return lambda numbers: [round((number - offset) / factor, 4) for number in numbers]
