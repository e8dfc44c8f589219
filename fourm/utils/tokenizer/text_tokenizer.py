"""The text vocabulary from its file, and text → ids."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

import fourm
from fourm.utils.errors import UserError
from fourm.utils.tokenizer.special_tokens import CONTROL, EOS, sentinel

_JOINT = "\0"
_MOST_KNOWN = 20_000
_LONG = 2_000  # characters; beyond, looking for class names would cost more than it saves
_CONTROL = re.compile(r"\[(?=(?:PAD|UNK|SOS|EOS|BOS|MASK|CLS|SEP|S_\d+)\])", re.IGNORECASE)

MAX_TEXT_CHARS = 2**16
"""Of a text that is tokenized; the rest is cut off. No modality takes more than a few hundred tokens, so nothing of what it
takes is lost unless they have 200 characters each; a text of 20 MB would otherwise take gigabytes."""


class UnreadableText(ValueError):
    """A text that no tokenizer takes."""


def written_text(text: str) -> str:
    """What a person or a file wrote, without control over the model: ``[EOS]`` or ``[S_1]`` in it are brackets and letters.

    They get the ids that they have where the vocabulary has no such tokens: a pre-tokenizer cuts at the bracket in any case.
    Coordinates (``v0=12``) and class names stay single tokens in any text, as the published vocabulary has it: boxes and
    metadata are written with them, and they mean nothing to masking.

    Raises:
        UnreadableText: it has half a character (a lone surrogate) or a NUL in it.
    """
    if len(text) > MAX_TEXT_CHARS:
        text = text[:MAX_TEXT_CHARS]
    if "\0" in text:
        raise UnreadableText("a text with a NUL character in it")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise UnreadableText(f"a text with half a character in it: {half} at {error.start}") from None
    return _CONTROL.sub("[ ", text) if "[" in text else text


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

    A vocabulary of this project cuts a text at its spaces before anything else, but for those within a class name of two
    words. What is between is therefore encoded once and remembered: words and coordinates come again and again.

    Args:
        tokenizer: a vocabulary, or the path of one.

    Attributes:
        vocab_size: number of ids.
        eos_id: id of [EOS].
        sentinels: ids of [S_1], [S_2], …

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
        self.sentinels = marks
        self._cuts_at_spaces = isinstance(tokenizer.normalizer, BertNormalizer) and isinstance(
            tokenizer.pre_tokenizer, BertPreTokenizer
        )
        added = (token.content for token in tokenizer.get_added_tokens_decoder().values())
        self._with_space = [content for content in added if " " in content]
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of ``text``, nothing added.

        Raises:
            UnreadableText: see :func:`written_text`.
        """
        text = written_text(text)
        if len(text) > _LONG or not self._is_plain(text):
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for part in self._parts(text):
            found = self._known.get(part)
            if found is None:
                found = self._tokenizer.encode(part.replace(_JOINT, " "), add_special_tokens=False).ids
                if len(self._known) >= _MOST_KNOWN:
                    self._known.clear()
                self._known[part] = found
            ids += found
        return ids

    def _is_plain(self, text: str) -> bool:
        """Whether spaces are where the tokenizer cuts; others have accents that combine, control characters, …"""
        return self._cuts_at_spaces and text.isascii() and text.isprintable()

    def _parts(self, text: str) -> list[str]:
        """What can be encoded on its own; spaces within a class name are replaced by :data:`_JOINT`."""
        lower = text.lower()
        for name in self._with_space:
            at = lower.find(name)
            while at >= 0:
                end = at + len(name)
                text = text[:at] + text[at:end].replace(" ", _JOINT) + text[end:]
                at = lower.find(name, end)
        return text.split(" ")
