"""The copy of a run in an object store, below ``s3_save_dir``, from which another machine can go on; and models from stores."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from fourm.models import model_store as remote
from fourm.train.config import TrainConfig
from fourm.train.journal import FILES
from fourm.train.parallel import Processes
from fourm.utils.config import load_yaml
from fourm.utils.errors import UserError
from fourm.utils.files import atomic_path, lock_folder
from fourm.utils.s3 import S3Store, upload
from fourm.utils.transfer import DamagedObject, MissingObject

log = logging.getLogger("fourm")


class RemoteRun:
    """What the main process of a run does with the copy of its run folder; without ``s3_save_dir`` there is none."""

    def __init__(self, config: TrainConfig):
        self._config, self._folder, self._store = config, Path(config.output_dir), store_of(config)
        self.url = f"{config.s3_save_dir.rstrip('/')}/{config.run_name}" if config.s3_save_dir else ""

    def copy(self, *names: str) -> None:
        """Copy files or folders of the run folder that are there.

        Raises:
            UserError: the store cannot be written to.
        """
        for name in names if self.url else ():
            if (self._folder / name).exists():
                upload(self._folder / name, f"{self.url}/{name}", self._store)

    def copy_checkpoint(self, checkpoint: Path) -> None:
        """Copy the log and then a checkpoint, and remove the copies of old ones, as ``keep_last`` says; failures are logged."""
        if not self.url:
            return
        try:
            self.copy(*FILES)
            remote.copy_checkpoint(checkpoint, self.url, self._store, self._config.keep_last)
        except UserError as error:  # the checkpoint is safe here, and the training worth more than its copy
            log.error(
                "%s; the copy of %s in the store, or the removal of old ones, is not complete", error, checkpoint.name
            )

    def complete(self, last: Path) -> None:
        """Copy the last checkpoint of a finished run, unless that was done: it is not saved again.

        Raises:
            UserError: the store cannot be read.
        """
        if self.url and f"{self.url}/checkpoints/{last.name}" not in remote.complete_checkpoints(self.url, self._store):
            self.copy_checkpoint(last)

    def newer_checkpoints(self, than: str) -> list[str]:
        """URLs of the complete checkpoints after the one called ``than``, newest first."""
        found = remote.complete_checkpoints(self.url, self._store) if self.url else []
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
                f"{self.url} is the copy of the run in {other}: choose another run_name, or to go on with that run set "
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
                remote.fetch_checkpoint(url, target, self._store)
                log.info("fetched %s", url)
                return
            except DamagedObject as error:
                log.warning("%s; passed over", error)


def store_of(config: TrainConfig) -> S3Store:
    return S3Store(
        config.s3_endpoint, config.s3_multipart_chunksize_mb * 2**20, config.s3_multipart_threshold_mb * 2**20,
        config.s3_max_io_queue,
    )  # fmt: skip


def here(place: str, find: Callable[[str, S3Store], str], config: TrainConfig, parallel: Processes) -> str:
    """``place``, or of what ``find`` finds at an ``s3://`` one a copy on this machine; all processes must call this.

    Raises:
        UserError: there is nothing, or it cannot be read.
    """
    if not place.startswith("s3://"):
        return place
    store = store_of(config)
    url = parallel.from_main(lambda: find(place, store))  # a run that goes on has another newest one a moment later
    return str(parallel.together(lambda: remote.local_copy(url, store))[parallel.rank])
