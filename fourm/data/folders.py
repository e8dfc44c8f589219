"""Folders of files, ``root/MODALITY/FOLDER/KEY.EXT``, joined by key: for small and for validation data sets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.layout import assign_folders, existing_folders, expand, is_remote, split_data_path, split_name
from fourm.data.presence import Presence
from fourm.data.raw_sample import Member, RawSample, join
from fourm.utils.errors import UserError
from fourm.utils.seeds import generator
from fourm.utils.transfer import shown


class Folders:
    """The samples below a ``data_path``; the key of a sample is its path below the modality's folder, without extension.

    Args:
        data_path: ``root`` or ``root/[rgb,caption]``.
        wanted: the modalities to read and their usual folder names.
        name_map: folder → modality where the names differ.
        ledger: counts the keys of samples that cannot be used.
        presence: which samples are used; unless given, those that have everything.

    Raises:
        UserError: nothing lies at ``data_path``, a modality is not there, or no sample can be used.
        DataError: too many samples cannot be used.
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
                f"data_path {shown(data_path)}: folders must be local; pack them into shards, with use_wds: true"
            )
        presence = presence or Presence()
        pattern, folders = split_data_path(data_path)
        if folders is None:
            pattern, folders = f"{pattern}/\0", existing_folders(pattern)
        found = assign_folders(wanted, folders, name_map, data_path)
        roots = {name: expand(pattern, folder)[0] for name, folder in found.items()}
        indexes = {name: _index(root) for name, root in roots.items()}
        samples, incomplete = join(indexes, presence)
        if not samples:
            raise UserError(f"data_path {data_path}: no key is in all of {', '.join(roots.values())}")
        tolerated = presence.missing == "skip"
        for name, root in roots.items() if not tolerated else ():
            lacking = sorted(key for key in incomplete if key not in indexes[name])
            if lacking:
                ledger.warn(root, f"{root}: no file for key '{lacking[0]}' (and {len(lacking) - 1} more); skipped")
        ledger.joined(len(samples) + len(incomplete), len(incomplete), final=True, tolerated=tolerated)
        self._samples = sorted(samples, key=lambda sample: sample.key)

    def draw(self, key: tuple, stream: int, num_streams: int, ledger: BadSampleLedger) -> Iterator[RawSample]:
        """Endless samples of one stream: all streams take turns in one sequence of shuffled passes over the data.

        Args:
            key: what the order depends on beside the stream: (seed, epoch, …).
        """
        samples, turn, sweep = self._samples, stream, -1
        while True:
            if turn // len(samples) != sweep:
                sweep = turn // len(samples)
                order = generator(*key, "pass", sweep).permutation(len(samples))
            sample = samples[order[turn % len(samples)]]
            yield RawSample(sample.key, sample.members)  # a fresh one: decoded values live as long as its repeats
            turn += num_streams

    def all(self, ledger: BadSampleLedger) -> list[RawSample]:
        """Every sample once, ordered by key."""
        return self._samples


def _index(root: str) -> dict[str, Member]:
    """key → file, of all files below ``root``; hidden ones apart."""
    index: dict[str, Member] = {}
    for folder, _, files in os.walk(root, followlinks=True, onerror=_raise):
        for file in sorted(files):
            if not file.startswith("."):
                path = os.path.join(folder, file)
                key, extension = split_name(Path(path).relative_to(root).as_posix())
                index.setdefault(key, Member(path, extension))
    return index


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename}: {error.strerror}") from error
