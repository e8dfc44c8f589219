"""Generators depend on their key alone."""

import zlib

import numpy as np
import pytest

from fourm.utils.seeds import generator


@pytest.mark.parametrize("key", [(0, "sample", 3, 2**32 - 1), (2**32, "order"), (2**40 + 1, 0, "")])
def test_a_generator_is_seeded_by_its_words(key):
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    plain = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
    assert generator(*key).integers(2**63, size=4).tolist() == plain.integers(2**63, size=4).tolist()
