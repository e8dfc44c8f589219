"""Data sets of records, ``type: huggingface``: rows of JSON or text files, or of a data set of the Hugging Face hub.

A column of a record is a modality; ``modality_name_map`` says which, where the names differ. A sample's key is the place of its
record, and the data position counts records as any other samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.decoding import parse_json
from fourm.data.names import split_name
from fourm.data.presence import Presence
from fourm.data.raw_sample import BadSample, OpenFiles, RawSample
from fourm.data.record_files import MAX_RECORD_BYTES, is_text, rows_at
from fourm.utils.errors import UserError


class Record(RawSample):
    """A sample whose values are the columns of one row.

    Args:
        where: file or data set.
        content: a line of a file, or the row itself; None: the line is too large to be kept.
        columns: modality → the names that its column may have.
    """

    def __init__(
        self, key: str, where: str, content: bytes | Mapping[str, Any] | None, columns: Mapping[str, list[str]],
        presence: Presence,
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
        usable = self._presence.usable(found, self._columns)
        if not usable:
            lacking = next(name for name in self._columns if name not in found)
            raise BadSample("missing column", self.lacks(lacking, row), tolerated=self._presence.missing != "error")
        return {name: found[name] for name in usable}

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
        if row is None:
            raise BadSample("record too large", f"{self.where('')}: a line has at most {MAX_RECORD_BYTES} bytes")
        if isinstance(row, bytes):
            try:
                row = {"text": row.decode("utf-8")} if is_text(self._where) else parse_json(row)
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


class Records:
    """The records that a ``data_path`` names.

    Args:
        data_path: see :func:`fourm.data.record_files.local_files`.
        names: of the modalities.
        name_map: column → modality where the names differ. Unless given, a modality alone may be in the column ``text``.
        presence: which records are used.

    Raises:
        UserError: there is nothing, or a package is missing.
    """

    def __init__(self, data_path: str, names: list[str], name_map: Mapping[str, str], presence: Presence):
        self._rows = rows_at(data_path)
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
