"""Limits on the decoded size of a single untrusted file.

A few bytes can expand to many: a compressed file, an image of one colour, a header that claims a shape. A file that
exceeds a limit is reported and skipped as a bad sample before memory is allocated for it. The limits are far above the
values in real data sets.
"""

from __future__ import annotations

MAX_PIXELS = 89_478_485
"""Maximum pixels of an image, 256 MiB as RGB: the limit above which Pillow warns; common cameras have fewer."""

MAX_ARRAY_BYTES = 2**28
"""Maximum decompressed size of a file of arrays, 256 MiB: a hundred times the feature maps of an image."""

MAX_TEXT_BYTES = 2**24
"""Maximum size of a text or JSON file, 16 MiB, because parsed values take up to 30 times the memory of their text."""

MAX_PICKLE_BYTES = 2**24
"""Maximum size of an object array, 16 MiB, because an empty list takes 1 byte in a pickle and 64 bytes in memory."""

MAX_ITEMS = 2**23
"""Maximum number of values in an object array. Each reference counts, because a value may be referenced many times."""

MAX_NPY_HEADER = 10_000
"""Maximum bytes of an npy header, which is parsed as a Python literal; the same limit as numpy's."""

MAX_NPZ_MEMBERS = 1_000
"""Maximum number of arrays in an npz file."""
