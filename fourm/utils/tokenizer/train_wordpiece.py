"""Train the text vocabulary: the fixed tokens, followed by the most frequent word pieces of a corpus."""

from __future__ import annotations

import json
import string
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fourm.utils.config import resolve_options
from fourm.utils.errors import UserError
from fourm.utils.files import atomic_path, check_file
from fourm.utils.options import option, parse_options
from fourm.utils.paths import AnyPath
from fourm.utils.tokenizer.special_tokens import COCO_CLASSES, CONTROL, COORDINATES, SENTINELS, UNK

DESCRIPTION = """Train a WordPiece vocabulary with the layout of the shipped one: special tokens, sentinels, coordinates
and COCO class names at fixed ids, then learned pieces. The same corpus always gives the same file. From WordNet's
data.noun, data.verb, data.adj and data.adv, the words, glosses and example sentences are read; from a JSON file, all
strings; from any other file, its lines. The members of tar files are read in the same way."""
_LETTERS = string.ascii_lowercase + string.digits  # part of every vocabulary, even if the corpus is small
_WORDNET = {f"data.{part}" for part in ("noun", "verb", "adj", "adv")}


@dataclass(frozen=True)
class TrainOptions:
    """Corpus and size of the vocabulary."""

    input: AnyPath | list[AnyPath] = option("a file or folder of text, or a list of them: '[corpus.txt, folder]'")
    output: AnyPath = option("file to write, e.g. text_tokenizer.json")
    vocab_size: int = option(
        "maximum number of tokens, including the fixed ones", 30_000, at_least=1, at_most=2**31 - 1
    )
    min_frequency: int = option("minimum number of occurrences of a learned piece", 2, at_least=0, at_most=2**31 - 1)

    def __post_init__(self) -> None:
        resolve_options(self)


def train_wordpiece(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """Train a vocabulary of at most ``vocab_size`` tokens, which begins with :func:`layout`.

    Raises:
        UserError: If there is no text, or ``vocab_size`` is too small for the fixed tokens and the letters.
    """
    fixed = layout()
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    # Strings in JSON may contain lone surrogates, which the tokenizer does not accept.
    valid = (text.encode(errors="ignore").decode() for text in texts)
    texts = [tokenizer.normalizer.normalize_str(text) for text in valid]
    if not any(texts):
        raise UserError("input: there is no text in the corpus")
    words = {word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)}
    # The trainer numbers inner letters in the order in which a hash table lists the words, and breaks ties by number.
    # Declaring them as special tokens makes the result depend on the corpus alone; this is undone below.
    inner = sorted({f"##{letter}" for word in words for letter in word[1:] + _LETTERS})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*fixed, *inner],
        initial_alphabet=list(_LETTERS + string.punctuation),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    minimum = tokenizer.get_vocab_size()
    if minimum > vocab_size:
        raise UserError(
            f"vocab_size must be at least {minimum} for the fixed tokens and the letters of this corpus, not "
            f"{vocab_size}"
        )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(fixed)]
    return Tokenizer.from_str(json.dumps(content))


def layout() -> list[AddedToken]:
    """Return the fixed tokens in the order of their ids."""

    def added(token: str, word: bool, normalized: bool = False) -> AddedToken:
        return AddedToken(token, single_word=word, normalized=normalized, special=True)

    return [
        *(added(token, word=False) for token in CONTROL),
        *(added(token, word=True) for token in (*SENTINELS, *COORDINATES)),
        *(added(token, word=True, normalized=True) for token in COCO_CLASSES),
    ]


def corpus(paths: list[str]) -> Iterator[str]:
    """Yield the texts in files and folders. Folders are read in alphabetical order, independent of the file system.

    Raises:
        UserError: If a path does not exist, or a file is not text.
    """
    for path in map(Path, paths):
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"input: {path} does not exist")
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if _is_text(p.relative_to(path)) and p.is_file())
        if path / "data.noun" in files:  # WordNet, whose other files are indices
            files = [file for file in files if file.stem == "data"]
        for file in files:
            try:
                for name, content in _members(file):
                    yield from _texts(name, content.decode())
            except RecursionError:
                raise UserError(f"input: {file} cannot be read as text: it is nested too deeply") from None
            except (ValueError, IndexError, EOFError, tarfile.TarError) as error:
                raise UserError(f"input: {file} cannot be read as text: {error}") from error


def _is_text(path: Path) -> bool:
    """Return whether a file is not one of those that operating systems create in folders."""
    return not any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db", "desktop.ini") for part in path.parts)


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of a file, or of each member of a tar file."""
    if file.suffix != ".tar":
        yield file.name, file.read_bytes()
        return
    with tarfile.open(file) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                yield member.name, content.read()


def _texts(name: str, content: str) -> Iterator[str]:
    if name.endswith(".json"):
        yield from _strings(json.loads(content))
        return
    is_wordnet = name in _WORDNET
    for line in content.splitlines():
        if not is_wordnet:
            yield line
        elif not line.startswith("  "):  # indented lines are the licence
            yield _synset(line)


def _synset(line: str) -> str:
    """Convert a line of a WordNet data file, ``offset file part count (word id)… | gloss``, to ``words: gloss``."""
    head, _, gloss = line.partition("|")
    fields = head.split()
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    return f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}"


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def check_output(path: Path) -> None:
    """Check that a vocabulary may be written to ``path``, so that a wrong path does not destroy the corpus.

    Raises:
        UserError: If the file is not a vocabulary, or cannot be written.
    """
    check_file(path)
    try:
        content = json.loads(path.read_bytes()) if path.exists() and path.stat().st_size else {"model": {}}
        replaceable = isinstance(content, dict) and "model" in content
    except (ValueError, RecursionError):
        replaceable = False
    if not replaceable:
        raise UserError(f"output: {path} exists and is not a text vocabulary: choose another name, or remove it")


def train_vocabulary(options: TrainOptions) -> None:
    """Train a vocabulary on the corpus and write it.

    Raises:
        UserError: If the corpus cannot be read or contains no text, or the vocabulary cannot be written.
    """
    check_output(Path(options.output))
    paths = [options.input] if isinstance(options.input, str) else options.input
    tokenizer = train_wordpiece(corpus(paths), options.vocab_size, options.min_frequency)
    with atomic_path(options.output) as path:
        path.write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    fixed, size = len(layout()), tokenizer.get_vocab_size()
    print(f"{options.output}: {size} tokens, {size - fixed} of them learned")


def main(argv: list[str] | None = None) -> None:
    """Run the command ``train_wordpiece_tokenizer.py``."""
    train_vocabulary(parse_options(TrainOptions, argv, DESCRIPTION))
