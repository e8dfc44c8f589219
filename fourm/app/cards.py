"""Shows results as HTML: a card per modality. Everything that users or models wrote is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fourm.generation.decoding import CLASSES, Decoded
from fourm.generation.plotting import as_image, class_colors, titles_of
from fourm.generation.sampler import Result
from fourm.tools.preview.page import data_uri

_MAX_TEXT = 2000  # characters of a value that is shown as JSON


def escape(text: Any) -> str:
    """Escape a text for HTML and for the templates of the interface, in which braces and ``$`` have a meaning."""
    return html.escape(str(text)).translate({ord(c): f"&#{ord(c)};" for c in "{}$`"})


def samples(
    results: Sequence[Result],
    given: Sequence[str],
    targets: Sequence[str],
    seeds: Sequence[int] = (),
    running: str | None = None,
    editable: Collection[str] = (),
) -> str:
    """Render results: the inputs once, then the targets of each sample.

    Args:
        results: The samples.
        given: Names of the inputs.
        targets: Names of the targets, also of those that have not been generated yet.
        seeds: Seed of each sample.
        running: The target that is being generated.
        editable: Names of images with a button to edit them.
    """
    if not results:
        return '<p class="empty">Drop a picture or type a caption, and choose what to generate.</p>'
    first = results[0]
    rows = [_row("Given", [n for n in given if n in first], 0, first, None, ())]
    for index, result in enumerate(results):
        names = [*(n for n in targets if n not in given), *(n for n in result if n not in (*targets, *given))]
        title = f"Sample {index + 1}" + (f" · seed {seeds[index]}" if index < len(seeds) else "")
        rows.append(_row(title, names, index, result, running, editable))
    return "".join(rows)


def _row(
    title: str, names: Sequence[str], sample: int, result: Result, running: str | None, editable: Collection[str]
) -> str:
    if not names:
        return ""
    cards = []
    for name, short in zip(names, titles_of(names), strict=True):
        edit = (
            f'<button type="button" class="edit" data-modality="{escape(name)}" data-sample="{sample}">edit</button>'
            if name in editable
            else ""
        )
        state = " running" if name == running else "" if name in result else " pending"
        body = _body(result[name], result) if name in result else '<div class="picture"></div>'
        cards.append(
            f'<figure class="card{state}" data-name="{escape(name)}"><figcaption title="{escape(name)}">'
            f"<span>{escape(short)}</span>{edit}</figcaption>{body}</figure>"
        )
    return f'<section><h3>{escape(title)}</h3><div class="cards">{"".join(cards)}</div></section>'


def picture(image: np.ndarray, label: str, overlay: str = "") -> str:
    """Render a picture (H, W, 3); small ones are enlarged without smoothing."""
    sharp = " sharp" if min(image.shape[:2]) < 100 else ""
    return f'<div class="picture{sharp}"><img src="{data_uri(image)}" alt="{escape(label)}">{overlay}</div>'


def _body(decoded: Decoded, result: Mapping[str, Decoded]) -> str:
    image = as_image(decoded)
    if image is not None:
        content = picture(image, decoded.kind) + (_legend(decoded) if decoded.kind in CLASSES else "")
    else:
        content = _RENDERERS.get(decoded.kind, _json)(decoded.value, result)
    unit, state = ("token", "missing") if image is not None else ("word", "left out")
    count = decoded.dropped
    note = f'<p class="note">{count} {unit}{"s" if count > 1 else ""} {state}</p>' if count else ""
    return content + note


def _legend(decoded: Decoded) -> str:
    ids = np.unique(decoded.value[decoded.value >= 0]).tolist()
    colors = class_colors(max(ids, default=0) + 1)
    entries = (
        f'<span><i style="background: rgb{tuple(colors[index].tolist())}"></i>'
        f"{escape(decoded.names[index] if index < len(decoded.names) else f'class {index}')}</span>"
        for index in ids
    )
    return f'<p class="legend">{"".join(entries)}</p>'


def _caption(text: str, result: Mapping[str, Decoded]) -> str:
    return f"<blockquote>{escape(text) or '(nothing)'}</blockquote>"


def _boxes(boxes: list[dict[str, Any]], result: Mapping[str, Decoded]) -> str:
    """Draw boxes on the faded picture of the sample, in the colours of its segmentation."""
    classes = next((other.names for other in result.values() if other.names), ("",))  # grey is the first colour
    names = [*classes, *sorted({box["class_name"] for box in boxes}.difference(classes))]
    colors = class_colors(len(names))
    drawn, labels = [], []
    for box in boxes:
        color = f"rgb{tuple(colors[names.index(box['class_name'])].tolist())}"
        xmin, ymin, xmax, ymax = (100 * corner for corner in box["boxes"])
        drawn.append(
            f'<rect x="{xmin:.1f}" y="{ymin:.1f}" width="{xmax - xmin:.1f}" height="{ymax - ymin:.1f}" fill="none" '
            f'stroke="{color}" stroke-width="1.6"/>'
        )
        labels.append(f'<span><i style="background: {color}"></i>{escape(box["class_name"])}</span>')
    overlay = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{"".join(drawn)}</svg>'
    legend = f'<p class="legend">{"".join(dict.fromkeys(labels))}</p>'
    return picture(_background(result), "boxes", overlay) + (legend if boxes else '<p class="note">no boxes</p>')


def _background(result: Mapping[str, Decoded]) -> np.ndarray:
    for other in result.values():
        image = as_image(other) if other.kind == "rgb" else None
        if image is not None:
            return (255 - (255 - image.astype(float)) * 0.6).round().astype(np.uint8)
    return np.full((100, 100, 3), 243, np.uint8)


def _palette(colors: list[list[int]], result: Mapping[str, Decoded]) -> str:
    swatches = (
        f'<i style="background: rgb{tuple(color)}" title="#{"".join(f"{c:02x}" for c in color)}"></i>'
        for color in colors
    )
    return f'<div class="swatches">{"".join(swatches)}</div>' if colors else '<p class="note">no colours</p>'


def _metadata(values: Mapping[str, float], result: Mapping[str, Decoded]) -> str:
    rows = (f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{value:.4g}</td></tr>" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>"


def _json(value: Any, result: Mapping[str, Decoded]) -> str:
    text = f"{' × '.join(map(str, value.shape))} numbers" if isinstance(value, np.ndarray) else json.dumps(value)
    return f"<pre>{escape(text[:_MAX_TEXT])}{' …' if len(text) > _MAX_TEXT else ''}</pre>"


_RENDERERS: dict[str, Callable[[Any, Mapping[str, Decoded]], str]] = {
    "caption": _caption,
    "det": _boxes,
    "color_palette": _palette,
    "metadata": _metadata,
}
"""Maps each kind that is not a picture to the function that renders it; the others are shown as JSON."""
