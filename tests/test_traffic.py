"""``benchmarks/traffic.py`` counts exactly what operations and fused kernels read and write."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("traffic")


def test_an_operation_moves_its_inputs_and_outputs_but_views_and_broadcast_dimensions_nothing(traffic):
    a, b, table = torch.ones(64, 32), torch.ones(32), torch.ones(1000, 8)
    with traffic.Traffic() as counted:
        (a.t() @ a).add_(b.expand(32, 32)).view(-1)
        torch.nn.functional.embedding(torch.tensor([1, 2]), table)
    assert counted.calls == {"mm": 1, "add_": 1, "embedding": 1}
    # The sum is read, and written into the memory of an argument, which counts as its result.
    floats = {"mm": 2 * 64 * 32 + 32 * 32, "add_": 2 * 32 * 32 + 32, "embedding": 2 * 2 * 8}
    assert counted.bytes == {name: 4 * count for name, count in floats.items()}
    assert counted.flops == {"mm": 2 * 32 * 64 * 32}


def test_a_compiled_function_moves_the_inputs_and_outputs_of_its_fused_kernels(traffic):
    def function(x, y):
        return ((x * y).sigmoid() + x) @ y

    x, y = torch.randn(64, 64), torch.randn(64, 64)
    counted = traffic.Traffic()
    compiled = torch.compile(function, backend=counted.compile)
    with torch.compiler.config.patch(force_disable_caches=True):
        torch.testing.assert_close(compiled(x, y), function(x, y))
    counted.clear()
    with counted:
        compiled(x, y)
        compiled(x, y)
    matrix = 64 * 64 * 4
    assert counted.calls == {traffic.FUSED: 2, "mm": 2}
    assert counted.bytes == {traffic.FUSED: 2 * 3 * matrix, "mm": 2 * 3 * matrix}


@pytest.mark.slow
def test_counts_lie_on_a_line_over_the_batch_size(traffic, capsys, monkeypatch):
    command = ["--toy", "--tokens", "32", "--kinds", "eager", "--batch_size"]
    rows = []
    for batch_size in ("4", "8"):
        traffic.main([*command, batch_size])
        rows.append(json.loads(capsys.readouterr().out))
    four, eight = rows
    assert 0 < four["mfu"] < eight["mfu"] < 1 and eight["tflop"] == pytest.approx(2 * four["tflop"])
    monkeypatch.setattr(traffic, "SAMPLES", (4, 8))
    traffic.main([*command, "8"])
    assert json.loads(capsys.readouterr().out)["gigabytes"] == pytest.approx(eight["gigabytes"], rel=1e-7)
