from dataclasses import dataclass, field
from typing import Literal

import pytest

from fourm.utils.config import build, load_yaml, parse_value
from fourm.utils.errors import UserError


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
    + [("1-2", "1-2"), ("true", True), (".5", 0.5), ("[1e-3, 2]", [1e-3, 2]), ("{dim: 64}", {"dim": 64}), ("a: b: c", "a: b: c")],
)  # fmt: skip
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
