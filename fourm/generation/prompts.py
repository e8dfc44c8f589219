"""Reads and checks prompts, given as a list, as a text file with one prompt per line, or as a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fourm.utils.errors import UserError

_NEWLINE = re.compile("\r?\n")  # str.splitlines would also split at other characters


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a file that are not blank.

    Raises:
        UserError: If the file is not UTF-8, a line is not valid text, or there are no prompts.
    """
    lines = _read_lines(path)
    return _not_empty([prompt for prompt in lines if prompt.strip()], f"data: {path}")


def read_prompt_table(path: Path) -> list[str]:
    """Return the column ``Prompt`` of a table with tabs between its columns, such as that of Parti Prompts.

    Raises:
        UserError: If there is no such column, or as of :func:`read_prompts`.
    """
    lines = [line.split("\t") for line in _read_lines(path)]
    header = [name.strip().lower() for name in lines[0]]
    if "prompt" not in header:
        raise UserError(
            f"data: {path} has no column Prompt; its first line must name the columns, with tabs between them"
        )
    column = header.index("prompt")
    prompts = [_unquoted(line[column]) for line in lines[1:] if len(line) > column]
    return _not_empty([prompt for prompt in prompts if prompt.strip()], f"data: {path}")


def _unquoted(field: str) -> str:
    """Remove the quotes of a field; quotes within it are doubled."""
    quoted = len(field) > 1 and field.startswith('"') and field.endswith('"')
    return field[1:-1].replace('""', '"') if quoted else field


def _read_lines(path: Path) -> list[str]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The positions of this codec do not count a byte order mark.
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"data: {path}, line {number}: this is not UTF-8 text; save the file as UTF-8") from error
    lines = _NEWLINE.split(text)
    for number, prompt in enumerate(lines, 1):
        _check(prompt, f"data: {path}, line {number}")
    return lines


def check_prompts(prompts: Sequence[Any], where: str) -> list[str]:
    """Return a list of prompts as strings.

    Raises:
        UserError: If the list is empty, or a prompt is empty or not valid text.
    """
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, (list, tuple, dict)) or prompt is None or not str(prompt).strip():
            problem = "empty" if prompt is None or isinstance(prompt, str) else "not a text"
            raise UserError(f"{where}: prompt {number} is {problem}")
        _check(str(prompt), f"{where}: prompt {number}")
    return _not_empty([str(prompt) for prompt in prompts], where)


def _check(prompt: str, where: str) -> None:
    if "\0" in prompt:
        raise UserError(f"{where}: the prompt contains a NUL character; remove it")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"{where}: the prompt contains half a character, such as half an emoji; write all of it")


def _not_empty(prompts: list[str], where: str) -> list[str]:
    if not prompts:
        raise UserError(f"{where}: there are no prompts")
    return prompts
