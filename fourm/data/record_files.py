"""Find the local files or the Hugging Face hub data set that a ``data_path`` names, and read their rows."""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import itertools
import logging
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol, cast

from fourm.data.layout import expand
from fourm.utils.dependencies import optional_import
from fourm.utils.errors import UserError
from fourm.utils.seeds import generator
from fourm.utils.urls import redact_url

log = logging.getLogger(__name__)

MAX_RECORD_BYTES = 4 * 2**20  # per line: shuffle buffers hold many lines, and a small gzip file can expand to gigabytes
_MAX_SKIPPED_BYTES = 2**30  # of a too large line, while searching for its end
_TEXT, _TABLES = (".json", ".jsonl", ".txt"), (".parquet", ".arrow")
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
}
_NON_RECORD_FILES = (
    "readme",
    "license",
    "dataset_info",
    "dataset_dict",
    "state.json",
)  # prefixes of files beside the data
_KNOWN_EXTENSIONS = f"{', '.join(_TEXT)} (also .gz), {', '.join(_TABLES)}"
_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+){0,2}")

Row = tuple[str, str, bytes | Mapping[str, Any] | None]  # key, file or data set, content (None if it is too large)


def local_files(data_path: str) -> list[str] | None:
    """Return the files that a ``data_path`` names, or None if it names a data set on the hub.

    The path may be a file, a folder, or a pattern of either with braces, ``*`` and ``~``. A suffix such as
    ``:validation`` selects the files of a folder with this word in their names; the default is the files of ``train``,
    if there are any.

    Raises:
        UserError: The path does not exist and cannot be the name of a data set on the hub.
    """
    if re.match(r"\w+://", data_path):
        raise UserError(
            f"data_path {redact_url(data_path)}: records are read only from local files or the hub; download it first"
        )
    paths = _matching_paths(data_path)
    split = ""
    if not paths and re.search(r":\w+$", data_path):
        path, _, split = data_path.rpartition(":")
        paths = _matching_paths(path)
    if not paths:
        path = data_path.rpartition(":")[0] if split else data_path
        if _is_local(path):
            raise UserError(f"data_path {data_path}: there is no such file or folder")
        return None
    files = [file for path in paths for file in (_files_in(path, split) if os.path.isdir(path) else [path])]
    unreadable = next((file for file in files if not _has_extension(file, *_TEXT, *_TABLES)), None)
    if unreadable:
        raise UserError(f"data_path {data_path}: {unreadable} has no readable extension ({_KNOWN_EXTENSIONS})")
    if len({_has_extension(file, *_TABLES) for file in files}) > 1:
        raise UserError(
            f"data_path {data_path}: found both text files and tables; "
            f"choose one of them, for example {strip_slash(data_path)}/*.jsonl"
        )
    return files


def strip_slash(data_path: str) -> str:
    """Return the path without a trailing slash."""
    return data_path.rstrip("/") or "/"


def open_rows(data_path: str) -> RowSource:
    """Open the source of rows that a ``data_path`` names.

    Raises:
        UserError: The files or the data set do not exist, or a package is missing.
    """
    files = local_files(data_path)
    if files is None:
        return HubRows(data_path)
    return Tables(data_path, files) if _has_extension(files[0], *_TABLES) else TextFiles(files)


def is_text(path: str) -> bool:
    """Return whether the lines of a file are text rather than JSON."""
    return _has_extension(path, ".txt")


def _has_extension(path: str, *extensions: str) -> bool:
    """Return whether a file, compressed or not, has one of the ``extensions``."""
    return path.lower().removesuffix(".gz").endswith(extensions)


def _is_local(path: str) -> bool:
    """Return whether a path that does not exist cannot be the name of a data set on the hub."""
    return (
        path.startswith(("/", ".", "~"))
        or _has_extension(path, *_TEXT, *_TABLES)
        or any(sign in path for sign in "*?[{\\")
    )


def _matching_paths(pattern: str) -> list[str]:
    """Return the files and folders that match a pattern. Braces name files that must exist, ``*`` those that do."""
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):
        return [pattern]
    expanded = expand(pattern, None)
    paths: list[str] = []
    for path in expanded:
        paths += sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    if len(expanded) == 1 and not _has_extension(pattern, *_TEXT, *_TABLES):
        return [path for path in paths if os.path.exists(path)]  # a missing one may be on the hub
    return paths


def _files_in(folder: str, split: str) -> list[str]:
    """Return the record files in a folder and its subfolders, restricted to one split if file names contain splits."""
    by_split: dict[str, list[str]] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if (
                _has_extension(name, *_TEXT, *_TABLES)
                and not name.startswith(".")
                and not name.lower().startswith(_NON_RECORD_FILES)
            ):
                by_split.setdefault(_split_of(os.path.relpath(path, folder)), []).append(path)
    if not by_split:
        raise UserError(f"data_path {folder}: contains no record files ({_KNOWN_EXTENSIONS})")
    wanted = _SPLITS.get(split, split)
    named = sorted(by_split.keys() - {""})
    if not wanted:  # use all files unless their names distinguish training from evaluation
        wanted = "train" if "train" in named else "".join(named)
        if len(named) > 1 and wanted != "train":
            raise UserError(
                f"data_path {folder}: has files of {' and '.join(named)}; write {strip_slash(folder)}:{named[0]}"
            )
    if wanted not in by_split:
        available = ", ".join(named) or "none, judging by the file names"
        raise UserError(f"data_path {folder}:{split}: there are no files of {split}; the splits are: {available}")
    others = sum(len(paths) for name, paths in by_split.items() if name != wanted)
    if others:
        log.info(
            "data_path %s: using %d files of %s, ignoring %d others", folder, len(by_split[wanted]), wanted, others
        )
    return by_split[wanted]


def _split_of(path: str) -> str:
    """Return the split (``train``, ``validation``, ``test`` or "") that the last matching word of a path names."""
    words = re.findall(r"[a-z]+", path.lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), "")


class RowSource(Protocol):
    """A source of rows: local files or a data set on the hub."""

    def share(self, key: tuple, stream: int, num_streams: int) -> Iterator[Row]:
        """Iterate once over the rows that belong to one of ``num_streams`` streams.

        Args:
            key: Seed of the order of the files.

        Raises:
            UserError: The rows cannot be read.
        """
        ...


class TextFiles:
    """The lines of local files.

    Each stream reads its own files if there are at least as many files as streams, and otherwise its own lines.
    """

    def __init__(self, paths: list[str]):
        self._paths = paths
        for path in paths:
            if not Path(path).is_file():
                raise UserError(f"data_path {path}: there is no such file")

    def share(self, key: tuple, stream: int, num_streams: int) -> Iterator[Row]:
        paths = [self._paths[index] for index in generator(*key).permutation(len(self._paths))]
        if len(paths) >= num_streams:
            paths, stream, num_streams = paths[stream::num_streams], 0, 1
        rows = itertools.chain.from_iterable(map(self._rows, paths))
        return itertools.islice(rows, stream, None, num_streams)

    @staticmethod
    def _rows(path: str) -> Iterator[Row]:
        try:
            with _open(path) as file:
                for number, line in enumerate(_read_lines(file), 1):
                    if number == 1 and not is_text(path) and line in (b"[", b"{"):
                        raise UserError(
                            f"data_path {path}: has one JSON value over several lines instead of one record per line; "
                            "convert it, for example a list with: jq -c '.[]'"
                        )
                    if line is None or line:
                        yield str(number), path, line
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"data_path {path}: cannot be read to its end: {error}") from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    """Open a file, and decompress it if its name or its first bytes indicate gzip."""
    with open(path, "rb") as raw:
        if path.endswith(".gz") or raw.peek(2)[:2] == b"\x1f\x8b":
            with gzip.open(raw) as file:
                yield cast(IO[bytes], file)
        else:
            yield raw


def _read_lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Yield the lines without surrounding white space, and None for each line that is too large."""
    first = True
    while line := file.readline(MAX_RECORD_BYTES + 1):
        if len(line) > MAX_RECORD_BYTES:
            skipped = 0
            while line and not line.endswith(b"\n"):
                skipped += len(line)
                if skipped > _MAX_SKIPPED_BYTES:
                    raise OSError(f"a line has more than {_MAX_SKIPPED_BYTES} bytes")
                line = file.readline(2**20)
            yield None
        else:
            yield line.removeprefix(codecs.BOM_UTF8).strip() if first else line.strip()
        first = False


class HubRows:
    """A data set on the hub (``NAMESPACE/NAME``, ``…/CONFIGURATION``, ``…:SPLIT``) that is streamed."""

    def __init__(self, path: str):
        name, _, split = path.partition(":")
        if not _ON_HUB.fullmatch(name):
            raise UserError(
                f"data_path {path}: there is no such file or folder, and data sets on the hub are named "
                "NAMESPACE/NAME, NAMESPACE/NAME/CONFIGURATION, or one of these with :SPLIT"
            )
        parts = name.split("/")
        self._path = path
        self._rows = _stream(path, "/".join(parts[:2]), *parts[2:], split=split or "train")

    def share(self, key: tuple, stream: int, num_streams: int) -> Iterator[Row]:
        from datasets.distributed import split_dataset_by_node

        try:
            # With a buffer of one row, only the order of the files is shuffled.
            rows = self._rows.shuffle(seed=int(generator(*key).integers(2**31)), buffer_size=1)
            # In a worker process, iter(rows) would divide the rows among the workers again; batches are not divided.
            batches = split_dataset_by_node(rows, stream, num_streams).iter(batch_size=1)
            for number, batch in enumerate(batches):
                yield f"{stream}/{number}", self._path, {name: values[0] for name, values in batch.items()}
        except Exception as error:  # datasets raises many types of errors
            raise UserError(f"data_path {self._path}: cannot be read to its end: {_brief(error)}") from error


class Tables(HubRows):
    """The rows of local Parquet or Arrow files."""

    def __init__(self, path: str, files: list[str]):
        for file in files:
            if not Path(file).is_file():
                raise UserError(f"data_path {file}: there is no such file")
        self._path = path if len(files) > 1 else files[0]
        file_format = "arrow" if files[0].endswith(".arrow") else "parquet"
        self._rows = _stream(path, file_format, data_files=files, split="train")


def _stream(path: str, *name: str, **options: Any) -> Any:
    """Open a streaming data set with ``datasets.load_dataset(*name, **options)``; ``path`` is used in messages."""
    with optional_import("datasets", f"data_path {path}: reading it from the Hugging Face hub, or from tables"):
        import datasets
    try:
        return datasets.load_dataset(*name, **options, streaming=True)
    except Exception as error:  # datasets raises many types of errors
        problem = (
            "cannot be read" if "data_files" in options else f"neither local files ({_KNOWN_EXTENSIONS}) nor on the hub"
        )
        raise UserError(f"data_path {path}: {problem}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
