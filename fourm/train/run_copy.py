"""The copy of a run in an object store, below ``s3_save_dir``, from which another machine can go on; and models from stores."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fourm.train.journal import FILES
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
        "copy checkpoints, log and final model to s3://bucket/folder, below run_name; keep_last holds there too", ""
    )

    def check(self) -> None:
        if self.s3_save_dir and not self.s3_save_dir.startswith("s3://"):
            raise UserError(f"'s3_save_dir' must be s3://BUCKET or s3://BUCKET/FOLDER, not {self.s3_save_dir!r}")


class RunCopy:
    """What the main process of a run does with the copy of its run folder; without ``s3_save_dir`` there is none.

    Checkpoints are copied by a thread, one at a time, so that neither a step nor the next checkpoint waits for the store.
    One that is complete while another is being copied comes next, unless a newer one has taken its place by then.

    Args:
        keep_last: Checkpoints that are kept in the store; 0 = all.

    Attributes:
        url: Of the copy; empty if there is none.
        in_use: The checkpoints that are being copied or are to be copied.
    """

    def __init__(self, options: RunCopyOptions, keep_last: int):
        self._folder, self._store, self._keep_last = Path(options.output_dir), options.store(), keep_last
        self.url = f"{options.s3_save_dir.rstrip('/')}/{options.run_name}" if options.s3_save_dir else ""
        self.in_use: list[Path] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def copy(self, *names: str) -> None:
        """Copy files or folders of the run folder that are there.

        Raises:
            UserError: the store cannot be written to.
        """
        for name in names if self.url else ():
            if (self._folder / name).exists():
                upload(self._folder / name, f"{self.url}/{name}", self._store)

    def copy_checkpoint(self, checkpoint: Path) -> None:
        """Begin to copy the log and then a checkpoint, and to remove the copies of old ones; failures are logged."""
        if not self.url:
            return
        with self._changed:
            self.in_use[1:] = [checkpoint]
            if self._thread is None:
                self._thread = threading.Thread(target=self._copy_checkpoints, daemon=True)
                self._thread.start()

    def _copy_checkpoints(self) -> None:
        while True:
            checkpoint = self.in_use[0]
            try:
                self.copy(*FILES)
                model_store.copy_checkpoint(checkpoint, self.url, self._store, self._keep_last)
            except (
                UserError
            ) as error:  # the checkpoint is safe on the disk, and the training is worth more than its copy
                log.error(
                    "%s; the copy of %s in the store, or the removal of old ones, is not complete",
                    error,
                    checkpoint.name,
                )
            with self._changed:
                del self.in_use[0]
                if not self.in_use:
                    self._thread = None
                    self._changed.notify_all()
                    return

    def wait(self) -> None:
        """Return when nothing is being copied any more."""
        with self._changed:
            self._changed.wait_for(lambda: not self.in_use)

    def complete(self, last: Path) -> None:
        """Copy the last checkpoint of a finished run, unless that was done: it is not saved again.

        Raises:
            UserError: the store cannot be read.
        """
        if self.url and f"{self.url}/checkpoints/{last.name}" not in model_store.complete_checkpoints(
            self.url, self._store
        ):
            self.copy_checkpoint(last)
            self.wait()

    def newer_checkpoints(self, than: str) -> list[str]:
        """URLs of the complete checkpoints after the one called ``than``, newest first."""
        found = model_store.complete_checkpoints(self.url, self._store) if self.url else []
        return [url for url in found if url.rpartition("/")[2] > than]

    def fetch(self, urls: list[str]) -> None:
        """Bring the first of these checkpoints that is intact into the run folder, and with it the log.

        Raises:
            UserError: the store cannot be read, or has another run under this name.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.yaml")
            self._store.download({path: self._store.describe(f"{self.url}/config.yaml")})
            other = load_yaml(path).get("output_dir")
        if Path(str(other)) != self._folder:
            raise UserError(
                f"{redact_url(self.url)} is the copy of the run in {other}: choose another run_name, or to go on with that run set "
                f"output_dir to {other}"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        lock_folder(self._folder)
        for name in FILES:
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
                log.warning("%s; passed over", error)


def fetched(place: str, find: Callable[[str, S3Store], str], options: StoreOptions, parallel: Processes) -> str:
    """``place``, or a local copy of what ``find`` finds there if it is in a store; all processes must call this.

    Raises:
        UserError: there is nothing, or it cannot be read.
    """
    if not place.startswith("s3://"):
        return place
    store = options.store()
    url = parallel.from_main(lambda: find(place, store))  # a run that goes on has another newest one a moment later
    return str(parallel.together(lambda: model_store.local_copy(url, store))[parallel.rank])
