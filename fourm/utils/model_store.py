"""Find models and checkpoints in S3 stores, download them, and upload checkpoints.

A checkpoint has the same files in a store as on disk (:mod:`fourm.utils.checkpoints`). Its ``checksums.json`` is
uploaded last and removed first, so that a checkpoint that has one is complete. Downloads are checked against it.
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
from fourm.utils.transfer import DamagedObject, MissingObject, RemoteObject, hash_file, new_hasher
from fourm.utils.urls import redact_url

log = logging.getLogger(__name__)


def complete_checkpoints(run: str, store: S3Store) -> list[str]:
    """List the URLs of the complete checkpoints of the run at the URL ``run``, newest first."""
    folder = f"{run}/checkpoints"
    return [f"{folder}/{step}" for step in _complete(store.names(folder))]


def find_checkpoint(url: str, store: S3Store) -> str:
    """Return ``url`` itself if it is a checkpoint, and otherwise the newest checkpoint of the run at that URL.

    Raises:
        UserError: If there is no complete checkpoint, or the store cannot be read.
    """
    url = url.rstrip("/")
    checkpoints = [url] if CHECKSUMS in store.names(url) else complete_checkpoints(url, store)
    if not checkpoints:
        raise UserError(f"{redact_url(url)} is neither a complete checkpoint nor a run with checkpoints")
    return checkpoints[0]


def find_model(url: str, store: S3Store) -> str:
    """Return ``url`` if it is a file or folder with a model, and otherwise the result of :func:`find_checkpoint`."""
    if url.endswith((".safetensors", ".pth")):
        return url
    url = url.rstrip("/")
    return url if WEIGHTS in store.names(url) else find_checkpoint(url, store)


def local_copy(url: str, store: S3Store) -> Path:
    """Download a result of :func:`find_checkpoint` or :func:`find_model` to ``~/.cache/fourm/models``, if necessary.

    Processes share the copy: one downloads it while the others wait. If the content changes, a new copy is made.

    Raises:
        UserError: If the object is damaged or cannot be read.
    """
    if url.endswith((".safetensors", ".pth")):
        folder, _, name = url.rpartition("/")
        return _cached(folder, {name: store.describe(url)}, store) / name
    names = store.names(url)
    if CHECKSUMS in names:
        return _cached(url, _describe_files(url, store), store)
    wanted = sorted(names & {CONFIG, WEIGHTS, "config.yaml"})
    return _cached(url, {name: store.describe(f"{url}/{name}") for name in wanted}, store)


def download_if_remote(place: str | Path, find: Callable[[str, S3Store], str]) -> str | Path:
    """Return ``place``, or the local copy of what ``find`` returns if it is an ``s3://`` URL.

    The store is the one that boto3 is configured for.
    """
    store = S3Store()
    return local_copy(find(str(place), store), store) if str(place).startswith("s3://") else place


def fetch_checkpoint(url: str, target: Path, store: S3Store) -> None:
    """Download a checkpoint to the folder ``target``, which appears only once all files are complete and checked.

    Raises:
        DamagedObject: If a file does not match its checksum.
        UserError: If the checkpoint cannot be read.
    """
    _fetch(_describe_files(url, store), target, store)


def copy_checkpoint(checkpoint: Path, run: str, store: S3Store, keep_last: int) -> None:
    """Upload a checkpoint to the run at the URL ``run``, then remove older checkpoints.

    Args:
        checkpoint: Folder of the checkpoint.
        run: URL of the run.
        store: The store.
        keep_last: Number of checkpoints to keep, counting back from this one; 0 keeps all. Newer ones are not touched.

    Raises:
        UserError: If the store cannot be written to.
    """
    folder = f"{run}/checkpoints"
    if CHECKSUMS in store.names(f"{folder}/{checkpoint.name}"):  # a damaged copy of an earlier attempt
        store.remove(f"{folder}/{checkpoint.name}/{CHECKSUMS}")
    upload(checkpoint, f"{folder}/{checkpoint.name}", store, last=CHECKSUMS)
    if keep_last:
        names = store.names(folder)
        older = [step for step in _complete(names) if step < checkpoint.name]
        kept = {checkpoint.name, *older[: keep_last - 1]}  # the listing may not include the new one yet
        for name in sorted(names, key=lambda name: (not name.endswith(CHECKSUMS), name)):
            step = name.partition("/")[0]
            if step.startswith("step-") and step <= checkpoint.name and step not in kept:
                store.remove(f"{folder}/{name}")


def _complete(names: Iterable[str]) -> list[str]:
    """Return the ``step-…`` names of complete checkpoints among the objects of ``checkpoints/``, newest first."""
    parts = (name.partition("/") for name in names)
    return sorted((step for step, _, file in parts if step.startswith("step-") and file == CHECKSUMS), reverse=True)


def _describe_files(url: str, store: S3Store) -> dict[str, RemoteObject]:
    """Return the files of a checkpoint by name, with the sizes and digests of ``checksums.json``, which is last."""
    manifest = store.describe(f"{url}/{CHECKSUMS}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            store.download({Path(folder, CHECKSUMS): manifest})
            sums = json.loads(Path(folder, CHECKSUMS).read_bytes())
        files = {
            name: RemoteObject(f"{url}/{name}", size, digest=("crc32", f"{crc:08x}"))
            for name, (size, crc) in sums.items()
        }
        if any(name != Path(name).name for name in files):  # such a name could point outside the folder
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise DamagedObject(f"{manifest.url}: this is not a list of checksums; upload the checkpoint again") from None
    return files | {CHECKSUMS: manifest}


def _cached(url: str, files: dict[str, RemoteObject], store: S3Store) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fourm" / "models"
    content = hashlib.sha256(repr([store.endpoint, url, sorted(files.items())]).encode()).hexdigest()[:24]
    target = cache / f"{content}-{url.rpartition('/')[2]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{content}.lock"):
            if os.path.lexists(target) and not _intact(files, target):
                log.warning("%s: this copy of %s is damaged and will be downloaded again", target, redact_url(url))
                if target.is_symlink() or not target.is_dir():
                    target.unlink()
                else:
                    shutil.rmtree(target)
            if not target.exists():
                for leftover in cache.glob(f".tmp-*-{content}-*"):  # from a process that was killed
                    shutil.rmtree(leftover)
                _fetch(files, target, store)
    except OSError as error:
        raise UserError(f"{redact_url(url)} cannot be cached in {cache}: {error.strerror or error}") from error
    return target


def _intact(files: dict[str, RemoteObject], folder: Path) -> bool:
    """Return whether a copy still matches what was downloaded. Symbolic links are not followed."""
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
    for name, expected in files.items():
        try:
            item = store.describe(expected.url)
        except MissingObject as error:
            raise DamagedObject(str(error)) from None
        if item.size != expected.size:
            raise DamagedObject(f"{expected.url} has {item.size} bytes, not {expected.size}")
        items[name] = replace(item, digest=expected.digest)
    with atomic_folder(target, CHECKPOINT_FILES) as folder:
        store.download({folder / name: item for name, item in items.items()})
