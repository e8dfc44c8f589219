"""The shipped notebooks are executed and small, contain nothing about the machine, and run on another model."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.generation.test_readme import write_demo
from tests.warm_python import warm_python

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "generation.ipynb"
FIGURES = ["rgb-to-all", "caption-to-all", "chain", "guidance-sweep", "edit"]


def figures(path):
    """Return the ids of the cells that display a picture."""
    cells = json.loads(path.read_text())["cells"]
    return [cell["id"] for cell in cells if any("image/png" in o.get("data", ()) for o in cell.get("outputs", ()))]


def test_the_shipped_notebook_has_its_figures_and_nothing_about_the_machine():
    assert figures(NOTEBOOK) == FIGURES
    assert NOTEBOOK.stat().st_size < 1_500_000
    content = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert all(not cell["metadata"] for cell in content["cells"])
    assert content["metadata"].keys() == {"kernelspec", "language_info"}
    texts = [output.get("text", "") for cell in code for output in cell["outputs"]]
    assert not any("/" in line for text in texts for line in text)


@pytest.mark.slow
def test_the_notebook_runs_on_a_toy_model(tmp_path):
    demo, out = write_demo(tmp_path), tmp_path / "executed.ipynb"
    command = [warm_python(), "notebooks/execute.py", "--notebook", str(NOTEBOOK), "--output", str(out)]
    environment = os.environ | {"FOURM_DEMO": str(demo), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert figures(out) == FIGURES
    sources = [[cell["source"] for cell in json.loads(path.read_text())["cells"]] for path in (NOTEBOOK, out)]
    assert sources[0] == sources[1]
