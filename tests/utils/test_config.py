import os
from dataclasses import dataclass, field
from typing import Literal

import pytest

from fourm.utils.config import build, load_yaml, parse_value
from fourm.utils.errors import UserError
from fourm.utils.options import option


@dataclass
class Toy:
    rate: float
    size: int = 3
    kind: Literal["a", "b"] = "a"
    betas: tuple[float, float] = (0.9, 0.95)
    limit: float | None = None
    flags: dict = field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("10_000_000", 10_000_000), ("2.5E3", 2500.0), ("-1", -1), ("rgb@224", "rgb@224"), ("null", None)]
    + [
        ("1-2", "1-2"),
        ("true", True),
        (".5", 0.5),
        ("[1e-3, 2]", [1e-3, 2]),
        ("{dim: 64}", {"dim": 64}),
        ("a: b: c", "a: b: c"),
    ],
)
def test_scalars_mean_what_a_researcher_types(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_yaml_numbers_in_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("blr: 1e-4\nepoch_size: 10_000_000\nname: 4m-b_mod7\n")
    assert load_yaml(tmp_path / "c.yaml") == {"blr": 1e-4, "epoch_size": 10_000_000, "name": "4m-b_mod7"}


@pytest.mark.parametrize(
    ("content", "words"), [("a: [1", "not valid YAML"), ("- 1", "mapping"), (None, "No such file")]
)
def test_a_bad_file_is_named(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as error:
        load_yaml(path)
    assert "bad.yaml" in str(error.value)


def test_build_converts_without_loss():
    toy = build(Toy, {"rate": 1, "size": 4.0, "betas": [0, "0.5"], "limit": "1e-2"}, "f.yaml")
    assert toy == Toy(rate=1.0, size=4, betas=(0.0, 0.5), limit=0.01)
    assert isinstance(toy.rate, float) and isinstance(toy.size, int)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"rate": 1, "sise": 2}, r"f.yaml: unknown key 'sise' \(did you mean 'size'\?\)"),
        ({"size": 2}, "'rate' is required"),
        ({"rate": "fast"}, "'rate' must be a number, not 'fast'"),
        ({"rate": 1, "size": 2.5}, "'size' must be a whole number"),
        ({"rate": 1, "size": True}, "'size' must be a whole number"),
        ({"rate": 1, "kind": "c"}, "'kind' must be one of 'a', 'b'"),
        ({"rate": 1, "betas": 3}, "'betas' must be a list"),
        ({"rate": 1, "flags": 3}, "'flags' must be a mapping"),
    ],
)
def test_build_names_the_file_and_the_key(mapping, message):
    with pytest.raises(UserError, match=message):
        build(Toy, mapping, "f.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is already set in line 1"),
        ("a: ü".encode("utf-16"), "not text in UTF-8"),
        ("a: ü".encode("latin-1"), "not text in UTF-8"),
        (b"a: \x07\n", "special characters"),
        (b"[" * 5000, "nested more than 100 levels deep"),
        (
            b"a: &a [1]\n"
            + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 10)) for c in range(98, 110)),
            "aliases",
        ),
        (b"a: &a [*a]\n", "contains itself"),
        (b"a: !!timestamp 2024-13-45\n", "timestamp"),
        (b"a: !!bool x\n", "not valid YAML"),
        (b"a: !!int ''\n", "not valid YAML"),
        (b"a: !!set {b}\n", "constructor"),
        (b"a: !!python/object/apply:os.getcwd []\n", "constructor"),
        (b"- 1\n", "mapping"),
    ],
)
def test_untrusted_yaml_fails_with_one_sentence_that_names_the_file(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_yaml(tmp_path / "bad.yaml")
    assert "bad.yaml" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_paths_that_are_not_regular_files_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, message in (("pipe.yaml", "not a regular file"), ("", "is a folder")):
        with pytest.raises(UserError, match=message):
            load_yaml(tmp_path / name)


def test_dates_stay_text_and_no_command_line_value_causes_a_traceback(tmp_path):
    (tmp_path / "c.yaml").write_text("run_name: 2024-01-31\n")
    assert load_yaml(tmp_path / "c.yaml") == {"run_name": "2024-01-31"}
    assert parse_value("{a: 2024-13-45}") == {"a": "2024-13-45"}
    for text in ("!!bool x", "{a: 1, a: 2}", "[" * 5000, "a: !!int ''"):
        assert parse_value(text) == text


@dataclass
class Ranged:
    rate: float | None = option("rate", None, above=0, at_most=1)
    betas: tuple[float, float] = option("betas", (0.9, 0.95), at_least=0, below=1)
    epochs: int = option("epochs", -1, at_least=0, unset=-1)
    name: str = option("name", "auto")
    free: dict = option("any values", {})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"rate": 0}, "f.yaml: 'rate' must be above 0 and at most 1, not 0.0"),
        ({"betas": [0.9, 1]}, "'betas' must be at least 0 and below 1, not 1.0"),
        ({"epochs": -2}, "'epochs' must be at least 0, or -1 for none, not -2"),
        ({"rate": float("nan")}, "'rate' must be a finite number"),
        ({"rate": "1e999"}, "'rate' must be a finite number"),
        ({"rate": 10**400}, "'rate' must be a number"),
        ({"free": {"a": [float("inf")]}}, "'free': a must be a finite number"),
        ({"free": {None: 1}}, "'free': keys must be text, not None"),
    ],
)
def test_numbers_are_checked_against_their_declared_range(mapping, message):
    with pytest.raises(UserError, match=message):
        build(Ranged, mapping, "f.yaml")


def test_null_and_empty_text_count_as_not_set():
    assert build(Ranged, {"name": None, "free": None, "rate": None, "epochs": -1}, "f.yaml") == Ranged()
    assert build(Ranged, {"name": ""}, "f.yaml").name == "auto"
