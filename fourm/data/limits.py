"""How much one file of a stranger may take once it is decoded.

Few bytes can stand for many: a compressed file, a picture of one colour, a header that claims a shape. Whatever exceeds
these numbers is a bad sample, named and skipped, before memory is taken for it. They lie far above what data sets hold.
"""

from __future__ import annotations

MAX_PIXELS = 89_478_485
"""Of a picture: 256 MiB as RGB, and where Pillow begins to warn. The largest cameras in use stay below with their JPEGs."""

MAX_ARRAY_BYTES = 2**28
"""Of what a compressed file of arrays holds, 256 MiB: a hundred times the feature maps of an image."""

MAX_TEXT_BYTES = 2**24
"""Of a text or JSON file, 16 MiB, as parsed values take up to 30 times their text."""

MAX_PICKLE_BYTES = 2**24
"""Of an array of objects, 16 MiB, for the same reason: an empty list takes one byte of a pickle and 64 of memory."""

MAX_ITEMS = 2**23
"""Of an array of objects, counted as often as they are referred to: each may be referred to from many places."""

MAX_NPY_HEADER = 10_000
"""Bytes of an npy header, as numpy has it; they are parsed as Python."""

MAX_NPZ_MEMBERS = 1_000
"""Arrays in an npz file."""
