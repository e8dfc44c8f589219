"""Batches from worker processes: the wait for them can be interrupted, and their errors are those of the main process."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing import RawArray, active_children
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fourm.data.raw_sample import RawSample
from fourm.utils.errors import DataError, UserError

_POLL = 1.0  # seconds between two looks at what else has happened
_NOTE = 400  # bytes
_NOTHING_YET, _END = object(), object()
_note: memoryview | None = None  # in a worker: what it reads, for the main process


class BatchLoader:
    """Batches made in worker processes. Bad input met there is raised here, as the same one-line error."""

    def __init__(self, batches: IterableDataset, num_workers: int, pin_memory: bool = False):
        self._batches = batches
        self._num_workers, self._pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # TypeError for the endless ones

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self._batches, self._num_workers, self._pin_memory)


class BatchIterator(Iterator):
    """One pass over the batches.

    Attributes:
        in_process: there are no workers: batches are made here, and :meth:`ready` lasts until there is one.
    """

    def __init__(self, batches: IterableDataset, num_workers: int, pin_memory: bool):
        self.in_process = not num_workers
        self._notes = RawArray("c", _NOTE * max(1, num_workers))
        self._endless = not hasattr(batches, "__len__")
        self._item: Any = _NOTHING_YET
        loader = DataLoader(
            _ErrorsAsItems(batches, self._notes), batch_size=None, collate_fn=_unchanged, num_workers=num_workers,
            pin_memory=pin_memory, worker_init_fn=_heed_the_parent_alone, timeout=_POLL if num_workers else 0,
            generator=torch.Generator(),  # else it draws from the global one, even unused
        )  # fmt: skip
        before, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
        self._items = iter(loader)
        self._workers: list[BaseProcess] = [child for child in active_children() if child not in before]
        _forget_the_loaders_handler(handler)

    def ready(self) -> bool:
        """Wait about a second for the next batch.

        Returns:
            Whether ``next`` gives it at once, or ends; False: it is worth to wait on.

        Raises:
            UserError: the data are bad, or a worker has died.
        """
        if self._item is _NOTHING_YET:
            begin = time.monotonic()
            try:
                item = next(self._items, _END)
            except RuntimeError:
                self._check_workers()
                if self.in_process or time.monotonic() - begin < 0.9 * _POLL:
                    raise
                return False  # the loader's own limit, after which it can be asked again
            if isinstance(item, Exception):
                self.close()  # nothing more comes; the loader would wait for its workers, when it is forgotten one day
                raise item
            self._item = item
        return True

    @property
    def ended(self) -> bool:
        """Whether there are no more, as far as :meth:`ready` has seen."""
        return self._item is _END

    def __next__(self) -> Any:
        while not self.ready():
            pass
        if self._item is _END:
            raise StopIteration
        item, self._item = self._item, _NOTHING_YET
        return item

    def reading(self) -> str:
        """What the workers are reading now, for a message; nothing if that is not known."""
        notes = (self._notes.raw[at : at + _NOTE].partition(b"\0")[0] for at in range(0, len(self._notes), _NOTE))
        return "; ".join(sorted({note.decode(errors="replace") for note in notes if note})[:3])

    def close(self) -> None:
        """End the workers, also those that hang."""
        for worker in self._workers:
            worker.terminate()
        deadline = time.monotonic() + 2
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.kill()
                worker.join()

    def _check_workers(self) -> None:
        """Raise a :class:`UserError` if a worker has died that still had something to do."""
        for worker in self._workers:
            if not worker.is_alive() and (worker.exitcode or self._endless):
                code = worker.exitcode or 0
                how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
                reading = self.reading()
                raise UserError(
                    f"a data loader process has ended, {how}{_REASONS.get(-code, '')}"
                    f"{'; being read: ' + reading if reading else ''}; nothing that was saved is lost: the same command goes on"
                )


_REASONS: dict[int, str] = {
    signal.SIGKILL: ", as happens when memory runs out: lower num_workers, batch_size or the shuffle buffers",
    signal.SIGBUS: ", as happens when shared memory (/dev/shm) is full: enlarge it, or lower num_workers",
}


def note_reading(sample: RawSample | None) -> None:
    """Tell the main process, should it wait in vain, what this worker reads; None: nothing any more."""
    if _note is not None:
        text = (sample.where("").encode(errors="replace")[: _NOTE - 1] if sample else b"") + b"\0"
        _note[: len(text)] = text


class _ErrorsAsItems(IterableDataset):
    """Hands errors through the queue; the DataLoader would wrap those for the user into tracebacks."""

    def __init__(self, batches: Iterable[Any], notes: Any):
        self._batches, self._notes = batches, notes

    def __iter__(self) -> Iterator[Any]:
        global _note
        if (info := get_worker_info()) is None:
            yield from self._batches
            return
        _note = memoryview(self._notes).cast("B")[_NOTE * info.id : _NOTE * (info.id + 1)]
        try:
            yield from self._batches
        except UserError as error:
            yield _portable(error)
        except OSError as error:
            yield UserError(f"{error.filename or 'reading data'}: {error.strerror or error}")
        except MemoryError:
            yield UserError(
                "a data loader process ran out of memory: lower num_workers, batch_size or the shuffle buffers"
            )
        except Exception:
            yield RuntimeError(f"in a data loader process:\n{traceback.format_exc()}")


def _portable(error: UserError) -> UserError:
    """The error itself with its attributes, where it can be sent to another process; otherwise its sentence."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # is made as one that was sent
        return error
    except Exception:  # of many kinds: what errors of others hold
        return (DataError if isinstance(error, DataError) else UserError)(str(error))


def _forget_the_loaders_handler(before: Any) -> None:
    """Without the DataLoader's handler the death of a worker is an error of :meth:`BatchIterator.ready` alone.

    With it, the error would be raised wherever this process is, even in the middle of a checkpoint.
    """
    if threading.current_thread() is threading.main_thread():
        own = "torch.utils.data._utils.signal_handling"
        keep = before is not None and getattr(before, "__module__", "") != own
        signal.signal(signal.SIGCHLD, before if keep else signal.SIG_DFL)


def _heed_the_parent_alone(worker: int) -> None:
    """Let signals to all processes of a run end the main ones only: they need batches until their last step is done.

    A worker that took no SIGTERM at all would outlast a parent that ends without closing its loader, and keep it waiting.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_the_parent, daemon=True).start()


def _end_for_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _unchanged(item: Any) -> Any:
    return item
