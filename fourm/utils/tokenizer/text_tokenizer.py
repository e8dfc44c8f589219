"""The text vocabulary from its file, and text → ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import fourm
from fourm.utils.errors import UserError
from fourm.utils.tokenizer.special_tokens import CONTROL, EOS, sentinel

_REMEMBERED = 10_000


def load_text_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary in ``path``; one that starts with ``fourm/`` is also found in the installed package.

    Raises:
        UserError: no such file, not a tokenizer, or without the special tokens at their places.
    """
    path = Path(path)
    if not path.exists() and path.parts[:1] == ("fourm",):
        path = Path(fourm.__file__).parent.joinpath(*path.parts[1:])
    if not path.is_file():
        raise UserError(
            f"{path}: no such text vocabulary; set text_tokenizer_path, or train one: train_wordpiece_tokenizer.py"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{path}: not a text vocabulary in the JSON format of tokenizers ({error})") from error
    for expected, token in enumerate((*CONTROL, sentinel(0), sentinel(1))):
        if (found := tokenizer.token_to_id(token)) != expected:
            raise UserError(
                f"{path}: token {token} must have id {expected}, not {found}; "
                "train a vocabulary with this layout: train_wordpiece_tokenizer.py"
            )
    return tokenizer


class TextEncoder:
    """Text → ids, with what masking needs to know about the vocabulary.

    Coordinates such as ``v0=17`` are words that the tokenizer cuts out before anything else, so whatever is between two
    of them can be encoded on its own. That is a class name out of a few, in the texts that consist of coordinates: these
    are remembered, which makes boxes ten times as fast.

    Args:
        tokenizer: a vocabulary, or the path of one.

    Attributes:
        vocab_size: number of ids.
        eos_id: id of [EOS].
        sentinels: (n,) int64, ids of [S_1], [S_2], …

    Raises:
        UserError: it has no [EOS] or no sentinels.
    """

    def __init__(self, tokenizer: Tokenizer | str | Path):
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_text_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        marks: list[int] = []
        while (mark := vocabulary.get(sentinel(len(marks) + 1))) is not None:
            marks.append(mark)
        for token, found in ((EOS, EOS in vocabulary), (sentinel(1), marks)):
            if not found:
                raise UserError(f"the text vocabulary has no token {token}; train one: train_wordpiece_tokenizer.py")
        self.eos_id = vocabulary[EOS]
        self.sentinels = np.array(marks, np.int64)
        special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
        self._coordinates = {token: index for token, index in special.items() if token[0] == "v" and "=" in token}
        self._remembered: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of ``text``, nothing added."""
        if "=" not in text:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        between: list[str] = []
        for word in text.split(" "):
            coordinate = self._coordinates.get(word)
            if coordinate is None:
                between.append(word)
                continue
            if between:
                ids += self._remember(" ".join(between))
                between = []
            ids.append(coordinate)
        return ids + self._remember(" ".join(between)) if between else ids

    def _remember(self, text: str) -> list[int]:
        ids = self._remembered.get(text)
        if ids is None:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            ids = self._remembered[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
