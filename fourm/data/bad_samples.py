"""Count and report bad samples, and stop the run when their share exceeds a limit."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from fourm.utils.errors import DataError, sanitize

_log = logging.getLogger(__name__)

MIN_READS = 100  # samples that are read before their share of bad samples is checked
MIN_JOINS = 10  # shards that are joined before their share of bad samples is checked


class BadSampleLedger:
    """Counts the bad samples of one data set in one reader.

    Two shares are checked separately: keys that are not in every modality (known when a shard or folder is *joined*),
    and samples whose content cannot be *read*.

    Args:
        dataset: Name of the data set.
        max_bad_fraction: Maximum share of bad samples.
        size: Total number of samples if each is read once by some reader; the share of unreadable samples then refers
            to it. None: the share refers to the samples that this reader has drawn.
    """

    def __init__(self, dataset: str, max_bad_fraction: float, size: int | None = None):
        self._dataset, self._size = dataset, size
        self._max_bad_fraction = max_bad_fraction
        self._recent: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._joins = 0
        self._joined = Counter[str]()
        self._read = Counter[str]()
        self._present = Counter[str]()  # per modality, the samples that have it
        self._absent = Counter[str]()

    def joined(self, total: int, bad: Mapping[str, int], left_out: int = 0, final: bool = False) -> None:
        """Count the keys of one shard or folder.

        Args:
            total: Number of keys.
            bad: Number of dropped keys by reason.
            left_out: Number of keys that the data set is configured to drop; this is an error only if it drops all
                keys.
            final: Whether this is the last call.
        """
        self._joins += 1
        self._joined.update(total=total, bad=sum(bad.values()), left_out=left_out)
        self._recent.update(bad)
        if final or self._joins >= MIN_JOINS:
            number, of = self._joined["bad"], self._joined["total"]
            self._judge(number, of, "cannot be joined by key", self._max_bad_fraction)
            self._judge(number + self._joined["left_out"], of, "cannot be joined by key", 1.0)

    def read(self, reason: str | None = None, tolerated: bool = False) -> None:
        """Count one sample that was drawn and, if there is a ``reason``, skipped.

        Args:
            reason: Why the sample was skipped.
            tolerated: Whether the data set is configured to skip such samples.
        """
        self._read["total"] += 1
        if reason:
            outcome = "left out" if tolerated else "bad"
            self._read[outcome] += 1
            if not tolerated:
                self._recent[reason] += 1
            if self._size is not None or self._read["total"] >= MIN_READS:
                total = self._size or self._read["total"]
                self._judge(self._read[outcome], total, "cannot be read", 1.0 if tolerated else self._max_bad_fraction)

    def has(self, sample: Collection[str], modalities: Iterable[str]) -> None:
        """Count which of the ``modalities`` a sample has."""
        for name in modalities:
            counts = self._present if name in sample else self._absent
            counts[name] += 1

    def warn(self, subject: str, message: str) -> None:
        """Log a warning unless there was one about ``subject`` before."""
        if subject not in self._warned:
            self._warned.add(subject)
            _log.warning("data set %s: %s", self._dataset, sanitize(message))

    def collect(self) -> dict[str, int]:
        """Return the number of skipped samples by reason since the last call."""
        recent = {f"{self._dataset}: {reason}": count for reason, count in self._recent.items() if count}
        self._recent.clear()
        return recent

    def collect_missing(self) -> dict[str, tuple[int, int]]:
        """Return, per modality, the number of samples without it and of all samples since the last call."""
        names = {**self._present, **self._absent}
        counts = {name: (self._absent[name], self._absent[name] + self._present[name]) for name in names}
        self._present.clear()
        self._absent.clear()
        return counts

    def _judge(self, bad: int, total: int, problem: str, max_fraction: float) -> None:
        all_bad = total > 0 and bad == total  # the search for a good one would not end
        if all_bad or bad > max_fraction * total:
            raise DataError(
                f"data set {self._dataset}: {bad} of {total} samples {problem}, with "
                f"max_bad_fraction={self._max_bad_fraction:g}; the warnings above name the files"
            )
