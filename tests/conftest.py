"""All tests, and the processes that they start, compute with one thread: sums have one order, whatever the machine."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before the first import of torch
