"""The copy of a run in an object store, below ``s3_save_dir``, from which another machine can continue the run."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fourm.train.journal import JOURNAL_FILES
from fourm.train.options import RunOptions
from fourm.train.parallel import Processes
from fourm.utils import model_store
from fourm.utils.config import load_yaml
from fourm.utils.errors import UserError
from fourm.utils.files import atomic_path, lock_folder
from fourm.utils.options import option
from fourm.utils.s3 import S3Store, StoreOptions, upload
from fourm.utils.transfer import DamagedObject, MissingObject
from fourm.utils.urls import redact_url

log = logging.getLogger("fourm")


@dataclass(frozen=True, kw_only=True)
class RunCopyOptions(RunOptions, StoreOptions):
    """Copy of the run in a store"""

    s3_save_dir: str = option(
        "copy checkpoints, log and final model to s3://bucket/folder/run_name; keep_last applies there too", ""
    )

    def check(self) -> None:
        if self.s3_save_dir and not self.s3_save_dir.startswith("s3://"):
            raise UserError(f"'s3_save_dir' must be s3://BUCKET or s3://BUCKET/FOLDER, not {self.s3_save_dir!r}")


class RunCopy:
    """Copies the run folder to a store and back, in the main process; does nothing without ``s3_save_dir``.

    Checkpoints are copied by a thread, one at a time, so that neither the training nor the next checkpoint waits for
    the store. A checkpoint that is saved while another one is being copied comes next, unless a newer one replaces it.

    Args:
        keep_last: The number of checkpoints to keep in the store; 0 keeps all.

    Attributes:
        url: The URL of the copy; empty if there is none.
        pending: The checkpoint that is being copied, and the one to copy next.
    """

    def __init__(self, options: RunCopyOptions, keep_last: int):
        self._folder, self._store, self._keep_last = Path(options.output_dir), options.store(), keep_last
        self.url = f"{options.s3_save_dir.rstrip('/')}/{options.run_name}" if options.s3_save_dir else ""
        self.pending: list[Path] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def copy(self, *names: str) -> None:
        """Copy those of these files and folders of the run folder that exist.

        Raises:
            UserError: The store cannot be written to.
        """
        if not self.url:
            return
        for name in names:
            if (self._folder / name).exists():
                upload(self._folder / name, f"{self.url}/{name}", self._store)

    def copy_checkpoint(self, checkpoint: Path) -> None:
        """Start to copy the log and a checkpoint and to remove the copies of old ones; failures are logged."""
        if not self.url:
            return
        with self._changed:
            self.pending[1:] = [checkpoint]
            if self._thread is None:
                self._thread = threading.Thread(target=self._copy_checkpoints, daemon=True)
                self._thread.start()

    def _copy_checkpoints(self) -> None:
        while True:
            checkpoint = self.pending[0]
            try:
                self.copy(*JOURNAL_FILES)
                model_store.copy_checkpoint(checkpoint, self.url, self._store, self._keep_last)
            except UserError as error:  # the training goes on: the checkpoint itself is safe in the run folder
                message = "%s; the copy of %s in the store, or the removal of old ones, is not complete"
                log.error(message, error, checkpoint.name)
            with self._changed:
                del self.pending[0]
                if not self.pending:
                    self._thread = None
                    self._changed.notify_all()
                    return

    def wait(self) -> None:
        """Wait until all copies are complete."""
        with self._changed:
            self._changed.wait_for(lambda: not self.pending)

    def complete(self, last: Path) -> None:
        """Copy the last checkpoint of a finished run if its copy is missing.

        Raises:
            UserError: The store cannot be read.
        """
        if not self.url:
            return
        if f"{self.url}/checkpoints/{last.name}" not in model_store.complete_checkpoints(self.url, self._store):
            self.copy_checkpoint(last)
            self.wait()

    def newer_checkpoints(self, than: str) -> list[str]:
        """Return the URLs of the complete checkpoints after the one called ``than``, newest first."""
        urls = model_store.complete_checkpoints(self.url, self._store) if self.url else []
        return [url for url in urls if url.rpartition("/")[2] > than]

    def fetch(self, urls: list[str]) -> None:
        """Download the log and the first of these checkpoints that is intact into the run folder.

        Raises:
            UserError: The store cannot be read, or holds another run under this name.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.yaml")
            self._store.download({path: self._store.describe(f"{self.url}/config.yaml")})
            copied_folder = load_yaml(path).get("output_dir")
        if Path(str(copied_folder)) != self._folder:
            raise UserError(
                f"{redact_url(self.url)} is the copy of the run in {copied_folder}: choose another run_name, or set "
                f"output_dir to {copied_folder} to continue that run"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        lock_folder(self._folder)
        for name in JOURNAL_FILES:
            with contextlib.suppress(MissingObject):
                item = self._store.describe(f"{self.url}/{name}")
                with atomic_path(self._folder / name) as path:
                    self._store.download({path: item})
        for url in urls:
            target = self._folder / "checkpoints" / url.rpartition("/")[2]
            try:
                model_store.fetch_checkpoint(url, target, self._store)
                log.info("fetched %s", redact_url(url))
                return
            except DamagedObject as error:
                log.warning("%s; trying the checkpoint before it", error)


def fetch_if_remote(place: str, find: Callable[[str, S3Store], str], options: StoreOptions, parallel: Processes) -> str:
    """Return a local copy of what a URL names, or a path as it is; all processes must call this.

    Args:
        place: A path, or the ``s3://`` URL of a model, checkpoint or run.
        find: Finds the URL of the model or checkpoint to fetch at a URL.

    Raises:
        UserError: There is nothing to fetch, or it cannot be read.
    """
    if not place.startswith("s3://"):
        return place
    store = options.store()
    # Only one process looks, because a run that is still training may have a newer checkpoint a moment later.
    url = parallel.from_main(lambda: find(place, store))
    return str(parallel.together(lambda: model_store.local_copy(url, store))[parallel.rank])
