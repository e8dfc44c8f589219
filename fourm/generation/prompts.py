"""Prompts as people write them: a list, or a text file with one per line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fourm.utils.errors import UserError

_NEWLINE = re.compile("\r?\n")  # and none of the other characters at which str.splitlines splits


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank.

    Raises:
        UserError: it is not UTF-8, or none of its lines can be a prompt.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Positions of this codec do not count the mark at the beginning.
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"data: {path}, line {number}: this is not UTF-8 text; save the file as UTF-8") from error
    lines = _NEWLINE.split(text)
    for number, prompt in enumerate(lines, 1):
        _check(prompt, f"data: {path}, line {number}")
    return _some([prompt for prompt in lines if prompt.strip()], f"data: {path}")


def check_prompts(prompts: Sequence[Any], where: str) -> list[str]:
    """A list of prompts as strings.

    Raises:
        UserError: it is empty, or one of them is no text.
    """
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, (list, tuple, dict)) or prompt is None or not str(prompt).strip():
            shown = "empty" if prompt is None or isinstance(prompt, str) else "no text"
            raise UserError(f"{where}: prompt {number} is {shown}")
        _check(str(prompt), f"{where}: prompt {number}")
    return _some([str(prompt) for prompt in prompts], where)


def _check(prompt: str, where: str) -> None:
    if "\0" in prompt:
        raise UserError(f"{where}: there is a NUL character in it; a prompt is text")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"{where}: there is half a character in it, such as half an emoji; write the whole one")


def _some(prompts: list[str], where: str) -> list[str]:
    if not prompts:
        raise UserError(f"{where}: there are no prompts")
    return prompts
