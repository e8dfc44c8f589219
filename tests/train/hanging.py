"""A plugin whose transform hangs after the number of samples in the environment variable FOURM_TEST_HANGS."""

import itertools
import os
import time

from fourm.data.sample_dataset import SampleDataset

_masked, _count = SampleDataset.masked, itertools.count()


def masked(self, sample, rng):
    while next(_count) >= int(os.environ["FOURM_TEST_HANGS"]):
        time.sleep(1000)
    return _masked(self, sample, rng)


SampleDataset.masked = masked  # type: ignore[method-assign]
