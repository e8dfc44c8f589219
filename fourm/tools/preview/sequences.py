"""Roles (input or target) of each token of a sequence, and of each box, colour or value that tokens encode.

The positions of the tokens are masked instead of their ids, so that the result shows which tokens are input and target.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from fourm.data.budgets import Budgets
from fourm.data.masking import Masked, Masking
from fourm.data.modality_info import Modality
from fourm.data.transforms.sequence import Box
from fourm.utils.tokenizer.special_tokens import EOS, EOS_ID, sentinel, sentinel_id

UNUSED, INPUT, TARGET = range(3)
ROLES = ("unused", "input", "target")
_POSITION_OFFSET = 2**40  # added to positions to distinguish them from ids

Reader = Callable[[Modality, torch.Tensor], Any]
"""Parses the ids (n,) of a text like generation into boxes, colours or values."""


class Piece(NamedTuple):
    """A token of a sequence; its ``role`` is input, target, unused, or mark (a sentinel)."""

    text: str
    role: str


class Annotation(NamedTuple):
    """The content that some tokens of a sequence encode.

    Attributes:
        label: Name of the content.
        value: Formatted number.
        boxes: Boxes in the picture.
        point: (x, y) in [0, 1].
        color: Red, green and blue, 0 to 255.
        roles: Roles of the tokens: input, target or both.
    """

    label: str = ""
    value: str = ""
    boxes: tuple[Box, ...] = ()
    point: tuple[float, float] | None = None
    color: tuple[int, int, int] | None = None
    roles: tuple[str, ...] = ()


class PositionMasking(Masking):
    """Masks the positions of sequence tokens instead of their ids; sentinels and grids keep their ids."""

    def __init__(self, masking: Masking):
        vars(self).update(vars(masking))

    def encode(self, modality: Modality, value: Any) -> tuple[list[int], np.ndarray]:
        ids, lengths = super().encode(modality, value)
        return list(range(_POSITION_OFFSET, _POSITION_OFFSET + len(ids))), lengths

    def apply(self, sample: Mapping[str, Any], budgets: Budgets, generator: np.random.Generator) -> dict[str, Masked]:
        vectors = [name for name in sample if self.modality_info[name].type == "seq_emb"]
        positions = {
            name: np.arange(_POSITION_OFFSET, _POSITION_OFFSET + len(sample[name]))[:, None] for name in vectors
        }
        return super().apply({**sample, **positions}, budgets, generator)


def roles_of(entry: Masked, length: int) -> tuple[np.ndarray, dict[int, int]]:
    """Return the role of each of ``length`` tokens, and sentinel → position of the token that follows it.

    Args:
        entry: Masked row of :class:`PositionMasking`.
        length: Number of tokens of the sequence.
    """
    roles = np.full(length, UNUSED)
    marks: dict[int, int] = {}
    for role, mask in ((INPUT, "input_mask"), (TARGET, "target_mask")):
        tensor = entry["tensor"]
        ids = tensor[~entry[mask][: len(tensor)]].ravel()  # vectors end with the last input
        roles[ids[ids >= _POSITION_OFFSET] - _POSITION_OFFSET] = role
        for at in np.flatnonzero(ids < _POSITION_OFFSET).tolist():
            if role == INPUT:  # the sentinel follows kept tokens
                position = ids[at - 1] - _POSITION_OFFSET + 1 if at else 0
            elif at + 1 < len(ids):  # the sentinel precedes its span
                position = ids[at + 1] - _POSITION_OFFSET
            else:  # the final sentinel, unless all tokens were dropped and the span was cut off
                position = length if at or INPUT in roles else 0
            marks.setdefault(int(ids[at]), int(position))
    return roles, marks


@dataclass(frozen=True)
class SequenceReader:
    """Converts ids of sequences to words and annotations.

    Args:
        text_tokenizer: The vocabulary of modalities of type ``seq``.
        read: Parses texts with a known format.
    """

    text_tokenizer: Tokenizer
    read: Reader

    def __call__(
        self, ids: Sequence[int], entry: Masked, modality: Modality
    ) -> tuple[tuple[Piece, ...], tuple[Annotation, ...]]:
        """Return all tokens of a sequence with its sentinels, and the annotations that they encode.

        Args:
            ids: The whole sequence.
            entry: Masked row of :class:`PositionMasking` for it.
            modality: Modality of the sequence.
        """
        roles, marks = roles_of(entry, len(ids))
        if modality.type == "seq_emb":  # gaps are zero vectors instead of sentinels
            return tuple(Piece("·", ROLES[role]) for role in roles), ()
        return tuple(self._pieces(ids, roles, marks, modality)), tuple(self._annotations(ids, roles, modality))

    def _pieces(
        self, ids: Sequence[int], roles: np.ndarray, marks: Mapping[int, int], modality: Modality
    ) -> Iterator[Piece]:
        for position in range(len(ids) + 1):
            for mark, next_position in marks.items():
                if next_position == position:
                    yield Piece(self._word(mark, modality), "mark")
            if position < len(ids):
                yield Piece(self._word(ids[position], modality), ROLES[roles[position]])

    def _annotations(self, ids: Sequence[int], roles: np.ndarray, modality: Modality) -> Iterator[Annotation]:
        text_format = _FORMATS.get(modality.transform) if modality.type == "seq" else None
        if text_format is None:
            return
        starts = [start for index, (start, word) in enumerate(self._words(ids)) if text_format.begins(index, word)]
        for start, end in itertools.pairwise([*starts, len(ids)]):
            used_roles = tuple(ROLES[role] for role in (INPUT, TARGET) if role in roles[start:end])
            for annotation in text_format.annotations(self.read(modality, torch.tensor(ids[start:end]))):
                yield annotation._replace(roles=used_roles)

    def _words(self, ids: Sequence[int]) -> list[tuple[int, str]]:
        """Return the position and text of each word."""
        words: list[tuple[int, str]] = []
        for position, token in enumerate(self.text_tokenizer.id_to_token(index) or "" for index in ids):
            if token.startswith("##") and words:
                words[-1] = words[-1][0], words[-1][1] + token[2:]
            else:
                words.append((position, token))
        return words

    def _word(self, index: int, modality: Modality) -> str:
        if modality.type == "seq":
            return self.text_tokenizer.id_to_token(index) or "?"
        if index < modality.vocab_offset:
            return EOS if index == EOS_ID else sentinel(index - sentinel_id(0))
        return str(index - modality.vocab_offset)


class _Format(NamedTuple):
    """The format of a text.

    Attributes:
        begins: Whether a word, given its index and text, begins a new item.
        annotations: Converts the parsed value of an item to annotations.
    """

    begins: Callable[[int, str], bool]
    annotations: Callable[[Any], list[Annotation]]


_FORMATS: dict[str | None, _Format] = {
    "det": _Format(
        lambda number, word: word.startswith("v0="),
        lambda boxes: [Annotation(box["class_name"], boxes=(tuple(box["boxes"]),)) for box in boxes],
    ),
    "human_poses": _Format(
        lambda number, word: word == "human",
        lambda people: [Annotation("human", boxes=(tuple(person["box"]),)) for person in people],
    ),
    "sam_instance": _Format(
        lambda number, word: word == "point",
        lambda points: [
            Annotation(point=(x / 224, y / 224), boxes=tuple(tuple(polygon["box"]) for polygon in point["polygons"]))
            for point in points
            for y, x in [point["point"]]
        ],
    ),
    "color_palette": _Format(
        lambda number, word: number % 3 == 1,  # the number of colours, then three words per colour
        lambda colors: [Annotation(color=tuple(color)) for color in colors],
    ),
    "metadata": _Format(
        lambda number, word: word.startswith("v1="),
        lambda values: [Annotation(name.replace("_", " "), f"{value:.4g}") for name, value in values.items()],
    ),
}
