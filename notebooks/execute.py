"""Execute a notebook in place: python notebooks/execute.py --notebook notebooks/generation.ipynb

The output depends only on the notebook and on the files that it reads: it contains no times, no versions and nothing
about the machine, such as the paths in warnings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fourm.utils.dependencies import optional_import
from fourm.utils.errors import run_cli
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
    output: str | None = option("file for the executed notebook (default: replace it)", None)


def execute(options: ExecuteOptions) -> None:
    """Run all cells in the notebook's folder, and write the executed notebook.

    Raises:
        CellExecutionError: If a cell fails; nothing is written then.
    """
    with optional_import("nbclient ipykernel", "executing notebooks"):
        import nbformat
        from nbclient import NotebookClient
        from traitlets.config import Config
    path = Path(options.notebook)
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as sockets:  # instead of ports, which other users may occupy or listen to
        config = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        folder = {"metadata": {"path": str(path.parent)}}
        NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            record_timing=False,
            resources=folder,
            config=config,
            coalesce_streams=True,  # otherwise it is a matter of time how many outputs the lines of a cell are
        ).execute()
    notebook.metadata = METADATA
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    with atomic_path(options.output or path) as target:
        nbformat.write(notebook, target)


if __name__ == "__main__":
    run_cli(lambda: execute(parse_options(ExecuteOptions, None, "Execute a notebook.")))
