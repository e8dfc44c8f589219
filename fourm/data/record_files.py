"""Where records lie: which local files, or which data set of the hub, a ``data_path`` names, and their rows one by one."""

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
from fourm.utils.errors import MissingDependency, UserError
from fourm.utils.seeds import generator
from fourm.utils.urls import redact_url

log = logging.getLogger(__name__)

MAX_RECORD_BYTES = 4 * 2**20  # of a line; samples wait in buffers, and a few bytes of gzip can be a line of gigabytes
_MAX_SKIPPED_BYTES = 2**30  # of a line that is too large, to find the next one
_TEXT, _TABLES = (".json", ".jsonl", ".txt"), (".parquet", ".arrow")
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "eval": "test",
}  # fmt: skip
_NO_RECORDS = ("readme", "license", "dataset_info", "dataset_dict", "state.json")  # what lies beside the data
_KINDS = f"{', '.join(_TEXT)} (also .gz), {', '.join(_TABLES)}"
_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+){0,2}")

Row = tuple[str, str, bytes | Mapping[str, Any] | None]  # key, file or data set, content: None if it is too large


def local_files(data_path: str) -> list[str] | None:
    """The files that a ``data_path`` names; None: it names a data set of the hub.

    It may be a file, a folder, or a pattern of either, with braces, ``*`` and ``~``. ``:validation`` at the end chooses the
    files of a folder that have this word in their names; otherwise they are those of ``train``, if there are any.

    Raises:
        UserError: it cannot be a data set of the hub, and there is nothing here.
    """
    if re.match(r"\w+://", data_path):
        raise UserError(
            f"data_path {redact_url(data_path)}: records are read from local files or from the hub; copy it here"
        )
    places = _places(data_path)
    split = ""
    if not places and re.search(r":\w+$", data_path):
        path, _, split = data_path.rpartition(":")
        places = _places(path)
    if not places:
        path = data_path.rpartition(":")[0] if split else data_path
        if _is_local(path):
            raise UserError(f"data_path {data_path}: there is no such file or folder")
        return None
    files = [file for place in places for file in (_files_in(place, split) if os.path.isdir(place) else [place])]
    odd = next((file for file in files if not _is_of(file, *_TEXT, *_TABLES)), None)
    if odd:
        raise UserError(f"data_path {data_path}: {odd} has no extension that can be read: {_KINDS}")
    if len({_is_of(file, *_TABLES) for file in files}) > 1:
        raise UserError(
            f"data_path {data_path}: has text and tables; name one kind, for example {path_of(data_path)}/*.jsonl"
        )
    return files


def path_of(data_path: str) -> str:
    """Without a slash at its end."""
    return data_path.rstrip("/") or "/"


def rows_at(data_path: str) -> RowSource:
    """What a ``data_path`` names.

    Raises:
        UserError: there is nothing, or a package is missing.
    """
    files = local_files(data_path)
    if files is None:
        return HubRows(data_path)
    return Tables(data_path, files) if _is_of(files[0], *_TABLES) else TextFiles(files)


def is_text(path: str) -> bool:
    """Whether the lines of a file are text rather than JSON."""
    return _is_of(path, ".txt")


def _is_of(path: str, *extensions: str) -> bool:
    """Whether a file has one of the ``extensions``, compressed or not."""
    return path.lower().removesuffix(".gz").endswith(extensions)


def _is_local(path: str) -> bool:
    """Whether a path that is not there cannot be the name of a data set of the hub."""
    return path.startswith(("/", ".", "~")) or _is_of(path, *_TEXT, *_TABLES) or any(sign in path for sign in "*?[{\\")


def _places(pattern: str) -> list[str]:
    """The files and folders that a pattern names. Braces name files that must be there, ``*`` those that are."""
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):
        return [pattern]
    paths = expand(pattern, None)
    found = [sorted(glob.glob(path)) if glob.has_magic(path) else [path] for path in paths]
    places = list(itertools.chain.from_iterable(found))
    if len(paths) == 1 and not _is_of(pattern, *_TEXT, *_TABLES):
        return [place for place in places if os.path.exists(place)]  # else it may be on the hub
    return places


def _files_in(folder: str, split: str) -> list[str]:
    """The files of records in and below a folder, of one split where their names say which."""
    by_split: dict[str, list[str]] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if _is_of(name, *_TEXT, *_TABLES) and not name.startswith(".") and not name.lower().startswith(_NO_RECORDS):
                by_split.setdefault(_split_of(os.path.relpath(path, folder)), []).append(path)
    if not by_split:
        raise UserError(f"data_path {folder}: holds no file of records: {_KINDS}")
    wanted = _SPLITS.get(split, split)
    named = sorted(by_split.keys() - {""})
    if not wanted:  # all, unless the names tell training and evaluation apart
        wanted = "train" if "train" in named else "".join(named)
        if len(named) > 1 and wanted != "train":
            raise UserError(
                f"data_path {folder}: has files of {' and '.join(named)}; write {path_of(folder)}:{named[0]}"
            )
    if wanted not in by_split:
        there = ", ".join(named) or "none in the names of its files"
        raise UserError(f"data_path {folder}:{split}: there are no files of {split}; the splits are: {there}")
    others = sum(len(paths) for name, paths in by_split.items() if name != wanted)
    if others:
        log.info("data_path %s: %d files of %s; %d others are left out", folder, len(by_split[wanted]), wanted, others)
    return by_split[wanted]


def _split_of(path: str) -> str:
    """``train``, ``validation`` or ``test`` if a word of the path says so, the last one that does."""
    words = re.findall(r"[a-z]+", path.lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), "")


class RowSource(Protocol):
    """Where records come from."""

    def share(self, key: tuple, stream: int, num_streams: int) -> Iterator[Row]:
        """One pass of a stream over its part of the rows.

        Raises:
            UserError: they cannot be read.
        """
        ...


class TextFiles:
    """The lines of local files. If there are as many files as streams, each stream reads its own, else its own lines."""

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
            with _opened(path) as file:
                for number, line in enumerate(_lines(file), 1):
                    if number == 1 and not is_text(path) and line in (b"[", b"{"):
                        raise UserError(
                            f"data_path {path}: has one JSON value over several lines, not a record in each line; "
                            "convert it, for example a list with: jq -c '.[]'"
                        )
                    if line is None or line:
                        yield str(number), path, line
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"data_path {path}: cannot be read to its end: {error}") from error


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """A file, decompressed if its name or its first bytes say that it is compressed."""
    with open(path, "rb") as raw:
        if path.endswith(".gz") or raw.peek(2)[:2] == b"\x1f\x8b":
            with gzip.open(raw) as file:
                yield cast(IO[bytes], file)
        else:
            yield raw


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The lines, without the white space around them; None in place of one that is too large."""
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
    """A data set of the hub, read as it is downloaded: ``NAMESPACE/NAME``, ``…/CONFIGURATION``, ``…:SPLIT``."""

    def __init__(self, path: str):
        place, _, split = path.partition(":")
        if not _ON_HUB.fullmatch(place):
            raise UserError(
                f"data_path {path}: there is no such file or folder, and a data set of the hub is named NAMESPACE/NAME, "
                "NAMESPACE/NAME/CONFIGURATION, or one of these with :SPLIT"
            )
        parts = place.split("/")
        self._path = path
        self._rows = _stream(path, "/".join(parts[:2]), *parts[2:], split=split or "train")

    def share(self, key: tuple, stream: int, num_streams: int) -> Iterator[Row]:
        from datasets.distributed import split_dataset_by_node

        try:
            rows = self._rows.shuffle(
                seed=int(generator(*key).integers(2**31)), buffer_size=1
            )  # the order of the files
            # In a worker process iter(rows) would divide them among the workers once more; batches are not divided.
            batches = split_dataset_by_node(rows, stream, num_streams).iter(batch_size=1)
            for number, batch in enumerate(batches):
                yield f"{stream}/{number}", self._path, {name: values[0] for name, values in batch.items()}
        except Exception as error:  # of many kinds
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


def _stream(path: str, *place: str, **options: Any) -> Any:
    """What the datasets package finds at ``place``."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency(
            "datasets", f"data_path {path}: reading it from the Hugging Face hub, or from tables"
        ) from error
    try:
        return datasets.load_dataset(*place, **options, streaming=True)
    except Exception as error:  # of many kinds
        where = "cannot be read" if "data_files" in options else f"neither local files ({_KINDS}) nor on the hub"
        raise UserError(f"data_path {path}: {where}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
