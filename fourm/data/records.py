"""Data sets of records (``type: huggingface``): rows of JSON or text files, or of a data set on the Hugging Face hub.

Each column of a record is a modality; ``modality_name_map`` maps columns to modalities where the names differ. The key
of a sample is the position of its record, and the data position counts records like all other samples.
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
from fourm.data.record_files import MAX_RECORD_BYTES, is_text, open_rows
from fourm.utils.errors import UserError


class Record(RawSample):
    """A sample whose values are the columns of one row.

    Args:
        key: Position of the row in its file or stream.
        where: File or data set of the row.
        content: A line of a file, or the row itself; None if the line is too large to be kept.
        columns: Modality → names that its column may have.
        presence: Rules for which samples are used.
    """

    def __init__(
        self,
        key: str,
        where: str,
        content: bytes | Mapping[str, Any] | None,
        columns: Mapping[str, list[str]],
        presence: Presence,
    ):
        super().__init__(key, {})
        self._where, self._content = where, content
        self._columns, self._presence = columns, presence

    def values(self, files: OpenFiles, keep_pixels: bool) -> dict[str, Any]:
        """Return the value of each usable modality of the row.

        Raises:
            BadSample: The row cannot be parsed, or lacks a column.
        """
        row = self.row()
        available = self.available(row)
        usable = self._presence.usable(available, self._columns)
        if not usable:
            lacking = next(name for name in self._columns if name not in available)
            message = self.missing_column_message(lacking, row)
            raise BadSample("missing column", message, tolerated=self._presence.missing != "error")
        return {name: available[name] for name in usable}

    @property
    def extension(self) -> str:
        """Extension of the file, such as ``jsonl`` or ``json.gz``."""
        return split_name(self._where)[1]

    def row(self) -> Mapping[str, Any]:
        """Return the columns of the row.

        Raises:
            BadSample: The row cannot be parsed.
        """
        row = self._content
        if row is None:
            raise BadSample("record too large", f"{self.where('')}: the line exceeds {MAX_RECORD_BYTES} bytes")
        if isinstance(row, bytes):
            try:
                row = {"text": row.decode("utf-8")} if is_text(self._where) else parse_json(row)
                if not isinstance(row, dict):
                    row = {"text": row}
            except ValueError as error:
                raise BadSample("corrupt record", f"{self.where('')}: {error}") from error
        return row

    def available(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of each modality that the row has."""
        values = {}
        for name, columns in self._columns.items():
            column = next((column for column in columns if row.get(column) is not None), None)
            if column is not None:
                values[name] = row[column]
        return values

    def missing_column_message(self, name: str, row: Mapping[str, Any]) -> str:
        """Return a message that modality ``name`` is missing, with the columns that the row has."""
        return (
            f"{self.where('')}: no column {' or '.join(self._columns[name])} for modality {name} "
            f"(there are {', '.join(map(str, row))}); set 'modality_name_map' if one of them is the modality"
        )

    def where(self, name: str) -> str:
        """Return the file or data set and the record, for messages."""
        return f"{self._where}: record {self.key}"


class Records:
    """The records that a ``data_path`` names.

    Args:
        data_path: See :func:`fourm.data.record_files.local_files`.
        names: Names of the modalities.
        name_map: Column → modality where the names differ. A single modality without one may also be in column
            ``text``.
        presence: Rules for which records are used.

    Raises:
        UserError: The files or the data set do not exist, or a package is missing.
    """

    def __init__(self, data_path: str, names: list[str], name_map: Mapping[str, str], presence: Presence):
        self._rows = open_rows(data_path)
        self._presence, self._path = presence, data_path
        mapped = {name: [column for column, modality in name_map.items() if modality == name] for name in names}
        alone = ["text"] if len(names) == 1 else []
        self._columns = {name: columns or [name, *alone] for name, columns in mapped.items()}

    def draw(self, key: tuple, stream: int, num_streams: int, ledger: BadSampleLedger) -> Iterator[Record]:
        """Yield the endless records of one stream: repeated passes over its part of the rows.

        Args:
            key: Seeds of the order besides the stream: (seed, epoch, …).
        """
        for sweep in itertools.count():
            empty = True
            for record in self._records((*key, "pass", sweep), stream, num_streams):
                empty = False
                yield record
            if empty:
                raise UserError(f"data_path {self._path}: there are no records for stream {stream} of {num_streams}")

    def all(self, ledger: BadSampleLedger) -> list[Record]:
        """Return every record once."""
        return list(self.once())

    def once(self) -> Iterator[Record]:
        """Iterate over every record once, without keeping them.

        Raises:
            UserError: A file cannot be read to its end.
        """
        return self._records(("all",), 0, 1)

    def _records(self, key: tuple, stream: int, num_streams: int) -> Iterator[Record]:
        for record_key, where, content in self._rows.share(key, stream, num_streams):
            yield Record(record_key, where, content, self._columns, self._presence)
