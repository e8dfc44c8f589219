"""Load batches in worker processes, with interruptible waiting and with errors that are raised in the main process."""

from __future__ import annotations

import copy
import gc
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

_POLL_SECONDS = 1.0  # how long one call waits for a batch
_NOTE_BYTES = 400  # size of the note of a worker
_GC_THRESHOLD = 20_000  # new objects in a worker until a garbage collection; the default is 700 or 2 000
_PENDING, _END = object(), object()
_note: memoryview | None = None  # in a worker: shared memory that tells the main process which sample is being read


class BatchLoader:
    """Batches from worker processes, whose errors about bad input are raised here as the same one-line errors."""

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
        in_process: Whether batches are built in this process, without workers; :meth:`ready` then waits until there is
            one.
    """

    def __init__(self, batches: IterableDataset, num_workers: int, pin_memory: bool):
        self.in_process = not num_workers
        self._notes = RawArray("c", _NOTE_BYTES * max(1, num_workers))
        self._endless = not hasattr(batches, "__len__")
        self._item: Any = _PENDING
        self._workers: list[BaseProcess] = []
        self._items: Iterator[Any] = iter(_ErrorsAsItems(batches, self._notes))
        if num_workers:
            self._items = self._start_workers(batches, num_workers, pin_memory)
        elif pin_memory and torch.cuda.is_available():
            self._items = (batch.pin_memory() for batch in self._items)

    def _start_workers(self, batches: IterableDataset, num_workers: int, pin_memory: bool) -> Iterator[Any]:
        loader = DataLoader(
            _ErrorsAsItems(batches, self._notes),
            batch_size=None,
            collate_fn=_identity,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_init_worker,
            timeout=_POLL_SECONDS,
            generator=torch.Generator(),  # otherwise the DataLoader would draw from the global one
        )
        before, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
        items = iter(loader)
        self._workers = [child for child in active_children() if child not in before]
        _remove_loader_handler(handler)
        return items

    def ready(self) -> bool:
        """Wait about a second for the next batch.

        Returns:
            True if ``next`` will return or stop immediately; False if the batch is not ready yet.

        Raises:
            UserError: The data are bad, or a worker has died.
        """
        if self._item is _PENDING:
            start = time.monotonic()
            try:
                item = next(self._items, _END)
            except RuntimeError:
                self._check_workers()
                if self.in_process or time.monotonic() - start < 0.9 * _POLL_SECONDS:
                    raise
                return False  # the timeout of the DataLoader, which can be asked again
            if isinstance(item, Exception):
                self.close()  # otherwise the DataLoader would wait for its workers when it is garbage-collected
                raise item
            self._item = item
        return True

    @property
    def ended(self) -> bool:
        """Whether :meth:`ready` has found that there are no more batches."""
        return self._item is _END

    def __next__(self) -> Any:
        while not self.ready():
            pass
        if self._item is _END:
            raise StopIteration
        item, self._item = self._item, _PENDING
        return item

    def reading(self) -> str:
        """Return the samples that the workers are reading, for messages; empty if unknown."""
        notes = (
            self._notes.raw[at : at + _NOTE_BYTES].partition(b"\0")[0] for at in range(0, len(self._notes), _NOTE_BYTES)
        )
        return "; ".join(sorted({note.decode(errors="replace") for note in notes if note})[:3])

    def close(self) -> None:
        """Terminate the workers, including those that hang, or end what builds batches in this process."""
        if self.in_process:
            self._items = iter(())  # closes the generators, which cancels their downloads
        for worker in self._workers:
            worker.terminate()
        deadline = time.monotonic() + 2
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.kill()
                worker.join()

    def _check_workers(self) -> None:
        """Raise a :class:`UserError` if a worker died before its work was done."""
        for worker in self._workers:
            if not worker.is_alive() and (worker.exitcode or self._endless):
                code = worker.exitcode or 0
                how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
                reading = self.reading()
                raise UserError(
                    f"a data loader process ended {how}{_SIGNAL_HINTS.get(-code, '')}"
                    f"{'; it was reading ' + reading if reading else ''}; "
                    "start the run again to continue from its newest checkpoint"
                )


_SIGNAL_HINTS: dict[int, str] = {
    signal.SIGKILL: ", as happens when memory runs out: lower num_workers, batch_size or the shuffle buffers",
    signal.SIGBUS: ", as happens when shared memory (/dev/shm) is full: enlarge it, or lower num_workers",
}


def note_reading(sample: RawSample | None) -> None:
    """Tell the main process which sample this worker is reading, in case it hangs; None when it is done."""
    if _note is not None:
        text = (sample.where("").encode(errors="replace")[: _NOTE_BYTES - 1] if sample else b"") + b"\0"
        _note[: len(text)] = text


class _ErrorsAsItems(IterableDataset):
    """Yields errors as items, because the DataLoader would wrap errors for the user in tracebacks."""

    def __init__(self, batches: Iterable[Any], notes: Any):
        self._batches, self._notes = batches, notes

    def __iter__(self) -> Iterator[Any]:
        global _note
        info = get_worker_info()
        if info is None:
            yield from self._batches
            return
        _note = memoryview(self._notes).cast("B")[_NOTE_BYTES * info.id : _NOTE_BYTES * (info.id + 1)]
        try:
            yield from self._batches
        except UserError as error:
            yield _picklable(error)
        except OSError as error:
            yield UserError(f"{error.filename or 'reading data'}: {error.strerror or error}")
        except MemoryError:
            yield UserError(
                "a data loader process ran out of memory: lower num_workers, batch_size or the shuffle buffers"
            )
        except Exception:
            yield RuntimeError(f"in a data loader process:\n{traceback.format_exc()}")


def _picklable(error: UserError) -> UserError:
    """Return the error with its attributes if it can be pickled, and otherwise an error with only its message."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # rebuilds the error as unpickling does
        return error
    except Exception:  # errors of plugins may hold anything
        return (DataError if isinstance(error, DataError) else UserError)(str(error))


def _remove_loader_handler(before: Any) -> None:
    """Remove the SIGCHLD handler of the DataLoader, so that only :meth:`BatchIterator.ready` reports a dead worker.

    The handler would raise its error at an arbitrary point of this process, even in the middle of a checkpoint.
    """
    if threading.current_thread() is threading.main_thread():
        own = "torch.utils.data._utils.signal_handling"
        keep = before is not None and getattr(before, "__module__", "") != own
        signal.signal(signal.SIGCHLD, before if keep else signal.SIG_DFL)


def _init_worker(worker: int) -> None:
    """Prepare this process for nothing but building batches."""
    _ignore_foreign_signals()
    # Hundreds of thousands of objects of the imported packages live as long as the process. Collections need not visit
    # them, which also saves copies of the pages that a worker shares with its parent. What a sample leaves behind is
    # mostly freed by reference counting.
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)


def _ignore_foreign_signals() -> None:
    """Ignore signals that do not come from the parent, which needs batches until its last step is done.

    A worker that ignored every SIGTERM would outlive a parent that exits without closing its loader, and keep it
    waiting.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _identity(item: Any) -> Any:
    return item
