"""A data set of images, features or objects whose tokens are computed part by part.

Each shard ``root/MODALITY/NAME.tar`` is a part, and the results for its images become a shard of the same name. All the
files ``root/MODALITY/FOLDER/KEY.EXT`` together are one part, with one file of results per image. A file gets its final
name only when it is complete, and a part is *pending* until all of its files exist.
"""

from __future__ import annotations

import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from webdataset import TarWriter

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.decoding import decode_value
from fourm.data.folders import Folders
from fourm.data.layout import CROP_SETTINGS, expand_braces
from fourm.data.names import is_clutter, split_name
from fourm.data.raw_sample import BadSample, Member, OpenFiles, RawSample
from fourm.data.shards import Shards, tar_members
from fourm.utils.errors import DataError, UserError
from fourm.utils.files import atomic_path

PIXELS, MAIN = "pixels", "main"
"""Members of a sample: the image that is tokenized, and the image whose pixels the crops refer to, if it is another."""

_REMOVE_CROPS = "remove crop_settings and all tokens made with it, and tokenize again"

Value: TypeAlias = np.ndarray | list
"""The tokens of a sample: an array (K, L), or a list of described objects for each crop, which becomes JSON."""

Results: TypeAlias = Iterable[tuple[str, Value, np.ndarray]]
"""The key, tokens and crops (K, 5) of each sample."""


StoredCrops: TypeAlias = np.ndarray | BadSample
"""The crops (K, 5) of a sample, or the error of their file. As tokens were made with them, they are not drawn anew."""


class ImageSet(ABC):
    """Reads samples, and writes their tokens to an output folder and their crops (K, 5) to ``crop_settings``.

    Args:
        root: The folder of the data set.
        folders: The folder below ``root`` of each member, which are ``PIXELS`` and perhaps ``MAIN``.
        ledger: Counts and reports the samples that cannot be read.
    """

    def __init__(self, root: Path, folders: Mapping[str, str], ledger: BadSampleLedger):
        self.root = root
        self.folders = folders
        self.ledger = ledger

    @abstractmethod
    def parts(self) -> list[str]:
        """Return the names of all parts, in order."""

    @abstractmethod
    def samples(self, part: str) -> list[RawSample]:
        """Return all samples of a part."""

    @abstractmethod
    def pending(self, part: str, output: str) -> list[RawSample]:
        """Return the samples of a part that still lack tokens in the folder ``output``, or crops."""

    @abstractmethod
    def tokenized(self, output: str) -> list[str]:
        """Return the parts with tokens in the folder ``output``, including parts whose images no longer exist."""

    @abstractmethod
    def crops(self, part: str) -> dict[str, StoredCrops]:
        """Return the stored crops by key, or the error of a damaged file."""

    @abstractmethod
    def write(self, part: str, output: str, results: Results) -> int:
        """Write tokens, after the crops that belong to them where these are not stored yet.

        Returns:
            The number of samples.
        """

    @abstractmethod
    def remove(self, part: str, output: str) -> None:
        """Delete the tokens of a part."""

    def data_path(self, tail: str = "") -> str:
        return f"{self.root}/[{','.join(dict.fromkeys(self.folders.values()))}]{tail}"


def open_images(
    root: str | Path,
    folders: Mapping[str, str],
    shards: str | None,
    ledger: BadSampleLedger,
    share: tuple[int, int] = (0, 1),
) -> ImageSet:
    """Open the data set at ``root``, as shards if the folder of ``PIXELS`` contains any, and otherwise as files.

    Args:
        root, folders, ledger: See :class:`ImageSet`.
        shards: Use only the shards with these names, for example ``shard-{00000..00099}.tar``.
        share: The rank of this process and the number of processes that share the shards or files.

    Raises:
        UserError: There are no images.
    """
    root = Path(root)
    folder = root / folders[PIXELS]
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of images")
    names = _shard_names(folder)
    if shards is not None:
        chosen = expand_braces(shards)
        absent = [name for name in chosen if name not in names]
        if absent:
            raise UserError(f"{folder / absent[0]}: there is no such shard, which shards={shards} names")
        names = chosen
    own = slice(share[0], None, share[1])
    return ShardSet(root, folders, ledger, names[own]) if names else FileSet(root, folders, ledger, own)


class ShardSet(ImageSet):
    """Images in shards; each shard is a part."""

    def __init__(self, root: Path, folders: Mapping[str, str], ledger: BadSampleLedger, names: list[str]):
        super().__init__(root, folders, ledger)
        self._names = names

    def parts(self) -> list[str]:
        return self._names

    def samples(self, part: str) -> list[RawSample]:
        return Shards(self.data_path(f"/{part}"), self.folders).all(self.ledger)

    def pending(self, part: str, output: str) -> list[RawSample]:
        finished = all((self.root / folder / part).exists() for folder in (output, CROP_SETTINGS))
        return [] if finished else self.samples(part)

    def tokenized(self, output: str) -> list[str]:
        return _shard_names(self.root / output)

    def crops(self, part: str) -> dict[str, StoredCrops]:
        path, files = str(self.root / CROP_SETTINGS / part), OpenFiles()
        if not Path(path).exists():
            return {}
        try:
            members = [
                (split_name(name, (CROP_SETTINGS,)), offset, size)
                for name, offset, size in tar_members(path)
                if not is_clutter(name)
            ]
        except tarfile.ReadError as error:
            raise DataError(f"{path}: {error}; {_REMOVE_CROPS}") from error
        return {
            key: _read_crops(Member(path, extension, offset, size), key, files)
            for (key, extension), offset, size in members
        }

    def write(self, part: str, output: str, results: Results) -> int:
        crops: dict[str, np.ndarray] = {}
        with atomic_path(self.root / output / part) as temporary:
            _write_tar(temporary, _keep_crops(results, crops))
            if not crops:
                raise DataError(f"{self.root / self.folders[PIXELS] / part}: none of its images can be read")
            stored = self.crops(part)  # read again, because another process may have tokenized another modality
            if not crops.keys() <= stored.keys():
                kept = {key: own for key, own in stored.items() if not isinstance(own, BadSample)}
                if len(kept) < len(stored):
                    problem = next(own for own in stored.values() if isinstance(own, BadSample))
                    raise DataError(f"{problem}; {_REMOVE_CROPS}")
                with atomic_path(self.root / CROP_SETTINGS / part) as beside:
                    _write_tar(beside, (crops | kept).items())
        return len(crops)

    def remove(self, part: str, output: str) -> None:
        (self.root / output / part).unlink(missing_ok=True)


class FileSet(ImageSet):
    """Images in single files; all of them are one part, whose name is empty."""

    def __init__(self, root: Path, folders: Mapping[str, str], ledger: BadSampleLedger, own: slice):
        super().__init__(root, folders, ledger)
        self._samples = Folders(self.data_path(), folders, None, ledger).all(ledger)[own]

    def parts(self) -> list[str]:
        return [""]

    def samples(self, part: str) -> list[RawSample]:
        return self._samples

    def pending(self, part: str, output: str) -> list[RawSample]:
        finished = self._files(output).keys() & self._files(CROP_SETTINGS).keys()
        pending = [sample for sample in self._samples if sample.key not in finished]
        for _ in range(len(self._samples) - len(pending)):
            self.ledger.read()  # otherwise bad images, which stay pending, would be a larger share of every later run
        return pending

    def tokenized(self, output: str) -> list[str]:
        return [""] if self._files(output) else []

    def crops(self, part: str) -> dict[str, StoredCrops]:
        files = OpenFiles()
        return {
            key: _read_crops(Member(str(path), "npy"), key, files)
            for key, path in sorted(self._files(CROP_SETTINGS).items())
        }

    def write(self, part: str, output: str, results: Results) -> int:
        stored, number = self._files(CROP_SETTINGS), 0
        for key, tokens, crops in results:
            if key not in stored:
                self._write_file(CROP_SETTINGS, key, crops)
            self._write_file(output, key, tokens)
            number += 1
        if number == 0 and not self._files(output):
            raise DataError(f"{self.root / self.folders[PIXELS]}: none of its images can be read")
        return number

    def remove(self, part: str, output: str) -> None:
        for path in self._files(output).values():
            path.unlink()

    def _files(self, folder: str) -> dict[str, Path]:
        """Return the files of tokens or crops in a folder by key."""
        paths = [path for path in (self.root / folder).rglob("*") if path.suffix in (".npy", ".json")]
        return {
            split_name(path.relative_to(self.root / folder).as_posix())[0]: path
            for path in paths
            if not path.name.startswith(".")
        }

    def _write_file(self, folder: str, key: str, value: Value) -> None:
        extension, content = _encoded(value)
        with atomic_path(self.root / folder / f"{key}.{extension}") as temporary:
            temporary.write_bytes(content)


def _shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*.tar"))


def _keep_crops(results: Results, crops: dict[str, np.ndarray]) -> Iterator[tuple[str, Value]]:
    """Yield the key and tokens of ``results``, and add their crops to ``crops``."""
    for key, tokens, own in results:
        crops[key] = own
        yield key, tokens


def _write_tar(path: Path, values: Iterable[tuple[str, Value]]) -> None:
    # With a fixed time, the same content gives the same file. TarWriter takes a path for a URL, which may be a command.
    with path.open("wb") as file, TarWriter(file, mtime=0) as tar:
        for key, value in values:
            extension, content = _encoded(value)
            tar.write({"__key__": key, extension: content})


def _encoded(value: Value) -> tuple[str, bytes]:
    """Return the extension and the content of a file."""
    if isinstance(value, list):
        return "json", json.dumps(value, separators=(",", ":")).encode()
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=False)
    return "npy", buffer.getvalue()


def _read_crops(member: Member, key: str, files: OpenFiles) -> StoredCrops:
    try:
        return np.asarray(decode_value(f"crops.{member.extension}", files.read(member)), dtype=np.int32)
    except UserError:
        raise
    except Exception as error:  # of any type, because decoders raise many for damaged bytes
        return BadSample("unreadable crops", f"{member.path}: key '{key}': {error}")
