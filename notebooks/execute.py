"""Execute a notebook in place: python notebooks/execute.py --notebook notebooks/generation.ipynb

What is written depends on the notebook and on what it reads alone: it holds no times, no versions, and nothing of the
machine, such as the folders that warnings name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fourm.utils.errors import MissingDependency, run_cli
from fourm.utils.files import atomic_path
from fourm.utils.options import option, parse_options

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


@dataclass(frozen=True)
class ExecuteOptions:
    """The command line."""

    notebook: str = option("the .ipynb file")
    output: str | None = option("where the executed one goes (default: in its place)", None)


def execute(options: ExecuteOptions) -> None:
    """Run all cells, from the notebook's folder.

    Raises:
        CellExecutionError: a cell failed; nothing is written.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from traitlets.config import Config
    except ImportError as error:
        raise MissingDependency("nbclient ipykernel", "executing notebooks") from error
    path = Path(options.notebook)
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as sockets:  # rather than ports, which others may have or listen to
        config = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        folder = {"metadata": {"path": str(path.parent)}}
        NotebookClient(
            notebook, timeout=1200, kernel_name="python3", record_timing=False, resources=folder, config=config
        ).execute()
    notebook.metadata = METADATA
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    with atomic_path(options.output or path) as target:
        nbformat.write(notebook, target)


if __name__ == "__main__":
    run_cli(lambda: execute(parse_options(ExecuteOptions, None, "Execute a notebook.")))
