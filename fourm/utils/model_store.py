"""Models and checkpoints in S3 stores: found, fetched, and copied there.

A checkpoint has the same files there as on disk (:mod:`fourm.utils.checkpoints`). Its ``checksums.json`` is copied last and removed
first: one that has it is complete. What is fetched is checked against it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from fourm.utils.checkpoints import CHECKPOINT_FILES, CHECKSUMS, CONFIG, WEIGHTS
from fourm.utils.errors import UserError
from fourm.utils.files import atomic_folder, locked
from fourm.utils.s3 import S3Store, upload
from fourm.utils.transfer import DamagedObject, MissingObject, RemoteObject, hash_file, new_hasher, shown

log = logging.getLogger(__name__)


def complete_checkpoints(run: str, store: S3Store) -> list[str]:
    """URLs of the checkpoints of the run at ``run``, newest first."""
    folder = f"{run}/checkpoints"
    return [f"{folder}/{step}" for step in _complete(store.names(folder))]


def find_checkpoint(place: str, store: S3Store) -> str:
    """``place`` itself if it is a checkpoint, else the newest one of the run there.

    Raises:
        UserError: there is none, or the store cannot be read.
    """
    place = place.rstrip("/")
    found = [place] if CHECKSUMS in store.names(place) else complete_checkpoints(place, store)
    if not found:
        raise UserError(f"{shown(place)} is no complete checkpoint, and no run with checkpoints")
    return found[0]


def find_model(place: str, store: S3Store) -> str:
    """``place`` itself if it is a file or a folder with a model, else a checkpoint: see :func:`find_checkpoint`."""
    if place.endswith((".safetensors", ".pth")):
        return place
    place = place.rstrip("/")
    return place if WEIGHTS in store.names(place) else find_checkpoint(place, store)


def local_copy(place: str, store: S3Store) -> Path:
    """A copy of what :func:`find_checkpoint` or :func:`find_model` has found, in ``~/.cache/fourm/models``.

    Processes share it: one fetches, the others wait. Another content is another copy.

    Raises:
        UserError: it is damaged, or cannot be read.
    """
    if place.endswith((".safetensors", ".pth")):
        folder, _, name = place.rpartition("/")
        return _cached(folder, {name: store.describe(place)}, store) / name
    if CHECKSUMS in (names := store.names(place)):
        return _cached(place, _files(place, store), store)
    wanted = sorted(names & {CONFIG, WEIGHTS, "config.yaml"})
    return _cached(place, {name: store.describe(f"{place}/{name}") for name in wanted}, store)


def on_disk(place: str | Path, find: Callable[[str, S3Store], str]) -> str | Path:
    """``place``, or a local copy of what ``find`` finds there if it is a URL; the store is the one that boto3 is configured for."""
    store = S3Store()
    return local_copy(find(str(place), store), store) if str(place).startswith("s3://") else place


def fetch_checkpoint(place: str, target: Path, store: S3Store) -> None:
    """Make the folder ``target`` a copy of a checkpoint, once all of it is there and checked.

    Raises:
        DamagedObject: a file is not what its checksum tells.
        UserError: it cannot be read.
    """
    _fetch(_files(place, store), target, store)


def copy_checkpoint(checkpoint: Path, run: str, store: S3Store, keep_last: int) -> None:
    """Copy a checkpoint to the run at ``run``; then remove all but the ``keep_last`` newest, if not 0, of those up to it.

    Raises:
        UserError: the store cannot be written to.
    """
    folder = f"{run}/checkpoints"
    if CHECKSUMS in store.names(f"{folder}/{checkpoint.name}"):  # what is there was damaged
        store.remove(f"{folder}/{checkpoint.name}/{CHECKSUMS}")
    upload(checkpoint, f"{folder}/{checkpoint.name}", store, last=CHECKSUMS)
    if keep_last:
        names = store.names(folder)
        older = [step for step in _complete(names) if step < checkpoint.name]
        kept = {checkpoint.name, *older[: keep_last - 1]}  # whether the listing shows it yet or not
        for name in sorted(names, key=lambda name: (not name.endswith(CHECKSUMS), name)):
            step = name.partition("/")[0]
            if step.startswith("step-") and step <= checkpoint.name and step not in kept:
                store.remove(f"{folder}/{name}")


def _complete(names: Iterable[str]) -> list[str]:
    """``step-…`` of the complete checkpoints among the files of ``checkpoints/``, newest first."""
    found = (name.partition("/") for name in names)
    return sorted((step for step, _, file in found if step.startswith("step-") and file == CHECKSUMS), reverse=True)


def _files(place: str, store: S3Store) -> dict[str, RemoteObject]:
    """The files of a checkpoint by their names, with sizes and digests of ``checksums.json``, which comes last."""
    manifest = store.describe(f"{place}/{CHECKSUMS}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            store.download({Path(folder, CHECKSUMS): manifest})
            sums = json.loads(Path(folder, CHECKSUMS).read_bytes())
        files = {
            name: RemoteObject(f"{place}/{name}", size, digest=("crc32", f"{crc:08x}"))
            for name, (size, crc) in sums.items()
        }  # fmt: skip
        if any(name != Path(name).name for name in files):  # not to be written elsewhere
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise DamagedObject(f"{manifest.url}: this is no list of checksums; copy the checkpoint again") from None
    return files | {CHECKSUMS: manifest}


def _cached(place: str, files: dict[str, RemoteObject], store: S3Store) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fourm" / "models"
    content = hashlib.sha256(repr([store.endpoint, place, sorted(files.items())]).encode()).hexdigest()[:24]
    target = cache / f"{content}-{place.rpartition('/')[2]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{content}.lock"):
            if os.path.lexists(target) and not _intact(files, target):
                log.warning("%s: this copy of %s is damaged; it is fetched again", target, shown(place))
                if target.is_symlink() or not target.is_dir():
                    target.unlink()
                else:
                    shutil.rmtree(target)
            if not target.exists():
                for left in cache.glob(f".tmp-*-{content}-*"):  # by a process that was killed
                    shutil.rmtree(left)
                _fetch(files, target, store)
    except OSError as error:
        raise UserError(f"{cache}, for the copy of {shown(place)}: {error.strerror or error}") from error
    return target


def _intact(files: dict[str, RemoteObject], folder: Path) -> bool:
    """Whether a copy still is what was fetched. No link is followed."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    for name, item in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != item.size:
            return False
        if item.digest:
            with path.open("rb") as file:
                if hash_file(file, new_hasher(item.digest[0])) != item.digest[1]:
                    return False
    return True


def _fetch(files: dict[str, RemoteObject], target: Path, store: S3Store) -> None:
    items = {}
    for name, known in files.items():
        try:
            found = store.describe(known.url)
        except MissingObject as error:
            raise DamagedObject(str(error)) from None
        if found.size != known.size:
            raise DamagedObject(f"{known.url} has {found.size} bytes, not {known.size}")
        items[name] = replace(found, digest=known.digest)
    with atomic_folder(target, CHECKPOINT_FILES) as folder:
        store.download({folder / name: item for name, item in items.items()})
