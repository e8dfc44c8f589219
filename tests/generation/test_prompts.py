"""Files of prompts as editors and spreadsheets of all kinds save them."""

import pytest

from fourm.generation.prompts import read_prompts
from fourm.utils.errors import UserError


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_prompt_ends_where_its_line_does_and_nowhere_else(tmp_path, mark, newline):
    inner = "\u2028\u2029\x85\x0b\x0c\x1c\r"  # str.splitlines() takes each of them for the end of a line
    prompts = [f"a red{character}cup" for character in inner] + ["ein grüner Ärmel", "日本"]
    (tmp_path / "prompts.txt").write_bytes((mark + newline.join([*prompts, "", " "])).encode())
    assert read_prompts(tmp_path / "prompts.txt") == prompts


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
def test_another_encoding_is_refused_with_the_first_line_that_shows_it(tmp_path, encoding):
    (tmp_path / "prompts.txt").write_bytes("a red cup\nein grüner Ärmel\n".encode(encoding))
    line = 1 if encoding == "utf-16" else 2
    with pytest.raises(
        UserError, match=f"data: {tmp_path}/prompts.txt, line {line}: this is not UTF-8 text; save the file"
    ):
        read_prompts(tmp_path / "prompts.txt")
