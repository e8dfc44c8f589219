"""The house plan: imports run one way, without circles, and every module imports on its own."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import fourm

ROOT = Path(fourm.__file__).parent
LAYER = {"utils": 0, "data": 1, "models": 2, "vq": 2, "train": 3, "generation": 3, "demo": 3}
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "fourm.") if not m.name.endswith("__main__"))


def _file(module: str) -> Path:
    path = ROOT.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(module: str) -> set[str]:
    """The project's modules that ``module`` imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(_file(module).read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(node.module)
    return {name for name in found if name in MODULES and name != module}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module):
    importlib.import_module(module)


@pytest.mark.parametrize("module", [m for m in MODULES if m.count(".") > 1 or m.split(".")[1] in LAYER])
def test_imports_never_run_upwards(module):
    package = module.split(".")[1]
    for imported in _imports(module):
        other = imported.split(".")[1]
        assert package == other or LAYER[other] < LAYER[package] or (package, other) == ("demo", "generation"), (
            f"{module} imports {imported}: an upward or sideways import"
        )


def test_imports_have_no_circle():
    # An __init__ hands names on; what counts is which files need each other.
    graph = {m: {i for i in _imports(m) if _file(i).name != "__init__.py"} for m in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_entry_scripts_may_import_everything_and_are_imported_by_nothing():
    # `python -m fourm.tools.preview` runs a __main__ file, a script like those in the repository's root.
    for module in MODULES:
        assert "__main__ import" not in _file(module).read_text(), f"{module} imports an entry script"
