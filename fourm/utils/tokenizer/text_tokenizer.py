"""Load the text vocabulary and encode text as token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain, islice
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

import fourm
from fourm.utils.errors import UserError
from fourm.utils.tokenizer.special_tokens import CONTROL, EOS, sentinel

_JOINT = "\0"  # replaces the spaces within class names
_MAX_CACHED = 20_000  # words whose ids are cached
_MAX_PHRASE_CHARS = 16  # texts whose ids are cached as a whole, such as the chunks of metadata
_MAX_SPLIT_CHARS = 5_000  # for longer texts, the search for class names costs more than the cache saves
_CONTROL = re.compile(r"\[(?=(?:PAD|UNK|SOS|EOS|BOS|MASK|CLS|SEP|S_\d+)\])", re.IGNORECASE)

MAX_TEXT_CHARS = 2**16
"""Number of characters after which a text is truncated. Modalities take at most a few hundred tokens, so this loses
nothing unless tokens have 200 characters each. Tokenizing a text of 20 MB would otherwise take gigabytes of memory."""


class UnreadableText(ValueError):
    """A text that no tokenizer accepts."""


def escape_control_tokens(text: str) -> str:
    """Escape control tokens such as ``[EOS]`` and ``[S_1]`` in an untrusted text, so that they are just letters.

    They get the same ids as under a vocabulary without such tokens, because a pre-tokenizer splits at the bracket in
    any case. Coordinates (``v0=12``) and class names remain single tokens in any text, as in the published vocabulary:
    boxes and metadata are written with them, and they have no meaning for masking.

    Raises:
        UnreadableText: If the text contains a lone surrogate (half of a character) or a NUL character.
    """
    if len(text) > MAX_TEXT_CHARS:
        text = text[:MAX_TEXT_CHARS]
    if "\0" in text:
        raise UnreadableText("the text contains a NUL character")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = ascii(text[error.start])
            raise UnreadableText(f"the text contains half a character: {surrogate} at {error.start}") from None
    return _CONTROL.sub("[ ", text) if "[" in text else text


def load_text_tokenizer(path: str | Path) -> Tokenizer:
    """Load the vocabulary at ``path``; a path that starts with ``fourm/`` may be in the installed package.

    Raises:
        UserError: If the file does not exist, is not a tokenizer, or has other ids for the special tokens.
    """
    path = Path(path)
    if not path.exists() and path.parts[:1] == ("fourm",):
        path = Path(fourm.__file__).parent.joinpath(*path.parts[1:])
    if not path.is_file():
        raise UserError(
            f"{path}: no such text vocabulary; set text_tokenizer_path, or train one with train_wordpiece_tokenizer.py"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{path}: not a text vocabulary in the JSON format of tokenizers ({error})") from error
    for expected, token in enumerate((*CONTROL, sentinel(0), sentinel(1))):
        token_id = tokenizer.token_to_id(token)
        if token_id != expected:
            raise UserError(
                f"{path}: token {token} must have id {expected}, not {token_id}; "
                "train a vocabulary with this layout with train_wordpiece_tokenizer.py"
            )
    return tokenizer


class TextEncoder:
    """Encodes text as ids, and knows the ids of the vocabulary that masking needs.

    The vocabularies of this project first split a text at its spaces, except for those within class names of two words.
    The ids of each part are therefore cached, because words and coordinates occur again and again.

    Args:
        tokenizer: A vocabulary or the path of one.

    Attributes:
        vocab_size: Number of ids.
        eos_id: Id of [EOS].
        sentinels: Ids of [S_1], [S_2], …

    Raises:
        UserError: If the vocabulary has no [EOS] or no sentinels.
    """

    def __init__(self, tokenizer: Tokenizer | str | Path):
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_text_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        for token in (EOS, sentinel(1)):
            if token not in vocabulary:
                raise UserError(
                    f"the text vocabulary has no token {token}; train one with train_wordpiece_tokenizer.py"
                )
        self.eos_id = vocabulary[EOS]
        self.sentinels: list[int] = []
        while (sentinel_id := vocabulary.get(sentinel(len(self.sentinels) + 1))) is not None:
            self.sentinels.append(sentinel_id)
        self._splits_at_spaces = isinstance(tokenizer.normalizer, BertNormalizer) and isinstance(
            tokenizer.pre_tokenizer, BertPreTokenizer
        )
        added = (token.content for token in tokenizer.get_added_tokens_decoder().values())
        self._names_with_space = [content for content in added if " " in content]
        self._words_per_name = max((name.count(" ") + 1 for name in self._names_with_space), default=1)
        self._cache = _PartIds(tokenizer, self._whole_words())
        self._phrases = _PartIds(tokenizer, {})

    def __call__(self, text: str, limit: int | None = None) -> list[int]:
        """Return the ids of ``text``, without any special tokens around it.

        Args:
            text: The text.
            limit: Number of ids after which the rest is left out; None = all.

        Raises:
            UnreadableText: See :func:`escape_control_tokens`.
        """
        text = escape_control_tokens(text)
        if limit is None and len(text) <= _MAX_PHRASE_CHARS:
            return self._phrases[text].copy()
        can_split = self._can_split(text)
        if can_split and limit is not None and "  " not in text:
            # Every word has an id of its own, except those of a class name, which share one.
            words = text.split(" ", count := limit * self._words_per_name + 2)
            text = " ".join(words[:count]) if len(words) > count else text
        if not can_split or len(text) > _MAX_SPLIT_CHARS:
            return self._tokenizer.encode(text, add_special_tokens=False).ids[:limit]
        return list(islice(chain.from_iterable(map(self._cache.__getitem__, self._split(text))), limit))

    def _can_split(self, text: str) -> bool:
        """Return whether the tokenizer splits ``text`` at spaces, which combining or control characters may prevent."""
        return self._splits_at_spaces and text.isascii() and text.isprintable()

    def _whole_words(self) -> dict[str, int]:
        """Return the ids of the words that are certainly encoded as a single piece, in any case of their letters."""
        normalizer, model = self._tokenizer.normalizer, self._tokenizer.model
        if not (self._splits_at_spaces and normalizer.lowercase and isinstance(model, WordPiece)):
            return {}
        added = self._tokenizer.get_added_tokens_decoder().values()
        if any(token.content.isalpha() and not token.single_word for token in added):
            return {}
        own_ids = {token.content.lower() for token in added}
        pieces = self._tokenizer.get_vocab(with_added_tokens=False)
        return {piece: number for piece, number in pieces.items() if piece.isalpha() and piece not in own_ids}

    def _split(self, text: str) -> list[str]:
        """Split a text into independently encodable parts; spaces within class names are replaced by :data:`_JOINT`."""
        lower = text.lower()
        for name in self._names_with_space:
            start = lower.find(name)
            while start >= 0:
                end = start + len(name)
                text = text[:start] + text[start:end].replace(" ", _JOINT) + text[end:]
                start = lower.find(name, end)
        return text.split(" ")


class _PartIds(dict[str, list[int]]):
    """The ids of the parts of texts, which are computed at the first access.

    Args:
        tokenizer: The vocabulary.
        words: Ids of lower-case words that need no call of the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, words: Mapping[str, int]):
        super().__init__()
        self._tokenizer, self._words = tokenizer, words

    def __missing__(self, part: str) -> list[int]:
        word_id = self._words.get(part.lower()) if part.isascii() else None
        if word_id is not None:
            ids = [word_id]
        else:
            ids = self._tokenizer.encode(part.replace(_JOINT, " "), add_special_tokens=False).ids
        if len(self) >= _MAX_CACHED:
            self.clear()
        self[part] = ids
        return ids
