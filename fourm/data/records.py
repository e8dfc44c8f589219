"""Data sets of records, ``type: huggingface``: rows of JSON or text files, or of a data set of the Hugging Face hub.

A column of a record is a modality; ``modality_name_map`` says which, where the names differ. A sample's key is the place of its
record, and the data position counts records as any other samples.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.decoding import parse_json
from fourm.data.layout import expand, split_name
from fourm.data.presence import Presence
from fourm.data.raw_sample import BadSample, OpenFiles, RawSample
from fourm.utils.errors import MissingDependency, UserError
from fourm.utils.seeds import generator

_EXTENSIONS = (".json", ".jsonl", ".txt")


def local_files(data_path: str) -> list[str] | None:
    """The files that a ``data_path`` names; None: it names a data set of the hub."""
    paths = expand(data_path, None)
    return paths if all(_is_of(path, *_EXTENSIONS) for path in paths) else None


def _is_of(path: str, *extensions: str) -> bool:
    """Whether a file has one of the ``extensions``, compressed or not."""
    return path.removesuffix(".gz").endswith(extensions)


class Record(RawSample):
    """A sample whose values are the columns of one row.

    Args:
        where: file or data set.
        content: a line of a file, or the row itself.
        columns: modality → the names that its column may have.
    """

    def __init__(
        self, key: str, where: str, content: bytes | Mapping[str, Any], columns: Mapping[str, list[str]], presence: Presence
    ):  # fmt: skip
        super().__init__(key, {})
        self._where, self._content = where, content
        self._columns, self._presence = columns, presence

    def values(self, files: OpenFiles, keep_pixels: bool) -> dict[str, Any]:
        """The value of each modality that the row has.

        Raises:
            BadSample: the row cannot be parsed, or lacks a column.
        """
        row = self.row()
        found = self.found(row)
        if not self._presence.usable(found, self._columns):
            lacking = next(name for name in self._columns if name not in found)
            raise BadSample("missing column", self.lacks(lacking, row), tolerated=self._presence.missing == "skip")
        return found

    @property
    def extension(self) -> str:
        """Of its file: ``jsonl``, ``json.gz``."""
        return split_name(self._where)[1]

    def row(self) -> Mapping[str, Any]:
        """The columns.

        Raises:
            BadSample: the row cannot be parsed.
        """
        row = self._content
        if isinstance(row, bytes):
            try:
                row = {"text": row.decode("utf-8")} if _is_of(self._where, ".txt") else parse_json(row)
                row = row if isinstance(row, dict) else {"text": row}
            except ValueError as error:
                raise BadSample("corrupt record", f"{self.where('')}: {error}") from error
        return row

    def found(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The value of each modality that there is."""
        there = {name: [c for c in columns if row.get(c) is not None] for name, columns in self._columns.items()}
        return {name: row[columns[0]] for name, columns in there.items() if columns}

    def lacks(self, name: str, row: Mapping[str, Any]) -> str:
        """Says that there is no modality ``name``, and what there is."""
        return (
            f"{self.where('')}: no column {' or '.join(self._columns[name])} for modality {name} "
            f"(there are {', '.join(map(str, row))}); 'modality_name_map' can say which one it is"
        )

    def where(self, name: str) -> str:
        """Where it is, for messages."""
        return f"{self._where}: record {self.key}"


class Rows(Protocol):
    """Where records come from."""

    def share(self, key: tuple, stream: int, num_streams: int) -> Iterator[tuple[str, str, bytes | Mapping[str, Any]]]:
        """One pass of a stream over its part of the rows: (key, where, content)."""
        ...


class TextFiles:
    """The lines of local files. If there are as many files as streams, each stream reads its own, else its own lines."""

    def __init__(self, paths: list[str]):
        self._paths = paths
        for path in paths:
            if not Path(path).is_file():
                raise UserError(f"data_path {path}: there is no such file")

    def share(self, key: tuple, stream: int, num_streams: int) -> Iterator[tuple[str, str, bytes | Mapping[str, Any]]]:
        paths = [self._paths[index] for index in generator(*key).permutation(len(self._paths))]
        if len(paths) >= num_streams:
            paths, stream, num_streams = paths[stream::num_streams], 0, 1
        rows = itertools.chain.from_iterable(map(self._rows, paths))
        return itertools.islice(rows, stream, None, num_streams)

    @staticmethod
    def _rows(path: str) -> Iterator[tuple[str, str, bytes]]:
        try:
            with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line := line.strip():
                        yield str(number), path, line
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"data_path {path}: cannot be read to its end: {error}") from error


class HubRows:
    """A data set of the hub, read as it is downloaded: ``NAMESPACE/NAME``, ``…/CONFIGURATION``, ``…:SPLIT``."""

    def __init__(self, path: str):
        try:
            import datasets
        except ImportError as error:
            raise MissingDependency("datasets", f"data_path {path}: reading it from the Hugging Face hub") from error
        self._path = path
        place, _, split = path.partition(":")
        parts = place.split("/")
        try:
            self._rows = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True)
        except Exception as error:  # of many kinds
            raise UserError(
                f"data_path {path}: neither local files ({', '.join(_EXTENSIONS)}, also .gz) nor on the hub: {error!s:.200}"
            ) from error

    def share(self, key: tuple, stream: int, num_streams: int) -> Iterator[tuple[str, str, bytes | Mapping[str, Any]]]:
        from datasets.distributed import split_dataset_by_node

        rows = self._rows.shuffle(seed=int(generator(*key).integers(2**31)), buffer_size=1)  # the order of the files
        # In a worker process iter(rows) would divide them among the workers once more; batches are not divided.
        batches = split_dataset_by_node(rows, stream, num_streams).iter(batch_size=1)
        for number, batch in enumerate(batches):
            yield f"{stream}/{number}", self._path, {name: values[0] for name, values in batch.items()}


class Records:
    """The records that a ``data_path`` names.

    Args:
        data_path: local files, with ranges in braces, or a data set of the hub.
        names: of the modalities.
        name_map: column → modality where the names differ. Unless given, a modality alone may be in the column ``text``.
        presence: which records are used.

    Raises:
        UserError: there is nothing, or a package is missing.
    """

    def __init__(self, data_path: str, names: list[str], name_map: Mapping[str, str], presence: Presence):
        files = local_files(data_path)
        self._rows: Rows = HubRows(data_path) if files is None else TextFiles(files)
        self._presence, self._path = presence, data_path
        mapped = {name: [column for column, modality in name_map.items() if modality == name] for name in names}
        alone = ["text"] if len(names) == 1 else []
        self._columns = {name: columns or [name, *alone] for name, columns in mapped.items()}

    def draw(self, key: tuple, stream: int, num_streams: int, ledger: BadSampleLedger) -> Iterator[Record]:
        """Endless records of one stream: pass after pass over its part of them.

        Args:
            key: what the order depends on beside the stream: (seed, epoch, …).
        """
        for sweep in itertools.count():
            empty = True
            for record in self._records((*key, "pass", sweep), stream, num_streams):
                empty = False
                yield record
            if empty:
                raise UserError(f"data_path {self._path}: there are no records for stream {stream} of {num_streams}")

    def all(self, ledger: BadSampleLedger) -> list[Record]:
        """Every record once."""
        return list(self.once())

    def once(self) -> Iterator[Record]:
        """Every record once, without keeping them.

        Raises:
            UserError: a file cannot be read to its end.
        """
        return self._records(("all",), 0, 1)

    def _records(self, key: tuple, stream: int, num_streams: int) -> Iterator[Record]:
        for place, where, content in self._rows.share(key, stream, num_streams):
            yield Record(place, where, content, self._columns, self._presence)
