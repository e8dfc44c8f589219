"""Model cards: the ``README.md`` of a published model, and the facts about its training that weights files carry.

A training run writes the facts as JSON text into the header of ``model.safetensors``, under ``training``. So they stay
with the weights when a model is loaded, saved to another folder, or pushed to the hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

Tables = dict[str, list[dict[str, Any]]]
"""Title → rows; a row maps the name of a column to a text, a number, a truth value, None, or a list of texts."""
_HEADER_KEY = "training"
_MAX_CHARACTERS = 2**20  # of the facts in a file that somebody else wrote

TEMPLATE = """\
---
{{ card_data }}
---

# {{ model_name | default(title) }}

{{ summary }}

{{ tables }}

## How to load it

```python
{{ usage }}
```

The code is the library `fourm`, whose documents describe training, tokenizers and generation.
"""
"""The template of a card, in Jinja."""


def to_header(facts: Tables) -> dict[str, str]:
    """Return the entries that the header of a weights file has for these facts."""
    return {_HEADER_KEY: json.dumps(facts, ensure_ascii=False)} if facts else {}


def read_facts(weights: str | Path) -> Tables:
    """Read the facts about the training from a ``.safetensors`` file; there are none in a file of other software."""
    try:
        with safe_open(weights, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER_KEY, "")
        return checked_tables(json.loads(text)) if 0 < len(text) <= _MAX_CHARACTERS else {}
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}


def checked_tables(content: Any) -> Tables:
    """Return ``content`` if it has the form of :data:`Tables`, and otherwise no tables."""
    valid = isinstance(content, dict) and all(
        isinstance(rows, list) and all(isinstance(row, dict) and all(map(_is_cell, row.values())) for row in rows)
        for rows in content.values()
    )
    return content if valid else {}


def _is_cell(value: Any) -> bool:
    scalar = str, int, float, type(None)
    return isinstance(value, scalar) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def markdown(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Write tables in Markdown, each under its title; columns in which no row has a value are left out."""
    lines = []
    for title, rows in tables.items():
        columns = {name: None for row in rows for name, value in row.items() if value not in (None, "", [])}
        if columns:
            lines += [f"## {_text(title)}", "", _line(columns), _line("---" for _ in columns)]
            lines += [*(_line(row.get(name) for name in columns) for row in rows), ""]
    return "\n".join(lines).rstrip()


def _line(cells: Any) -> str:
    return f"| {' | '.join(map(_text, cells))} |"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    text = " ".join(str("" if value is None else value).split())
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(character, escaped)
    return text
