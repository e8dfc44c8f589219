"""All tests, and the processes that they start, compute with one thread: sums have one order, whatever the machine."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before the first import of torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: if one of them were the last, it would be all that there is still to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
