"""What goes wrong in the data is counted and reported; more than a configured share of it stops the run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from fourm.utils.errors import DataError, sanitize

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
        self._complete = Counter[str]()  # per modality, the samples that have it
        self._lacking = Counter[str]()

    def joined(self, total: int, bad: Mapping[str, int], left_out: int = 0, final: bool = False) -> None:
        """Count the keys of one shard or folder.

        Args:
            bad: how many were dropped, by reason.
            left_out: how many the data set asks to drop; only dropping all of them is an error.
            final: there are no more to come.
        """
        self._joins += 1
        self._joined.update(total=total, bad=sum(bad.values()), left_out=left_out)
        self._recent.update(bad)
        if final or self._joins >= MIN_JOINS:
            number, of = self._joined["bad"], self._joined["total"]
            self._judge(number, of, "cannot be joined by key", self._max_bad_fraction)
            self._judge(number + self._joined["left_out"], of, "cannot be joined by key", 1.0)

    def read(self, reason: str | None = None, tolerated: bool = False) -> None:
        """Count one sample that was drawn and, with a ``reason``, skipped.

        Args:
            tolerated: as of :meth:`joined`.
        """
        self._read["total"] += 1
        if reason:
            outcome = "left out" if tolerated else "bad"
            self._read[outcome] += 1
            self._recent[reason] += not tolerated
            if self._size is not None or self._read["total"] >= MIN_READS:
                total = self._size or self._read["total"]
                self._judge(self._read[outcome], total, "cannot be read", 1.0 if tolerated else self._max_bad_fraction)

    def has(self, found: Collection[str], modalities: Iterable[str]) -> None:
        """Count which of its ``modalities`` a sample has."""
        for name in modalities:
            (self._complete if name in found else self._lacking)[name] += 1

    def warn(self, subject: str, message: str) -> None:
        """Log a warning, the first time that it is about ``subject``."""
        if subject not in self._warned:
            self._warned.add(subject)
            _log.warning("data set %s: %s", self._dataset, sanitize(message))

    def collect(self) -> dict[str, int]:
        """Number of skipped samples by reason since the last call."""
        recent = {f"{self._dataset}: {reason}": count for reason, count in self._recent.items() if count}
        self._recent.clear()
        return recent

    def collect_missing(self) -> dict[str, tuple[int, int]]:
        """Per modality, the number of samples without it and of all samples, since the last call."""
        names = {**self._complete, **self._lacking}
        counts = {name: (self._lacking[name], self._lacking[name] + self._complete[name]) for name in names}
        self._complete.clear()
        self._lacking.clear()
        return counts

    def _judge(self, bad: int, total: int, what: str, most: float) -> None:
        if bad > most * total or bad == total > 0:  # the latter would be an endless search
            raise DataError(
                f"data set {self._dataset}: {bad} of {total} samples {what}, with "
                f"max_bad_fraction={self._max_bad_fraction:g}; the warnings above name the files"
            )
