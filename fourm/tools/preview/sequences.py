"""What became of each token of a sequence, and of each box, colour or value that the tokens say.

Masking is done with the places of the tokens instead of their ids, so that its rows tell which of them are input and target.
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
from fourm.data.masking import Masked, UnifiedMasking
from fourm.data.modality_info import Modality
from fourm.data.transforms.sequence import Box
from fourm.utils.tokenizer.special_tokens import EOS, EOS_ID, sentinel, sentinel_id

UNUSED, INPUT, TARGET = range(3)
ROLES = ("unused", "input", "target")
_FIRST = 2**40  # stands for the first place; far above all ids

Reader = Callable[[Modality, torch.Tensor], Any]
"""What ids (n,) of a text say, as generation reads it: boxes, colours, values."""


class Piece(NamedTuple):
    """A token of a sequence; ``role``: input, target, unused, or mark (a sentinel)."""

    text: str
    role: str


class Annotation(NamedTuple):
    """What some tokens of a sequence say.

    Attributes:
        label, value: its name, and a number.
        boxes: in the picture.
        point: (x, y) in [0, 1].
        color: red, green, blue.
        roles: of its tokens, input or target or both.
    """

    label: str = ""
    value: str = ""
    boxes: tuple[Box, ...] = ()
    point: tuple[float, float] | None = None
    color: tuple[int, int, int] | None = None
    roles: tuple[str, ...] = ()


class Places(UnifiedMasking):
    """``masking`` with the places of tokens in place of their ids; sentinels are themselves, and so are grids."""

    def __init__(self, masking: UnifiedMasking):
        vars(self).update(vars(masking))

    def encode(self, modality: Modality, value: Any) -> tuple[list[int], np.ndarray]:
        ids, lengths = super().encode(modality, value)
        return list(range(_FIRST, _FIRST + len(ids))), lengths

    def apply(self, sample: Mapping[str, Any], budgets: Budgets, generator: np.random.Generator) -> dict[str, Masked]:
        vectors = [name for name in sample if self.modality_info[name].type == "seq_emb"]
        places = {name: np.arange(_FIRST, _FIRST + len(sample[name]))[:, None] for name in vectors}
        return super().apply({**sample, **places}, budgets, generator)


def roles_of(entry: Masked, length: int) -> tuple[np.ndarray, dict[int, int]]:
    """The role of each of ``length`` tokens, and sentinel → the place that it is before.

    Args:
        entry: a row that :class:`Places` made.
    """
    roles, marks = np.full(length, UNUSED), dict[int, int]()
    for role, mask in ((INPUT, "input_mask"), (TARGET, "target_mask")):
        tensor = entry["tensor"]
        ids = tensor[~entry[mask][: len(tensor)]].ravel()  # vectors end with the last input
        places = ids[ids >= _FIRST] - _FIRST
        roles[places] = role
        for at in np.flatnonzero(ids < _FIRST).tolist():
            if role == INPUT:  # it stands behind what is kept,
                place = ids[at - 1] - _FIRST + 1 if at else 0
            elif at + 1 < len(ids):  # before its span,
                place = ids[at + 1] - _FIRST
            else:  # or closes, unless the span of a text that is all dropped was cut off
                place = length if at or INPUT in roles else 0
            marks.setdefault(int(ids[at]), int(place))
    return roles, marks


@dataclass(frozen=True)
class SequenceReader:
    """Ids of sequences → words and annotations.

    Args:
        text_tokenizer: of modalities of type ``seq``.
        read: what reads texts that have a form.
    """

    text_tokenizer: Tokenizer
    read: Reader

    def __call__(
        self, ids: Sequence[int], entry: Masked, modality: Modality
    ) -> tuple[tuple[Piece, ...], tuple[Annotation, ...]]:
        """All tokens of a sequence with its sentinels, and what they say, if they are more than just words.

        Args:
            ids: the whole sequence.
            entry: the row that :class:`Places` made of it.
        """
        roles, marks = roles_of(entry, len(ids))
        if modality.type == "seq_emb":  # its gaps are zeros, without a name
            return tuple(Piece("·", ROLES[role]) for role in roles), ()
        return tuple(self._pieces(ids, roles, marks, modality)), tuple(self._annotations(ids, roles, modality))

    def _pieces(
        self, ids: Sequence[int], roles: np.ndarray, marks: Mapping[int, int], modality: Modality
    ) -> Iterator[Piece]:
        for place in range(len(ids) + 1):
            yield from (Piece(self._word(mark, modality), "mark") for mark, before in marks.items() if before == place)
            if place < len(ids):
                yield Piece(self._word(ids[place], modality), ROLES[roles[place]])

    def _annotations(self, ids: Sequence[int], roles: np.ndarray, modality: Modality) -> Iterator[Annotation]:
        form = _FORMS.get(modality.transform) if modality.type == "seq" else None
        if form is None:
            return
        starts = [start for number, (start, word) in enumerate(self._words(ids)) if form.begins(number, word)]
        for start, end in itertools.pairwise([*starts, len(ids)]):
            own = tuple(ROLES[role] for role in (INPUT, TARGET) if role in roles[start:end])
            for annotation in form.annotations(self.read(modality, torch.tensor(ids[start:end]))):
                yield annotation._replace(roles=own)

    def _words(self, ids: Sequence[int]) -> list[tuple[int, str]]:
        """Where each word begins, and its text."""
        words: list[tuple[int, str]] = []
        for place, token in enumerate(self.text_tokenizer.id_to_token(index) or "" for index in ids):
            if token.startswith("##") and words:
                words[-1] = words[-1][0], words[-1][1] + token[2:]
            else:
                words.append((place, token))
        return words

    def _word(self, index: int, modality: Modality) -> str:
        if modality.type == "seq":
            return self.text_tokenizer.id_to_token(index) or "?"
        if index < modality.vocab_offset:
            return EOS if index == EOS_ID else sentinel(index - sentinel_id(0))
        return str(index - modality.vocab_offset)


class _Form(NamedTuple):
    """How a text says things: which of its words, by number and text, begin one, and what becomes of the value read."""

    begins: Callable[[int, str], bool]
    annotations: Callable[[Any], list[Annotation]]


_FORMS: dict[str | None, _Form] = {
    "det": _Form(
        lambda number, word: word.startswith("v0="),
        lambda boxes: [Annotation(box["class_name"], boxes=(tuple(box["boxes"]),)) for box in boxes],
    ),
    "human_poses": _Form(
        lambda number, word: word == "human",
        lambda people: [Annotation("human", boxes=(tuple(person["box"]),)) for person in people],
    ),
    "sam_instance": _Form(
        lambda number, word: word == "point",
        lambda points: [
            Annotation(point=(x / 224, y / 224), boxes=tuple(tuple(polygon["box"]) for polygon in point["polygons"]))
            for point in points
            for y, x in [point["point"]]
        ],
    ),
    "color_palette": _Form(
        lambda number, word: number % 3 == 1,  # behind their number, three words each
        lambda colors: [Annotation(color=tuple(color)) for color in colors],
    ),
    "metadata": _Form(
        lambda number, word: word.startswith("v1="),
        lambda values: [Annotation(name.replace("_", " "), f"{value:.4g}") for name, value in values.items()],
    ),
}
