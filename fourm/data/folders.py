"""Folders of files, ``root/MODALITY/FOLDER/KEY.EXT``, joined by key; meant for small and for validation data sets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.layout import assign_folders, existing_folders, expand, is_remote, split_data_path
from fourm.data.names import is_clutter, is_readable, split_name
from fourm.data.presence import Presence
from fourm.data.raw_sample import Member, MemberIndex, RawSample, join, leave_out
from fourm.utils.errors import UserError
from fourm.utils.seeds import generator
from fourm.utils.urls import redact_url


class Folders:
    """The samples below a ``data_path``; a key is the path relative to the modality's folder, without extension.

    Args:
        data_path: ``root`` or ``root/[rgb,caption]``.
        wanted: The modalities to read and their default folder names.
        name_map: Folder → modality where the names differ.
        ledger: Counts the keys of unusable samples.
        presence: Rules for which samples are used. The default uses only samples with every modality.

    Raises:
        UserError: ``data_path`` does not exist or lacks a modality, or no sample is usable.
        DataError: Too many samples are unusable.
    """

    def __init__(
        self,
        data_path: str,
        wanted: Mapping[str, str],
        name_map: Mapping[str, str] | None,
        ledger: BadSampleLedger,
        presence: Presence | None = None,
    ):
        if is_remote(data_path):
            raise UserError(
                f"data_path {redact_url(data_path)}: folders must be local; pack them into shards and set use_wds: true"
            )
        presence = presence or Presence()
        pattern, folders = split_data_path(data_path)
        if folders is None:
            pattern, folders = f"{pattern}/\0", existing_folders(pattern)
        folder_of = assign_folders(wanted, folders, name_map, data_path)
        roots = {name: expand(pattern, folder)[0] for name, folder in folder_of.items()}
        indexes = {name: index_folder(root, (folder_of[name], name)) for name, root in roots.items()}
        for root, index in zip(roots.values(), indexes.values(), strict=True):
            if index.collisions:
                ledger.warn(f"collision {root}", f"{root}: {index.collision()}; skipped")
        columns, bad = leave_out(indexes)
        samples, incomplete = join(columns, presence)
        if not samples and not bad:
            raise UserError(f"data_path {data_path}: no key occurs in all of {', '.join(roots.values())}")
        tolerated = presence.missing != "error"
        for name, root in roots.items() if not tolerated else ():
            lacking = sorted(key for key in incomplete if key not in columns[name])
            if lacking:
                ledger.warn(root, f"{root}: no file for key '{lacking[0]}' (and {len(lacking) - 1} more); skipped")
        if not tolerated:
            bad["missing member"] = len(incomplete)
        total = len(samples) + len(incomplete) + sum(bad.values()) - bad.get("missing member", 0)
        ledger.joined(total, bad, len(incomplete) if tolerated else 0, final=True)
        self._samples = sorted(samples, key=lambda sample: sample.key)

    def draw(self, key: tuple, stream: int, num_streams: int, ledger: BadSampleLedger) -> Iterator[RawSample]:
        """Yield the endless samples of one stream; the streams take turns in one sequence of shuffled passes.

        Args:
            key: Seeds of the order besides the stream: (seed, epoch, …).
        """
        samples, turn, sweep = self._samples, stream, -1
        while True:
            if turn // len(samples) != sweep:
                sweep = turn // len(samples)
                order = generator(*key, "pass", sweep).permutation(len(samples))
            sample = samples[order[turn % len(samples)]]
            yield RawSample(
                sample.key, sample.members
            )  # a new object, so that decoded values live only as long as its repeats
            turn += num_streams

    def all(self, ledger: BadSampleLedger) -> list[RawSample]:
        """Return every sample once, ordered by key."""
        return self._samples


def index_folder(root: str, own: tuple[str, ...]) -> MemberIndex:
    """Index all :func:`files_below` ``root`` by key.

    Args:
        root: Folder of the modality.
        own: Names of the modality, which are not part of a key.
    """
    index = MemberIndex()
    for name, path in files_below(root):
        key, extension = split_name(name, own)
        index.add(key, Member(path, extension), is_readable(extension))
    return index.complete()


def files_below(root: str) -> Iterator[tuple[str, str]]:
    """Yield the name relative to ``root`` and the path of each file, except hidden and system files."""
    for folder, _, files in os.walk(root, followlinks=True, onerror=_raise):
        below = os.path.relpath(folder, root)
        for file in sorted(files):
            name = file if below == "." else f"{below}/{file}"
            if not is_clutter(name):
                yield name, os.path.join(folder, file)


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename}: {error.strerror}") from error
