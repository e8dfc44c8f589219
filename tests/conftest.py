"""All tests and their child processes use one thread, so that sums have the same order on every machine."""

import gc
import os
from collections.abc import Generator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before the first import of torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with tests that take long first, so that none of them keeps the whole suite waiting at the end."""
    long = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("dist")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import tests without garbage collections, which take a third of the time, and leave imports out of later ones."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
