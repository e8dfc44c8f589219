"""A data set of images, and beside it what is computed for each of them, as parts that are finished one by one.

Every shard ``root/MODALITY/NAME.tar`` is a part, and what is computed for its images becomes a shard of the same name.
All the files ``root/MODALITY/FOLDER/KEY.EXT`` are one part, and so are the results, in one file per image.
Nothing takes its name before it is complete: what is there is finished, and a part is *pending* until all of it is there.
"""

from __future__ import annotations

import io
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
"""Members of a sample: the image that is tokenized, and the one in whose pixels crops are given, if that is another."""

_REMOVE_CROPS = "remove crop_settings and all tokens made with it, and they are made anew"

Results: TypeAlias = Iterable[tuple[str, np.ndarray, np.ndarray]]
"""Key, tokens (K, L) and crops (K, 5) of samples."""


StoredCrops: TypeAlias = np.ndarray | BadSample
"""(K, 5) of a sample, or what is wrong with their file. New ones would not fit the tokens that were made with them."""


class ImageSet(ABC):
    """Reads samples and writes, per sample, tokens (K, L) to an output folder and crops (K, 5) to ``crop_settings``.

    Args:
        root: the data set's folder.
        folders: member (``PIXELS``, perhaps ``MAIN``) → folder below ``root``.
        ledger: counts and reports what cannot be read.
    """

    def __init__(self, root: Path, folders: Mapping[str, str], ledger: BadSampleLedger):
        self.root = root
        self.folders = folders
        self.ledger = ledger

    @abstractmethod
    def parts(self) -> list[str]:
        """The names of all parts, in order."""

    @abstractmethod
    def samples(self, part: str) -> list[RawSample]:
        """All samples of a part."""

    @abstractmethod
    def pending(self, part: str, output: str) -> list[RawSample]:
        """The samples of a part that have no tokens, or none with crops, in the folder ``output`` yet."""

    @abstractmethod
    def tokenized(self, output: str) -> list[str]:
        """The parts that have tokens in the folder ``output``, at least some; also those that are no longer there."""

    @abstractmethod
    def crops(self, part: str) -> dict[str, StoredCrops]:
        """The stored crops, by key; of a damaged file why its sample cannot be used."""

    @abstractmethod
    def write(self, part: str, output: str, results: Results) -> int:
        """Write (key, tokens, crops): crops, where none are stored yet, before the tokens that belong to them.

        Returns:
            The number of samples.
        """

    @abstractmethod
    def remove(self, part: str, output: str) -> None:
        """Delete a part's tokens."""

    def data_path(self, tail: str = "") -> str:
        return f"{self.root}/[{','.join(dict.fromkeys(self.folders.values()))}]{tail}"


def open_images(
    root: str | Path, folders: Mapping[str, str], shards: str | None, ledger: BadSampleLedger,
    share: tuple[int, int] = (0, 1),
) -> ImageSet:  # fmt: skip
    """The data set at ``root``; shards if the folder of ``PIXELS`` holds any, else files.

    Args:
        folders: as of :class:`ImageSet`.
        shards: use only the shards of these names, e.g. ``shard-{00000..00099}.tar``.
        share: rank and number of the processes that share the shards or files.

    Raises:
        UserError: there are no images.
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
    """Images in tars; a part is a shard."""

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
            stored = self.crops(part)  # by now: another process may have tokenized another modality meanwhile
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
    """Images in single files; all of them are one part, without a name."""

    def __init__(self, root: Path, folders: Mapping[str, str], ledger: BadSampleLedger, own: slice):
        super().__init__(root, folders, ledger)
        self._samples = Folders(self.data_path(), folders, None, ledger).all(ledger)[own]

    def parts(self) -> list[str]:
        return [""]

    def samples(self, part: str) -> list[RawSample]:
        return self._samples

    def pending(self, part: str, output: str) -> list[RawSample]:
        finished = self._keys(output) & self._keys(CROP_SETTINGS)
        pending = [sample for sample in self._samples if sample.key not in finished]
        for _ in range(len(self._samples) - len(pending)):
            self.ledger.read()  # else the bad images, which stay pending, would be a larger share of each further run
        return pending

    def tokenized(self, output: str) -> list[str]:
        return [""] if self._keys(output) else []

    def crops(self, part: str) -> dict[str, StoredCrops]:
        files = OpenFiles()
        return {
            key: _read_crops(Member(str(self._file(CROP_SETTINGS, key)), "npy"), key, files)
            for key in sorted(self._keys(CROP_SETTINGS))
        }

    def write(self, part: str, output: str, results: Results) -> int:
        stored, number = self._keys(CROP_SETTINGS), 0
        for key, tokens, crops in results:
            if key not in stored:
                self._write_file(CROP_SETTINGS, key, crops)
            self._write_file(output, key, tokens)
            number += 1
        if number == 0 and not self._keys(output):
            raise DataError(f"{self.root / self.folders[PIXELS]}: none of its images can be read")
        return number

    def remove(self, part: str, output: str) -> None:
        for key in self._keys(output):
            self._file(output, key).unlink()

    def _keys(self, folder: str) -> set[str]:
        paths = (path.relative_to(self.root / folder) for path in (self.root / folder).rglob("*.npy"))
        return {split_name(path.as_posix())[0] for path in paths if not path.name.startswith(".")}

    def _file(self, folder: str, key: str) -> Path:
        return self.root / folder / f"{key}.npy"

    def _write_file(self, folder: str, key: str, array: np.ndarray) -> None:
        with atomic_path(self._file(folder, key)) as temporary:
            temporary.write_bytes(_npy(array))


def _shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*.tar"))


def _keep_crops(results: Results, crops: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Key and tokens of ``results``, whose crops are added to ``crops``."""
    for key, tokens, own in results:
        crops[key] = own
        yield key, tokens


def _write_tar(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    # Without a time, the same content gives the same file. A path would be taken for a URL, also for one of a command.
    with path.open("wb") as file, TarWriter(file, mtime=0) as tar:
        for key, array in arrays:
            tar.write({"__key__": key, "npy": _npy(array)})


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read_crops(member: Member, key: str, files: OpenFiles) -> StoredCrops:
    try:
        return np.asarray(decode_value(f"crops.{member.extension}", files.read(member)), dtype=np.int32)
    except UserError:
        raise
    except Exception as error:  # whatever a decoder stumbles over, the bytes are at fault
        return BadSample("unreadable crops", f"{member.path}: key '{key}': {error}")
