"""The documents: links lead somewhere, and the files and names that they mention exist."""

import re
import shlex
from pathlib import Path

import pytest

from fourm.train.config import parse_args
from fourm.train.tasks.pretrain import Pretrain
from fourm.train.tasks.tokenizer import VQVAETraining

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CODE_BLOCK = re.compile(r"^```.*?^```", re.M | re.S)


def prose(path: Path) -> str:
    return CODE_BLOCK.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """What ``#…`` in a link may be: the headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def ids(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_every_link_leads_to_a_file_and_heading(document):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(document)):
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_every_file_of_the_repository_that_is_named_exists(document):
    named = re.findall(r"`((?:fourm|tests|benchmarks|cfgs|docs|notebooks)/[\w./@-]*)`", prose(document))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_maps_of_the_packages_name_files_that_exist():
    (tree,) = re.findall(r"^```\nfourm/\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    table = "".join(re.findall(r"^\| \[`\w+/`\]\(fourm/.*\n", contributing, re.M))
    for text, minimum in ((tree, 10), (table, 60)):
        folder, named = "", 0
        for line in text.splitlines():
            folder = next(iter(re.findall(r"^(?:  |\| \[`)(\w+/)", line)), folder)
            for name in re.findall(r"[\w]+\.py|(?<=[ `])(?:transforms|tokenizer|preview)/|tasks/\w+\.py", line):
                assert any((ROOT / "fourm" / place / name).exists() for place in (folder, "")), name
                named += 1
        assert named > minimum
    packages = {path.parent.name for path in (ROOT / "fourm").glob("*/__init__.py")}
    assert {*re.findall(r"^\| \[`(\w+)/`\]", table, re.M)} == packages


def test_the_walks_name_functions_that_exist():
    text = " ".join(prose(ROOT / "CONTRIBUTING.md").split())
    places = re.findall(r"`(fourm/[\w/]+\.py)`,? \(?((?:`[\w.]+`(?:, )?)+)", text)
    places += [
        (path, names) for names, path in re.findall(r"((?:`[\w.]+`(?: and )?)+) in \[?`(fourm/[\w/]+\.py)`", text)
    ]
    assert len(places) > 30
    for path, names in places:
        code = (ROOT / path).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"^ *(?:def|class) {part}\b|^{part}\b.*=", code, re.M), f"{path}: {name}"


TASKS = {"run_training_4m.py": Pretrain, "run_training_4m_fsdp.py": Pretrain, "run_training_vqvae.py": VQVAETraining}


def test_the_options_of_the_training_commands_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:python|torchrun .*) (run_training_\w+\.py) (.*)$", text, re.M)
    assert {script for script, _ in commands} == set(TASKS)
    for script, arguments in commands:
        parse_args(TASKS[script].config_class, shlex.split(arguments, comments=True))
