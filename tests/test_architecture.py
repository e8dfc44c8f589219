"""The architecture: imports run in one direction, without cycles, and every module can be imported on its own."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import fourm

ROOT = Path(fourm.__file__).parent
REPOSITORY = Path(__file__).parents[1]
LAYER = {"utils": 0, "data": 1, "models": 2, "vq": 3, "generation": 4, "train": 4, "tools": 5, "demo": 6, "app": 7}
PUBLISHED_PATHS = {"fourm.models.generate", "fourm.utils.plotting_utils", "fourm.demo_4M_sampler"}
"""Import paths that users type, in lower layers than the modules whose names they provide."""
COMMANDS_THAT_MOVED = {"fourm.data.check", "fourm.data.pack", "fourm.data.preview"}
"""Modules that users run with ``python -m``, whose commands are in ``fourm.tools``."""
ALIASES = PUBLISHED_PATHS | COMMANDS_THAT_MOVED
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "fourm.") if not m.name.endswith("__main__"))


def _file(module: str) -> Path:
    path = ROOT.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imported_names(path: Path) -> set[str]:
    """The modules that a file imports, also inside functions, and the names that it imports from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(node.module)
    return found


def _imports(module: str) -> set[str]:
    """The project's modules that ``module`` imports."""
    return {name for name in _imported_names(_file(module)) if name in MODULES and name != module}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module):
    importlib.import_module(module)


@pytest.mark.parametrize("module", [m for m in MODULES if m.count(".") > 1 or m.split(".")[1] in LAYER])
def test_imports_never_run_upwards(module):
    package = module.split(".")[1]
    for imported in _imports(module) if module not in ALIASES else ():
        other = imported.split(".")[1]
        assert package == other or LAYER[other] < LAYER[package], (
            f"{module} imports {imported}: an upward or sideways import"
        )


@pytest.mark.parametrize("module", sorted(ALIASES))
def test_an_alias_contains_only_a_docstring_imports_and_their_names(module):
    docstring, *body = ast.parse(_file(module).read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    if module in COMMANDS_THAT_MOVED:
        assert ast.unparse(body.pop()) == "if __name__ == '__main__':\n    run_cli(main)"
    *imports, names = body
    assert all(isinstance(statement, ast.ImportFrom) for statement in imports)
    assert isinstance(names, ast.Assign) and ast.unparse(names.targets[0]) == "__all__"
    imported = {alias.name for statement in imports for alias in statement.names}
    assert imported - {"run_cli"} == set(ast.literal_eval(names.value))


def test_nothing_inside_the_project_imports_an_alias():
    folders = (ROOT, REPOSITORY / "benchmarks")
    for path in [*(path for folder in folders for path in folder.rglob("*.py")), *REPOSITORY.glob("*.py")]:
        assert not _imported_names(path) & ALIASES, path


def test_the_published_names_of_generation_are_those_of_its_package():
    published = importlib.import_module("fourm.models.generate")
    assert set(published.__all__) == {
        "GenerationSampler",
        "build_chained_generation_schedules",
        "custom_text",
        "expand_to_batch",
        "init_empty_target_modality",
        "init_full_input_modality",
    }
    assert {getattr(published, name).__module__.rpartition(".")[0] for name in published.__all__} == {
        "fourm.generation"
    }


def test_imports_have_no_cycles():
    # An __init__ only re-exports names; what matters is which files need each other.
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
