"""What goes wrong in the data is counted and reported; more than a configured share of it stops the run."""

from __future__ import annotations

import logging
from collections import Counter

from fourm.utils.errors import DataError

_log = logging.getLogger(__name__)

MIN_READS = 100  # samples drawn, and
MIN_JOINS = 10  # shards joined, before their share of bad samples is judged


class BadSampleLedger:
    """The bad samples of one data set, as seen by one reader.

    Two shares are watched apart: keys that are not in every modality (known when a shard or folder is *joined*), and
    samples whose content cannot be *read*.

    Args:
        size: number of samples of the data set if each is read once, by whichever reader: the share of unreadable ones is
            then taken of it. None: of the samples that this reader has drawn.
    """

    def __init__(self, dataset: str, max_bad_fraction: float, size: int | None = None):
        self._dataset, self._size = dataset, size
        self._max_bad_fraction = max_bad_fraction
        self._recent: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._joins = 0
        self._joined = Counter[str]()
        self._read = Counter[str]()

    def joined(self, total: int, bad: int, final: bool = False) -> None:
        """Count the keys of one shard or folder, of which ``bad`` were dropped; ``final``: there are no more to come."""
        self._joins += 1
        self._joined.update(total=total, bad=bad)
        self._recent["missing member"] += bad
        if final or self._joins >= MIN_JOINS:
            self._judge(self._joined["bad"], self._joined["total"], "cannot be joined by key")

    def read(self, reason: str | None = None) -> None:
        """Count one sample that was drawn and, with a ``reason``, skipped."""
        self._read["total"] += 1
        if reason:
            self._read["bad"] += 1
            self._recent[reason] += 1
            if self._size is not None or self._read["total"] >= MIN_READS:
                self._judge(self._read["bad"], self._size or self._read["total"], "cannot be read")

    def warn(self, subject: str, message: str) -> None:
        """Log a warning, the first time that it is about ``subject``."""
        if subject not in self._warned:
            self._warned.add(subject)
            _log.warning("data set %s: %s", self._dataset, message)

    def collect(self) -> dict[str, int]:
        """Number of skipped samples by reason since the last call."""
        recent = {f"{self._dataset}: {reason}": count for reason, count in self._recent.items() if count}
        self._recent.clear()
        return recent

    def _judge(self, bad: int, total: int, what: str) -> None:
        if bad > self._max_bad_fraction * total or bad == total > 0:  # the latter would be an endless search
            raise DataError(
                f"data set {self._dataset}: {bad} of {total} samples {what}, with "
                f"max_bad_fraction={self._max_bad_fraction:g}; the warnings above name the files"
            )
