"""Random generators that depend on nothing but their key."""

from __future__ import annotations

import zlib

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """Return a generator that depends on ``key`` alone, e.g. ``generator(seed, epoch, stream, position)``."""
    words = [zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in key]
    # The same numbers as from the list, which takes numpy several times as long if it is not an array of 32 bits.
    entropy = np.array(words, np.uint32) if all(0 <= word < 2**32 for word in words) else words
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
