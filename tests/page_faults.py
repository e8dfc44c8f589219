"""How often a process asks the system for the memory of large tensors after it has run some code."""

import platform
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.warm_python import warm_python

_PROGRAM = """
{code}
import resource, torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):  # a few take new memory: before glibc 2.38, until small objects have filled the gaps of alignment
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeping freed memory is a setting of glibc")


def memory_is_kept(code: str) -> bool:
    """Return whether a process that has run ``code`` keeps its freed memory: less than half the faults of another."""
    return _faults(code) < _faults("") / 2


@cache
def _faults(code: str) -> int:
    command = [warm_python(), "-c", _PROGRAM.format(code=code)]
    result = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[1])
    return int(result.stdout.split()[-1])
