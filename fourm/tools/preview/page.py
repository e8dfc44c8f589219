"""Write a preview as one HTML file with embedded pictures and SVG drawings, without scripts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from fourm.tools.preview.samples import Component, Example, MaskedModality, Preview
from fourm.tools.preview.sequences import Annotation, Piece
from fourm.utils.urls import redact_url

INPUT, TARGET, UNUSED, NEITHER = "#2563eb", "#ea580c", "#ffffff", "#9ca3af"
BINS = 24
PAGE_START = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Preview of '
"""The start of every page, by which a preview is recognised."""

_STYLE = f"""
:root {{ --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --paper: #ffffff; --input: {INPUT}; --target: {TARGET}; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 40px 32px 64px; max-width: 1480px; color: var(--ink); background: #f8fafc;
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 26px; font-weight: 650; letter-spacing: -0.02em; margin: 0 0 4px; }}
h2 {{ font-size: 19px; font-weight: 600; letter-spacing: -0.01em; margin: 44px 0 2px; }}
h3 {{ font-size: 15px; font-weight: 600; margin: 32px 0 10px; }}
.soft {{ overflow-wrap: anywhere; }} h3 small, .soft {{ color: var(--soft); font-weight: 400; font-size: 13px; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 14px 0 0; padding: 0; list-style: none; font-size: 13px; }}
.legend i {{ display: inline-block; width: 14px; height: 14px; border-radius: 3px; vertical-align: -2px; margin-right: 7px; }}
.card {{ background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px 16px; margin: 0 0 12px; }}
.card > header {{ display: flex; justify-content: space-between; gap: 16px; font-size: 12.5px; color: var(--soft); margin-bottom: 10px; }}
.card > header b {{ color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); gap: 14px 12px; align-items: start; grid-auto-flow: dense; }}
.text {{ grid-column: span 2; }} .wide {{ grid-column: span 3; }}
.beside {{ display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 2fr); gap: 12px; align-items: start; }}
figure {{ margin: 0; min-width: 0; }}
figcaption {{ display: flex; justify-content: space-between; gap: 5px; font-size: 11.5px; line-height: 18px; margin-bottom: 4px; white-space: nowrap; }}
figcaption span:first-child {{ overflow: hidden; text-overflow: ellipsis; font-weight: 500; }}
.in {{ color: var(--input); }} .out {{ color: var(--target); }}
.n {{ font-variant-numeric: tabular-nums; }}
.picture {{ aspect-ratio: 1; background-size: 100% 100%; border-radius: 5px; overflow: hidden; box-shadow: 0 0 0 1px var(--line); }}
.picture svg {{ display: block; width: 100%; height: 100%; }}
.boxes text {{ font-size: 7.5px; font-weight: 600; paint-order: stroke; stroke: #fff; stroke-width: 2px; }}
.picture:hover svg {{ opacity: 0; }}
.words {{ line-height: 1.75; font-size: 12.5px; overflow: auto; overflow-wrap: anywhere; max-height: 10.5em; }}
.words span {{ border-radius: 3px; padding: 1px 2px; }}
.input {{ background: #dbeafe; color: #1e40af; }} .target {{ background: #ffedd5; color: #9a3412; }}
.input.target {{ background: linear-gradient(#dbeafe 50%, #ffedd5 50%); }} .mark, .unused {{ color: #9ca3af; }}
.words .mark {{ font-size: 10.5px; padding: 0 1px; }}
.swatches {{ display: flex; gap: 6px; margin: 3px 2px 9px; }} .swatches i {{ flex: 1; height: 30px; border-radius: 4px; }}
.values {{ columns: 2; column-gap: 14px; margin-bottom: 8px; font-size: 12px; line-height: 18px; }}
.values div {{ display: flex; justify-content: space-between; gap: 8px; padding: 0 4px; border-bottom: 1px solid #fff; border-radius: 3px;
  break-inside: avoid; white-space: nowrap; }} .values div span:first-child {{ overflow: hidden; text-overflow: ellipsis; }}
.scroll {{ overflow-x: auto; padding-bottom: 6px; }}
table {{ border-collapse: collapse; font-size: 12.5px; }}
th {{ text-align: left; font-weight: 500; padding: 6px 20px 6px 0; vertical-align: middle; }}
table {{ width: 100%; }} thead th {{ color: var(--soft); font-weight: 400; white-space: nowrap; }} thead b {{ color: var(--ink); font-weight: 600; }}
td {{ padding: 7px 20px 7px 0; vertical-align: top; }} tbody tr {{ border-top: 1px solid var(--line); }}
td svg {{ display: block; }} td .n {{ font-size: 11.5px; line-height: 16px; white-space: nowrap; }}
footer {{ margin-top: 40px; color: var(--soft); font-size: 12.5px; }}
"""


def page(title: str, previews: Sequence[Preview]) -> str:
    """Return the content of the file."""
    styles, bodies = [_STYLE], []
    for number, preview in enumerate(previews):
        for i, example in enumerate(preview.examples):
            for j, picture in enumerate(example.pictures.values()):
                # All components show the same pictures, so each picture is embedded only once.
                styles.append(f".p{number}-{i}-{j} {{ background-image: url({data_uri(picture)}); {_sharp(picture)}}}")
        bodies.append(_dataset(preview, number))
    legend = "".join(
        f'<li><i style="{style}"></i>{text}</li>'
        for style, text in (
            (f"background: #dbeafe; box-shadow: inset 0 0 0 2px {INPUT}", "input: the model sees it"),
            (f"background: {TARGET}99", "target: the model predicts it"),
            ("background: #f3f4f6; box-shadow: inset 0 0 0 1px #d1d5db", "neither in this sample"),
        )
    )
    return (
        f"{PAGE_START}{escape(title)}</title>"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{"".join(styles)}</style>'
        f"<body><h1>{escape(title)}</h1>"
        '<div class="soft">What training sees: samples after cropping, flipping and masking. '
        "Point at a picture to see it without its mask.</div>"
        f'<ul class="legend">{legend}</ul>{"".join(bodies)}</body></html>\n'
    )


def data_uri(picture: np.ndarray) -> str:
    """Encode a picture as a data URI: small ones as PNG, larger ones as JPEG."""
    image_format, options = ("PNG", {}) if min(picture.shape[:2]) <= 64 else ("JPEG", {"quality": 90})
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, image_format, **options)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _sharp(picture: np.ndarray) -> str:
    return "image-rendering: pixelated; " if min(picture.shape[:2]) < 100 else ""


def _dataset(preview: Preview, number: int) -> str:
    dataset = preview.dataset
    ranges = " and ".join(
        f"{low}–{high} {role}" if low < high else f"{high} {role}"
        for (low, high), role in ((dataset.input_tokens_range, "input"), (dataset.target_tokens_range, "target"))
    )
    count = len(preview.components)
    limits = f"at most {ranges} tokens per sample; {count} component{'s' if count > 1 else ''} in its mixture"
    if dataset.masking == "transfer":
        limits = "transfer: all of in_domains is input, all of out_domains is target"
    parts = [
        f'<h2>{escape(dataset.name)}</h2><div class="soft">{escape(redact_url(dataset.data_path))}<br>{limits}</div>',
        _budgets(preview),
    ]
    for component in preview.components:
        parts.append(
            f"<h3>Component {component.index + 1} <small>{component.share:.0%} of the samples; the same samples and "
            "crops under each component</small></h3>"
        )
        for i, (example, masked) in enumerate(zip(preview.examples, component.masked_samples, strict=True)):
            parts.append(_sample(example, masked, f"p{number}-{i}"))
    return "".join(parts)


def _sample(example: Example, masked: dict[str, MaskedModality], picture: str) -> str:
    inputs = sum(entry.inputs for entry in masked.values())
    targets = sum(entry.targets for entry in masked.values())
    classes = {name: f"{picture}-{j}" for j, name in enumerate(example.pictures)}
    # Pictures come first because sequences are wider.
    tiles = [
        _tile(name, entry, classes.get((example.main or "") if entry.grid is None else name, ""))
        for name, entry in sorted(masked.items(), key=lambda item: item[1].grid is None)
    ]
    return (
        f'<section class="card"><header><b>{escape(example.key)}</b><span class="n"><span class="in">{inputs} input</span>'
        f' · <span class="out">{targets} target</span></span></header><div class="tiles">{"".join(tiles)}</div></section>'
    )


def _tile(name: str, entry: MaskedModality, picture: str) -> str:
    """Render one modality.

    Args:
        name: Name of the modality.
        entry: The masked modality.
        picture: CSS class of its picture, or of the picture that its boxes refer to.
    """
    counts = [f'<span class="in">{entry.inputs}</span>'] if entry.inputs else []
    counts += [f'<span class="out">{entry.targets}</span>'] if entry.targets else []
    caption = f'<figcaption title="{escape(name)}"><span>{escape(name)}</span><span class="n">{" ".join(counts)}</span></figcaption>'
    frame = f'<div class="picture {picture}" role="img" aria-label="{escape(name)}">'
    if entry.grid is not None:
        return f"<figure>{caption}{frame}{overlay(entry.grid)}</div></figure>"
    words = f'<div class="words">{_words(entry.pieces)}</div>' if entry.pieces else ""
    if any(annotation.boxes or annotation.point for annotation in entry.annotations):
        return f'<figure class="wide">{caption}<div class="beside">{frame}{_boxes(entry.annotations)}</div>{words}</div></figure>'
    values = _values(entry.annotations)
    return f'<figure class="{"wide" if values else "text"}">{caption}{_swatches(entry.annotations)}{values}{words}</figure>'


def outlines(annotation: Annotation) -> list[str]:
    """Return the colours of an annotation's outlines, one for each role of its tokens."""
    return [{"input": INPUT, "target": TARGET}[role] for role in annotation.roles] or [NEITHER]


def _boxes(annotations: Sequence[Annotation]) -> str:
    """Render boxes and points on the faded picture, with nested outlines if tokens are both input and target."""
    drawn = ['<rect width="100" height="100" fill="#fff" fill-opacity=".35"/>']
    for annotation in annotations:
        for xmin, ymin, xmax, ymax in annotation.boxes:
            for i, color in enumerate(outlines(annotation)):
                x, y, width, height = 100 * xmin + 2 * i, 100 * ymin + 2 * i, 100 * (xmax - xmin), 100 * (ymax - ymin)
                size = f'width="{max(width - 4 * i, 0):.1f}" height="{max(height - 4 * i, 0):.1f}"'
                drawn.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="none" stroke="{color}" stroke-width="2"/>')
            drawn.append(
                f'<text x="{100 * xmin + 3:.1f}" y="{100 * ymin + 9:.1f}" fill="{outlines(annotation)[-1]}">{escape(annotation.label)}</text>'
            )
        if annotation.point:
            x, y = annotation.point
            drawn += [
                f'<circle cx="{100 * x:.1f}" cy="{100 * y:.1f}" r="{3 - 1.5 * i}" fill="{color}"/>'
                for i, color in enumerate(outlines(annotation))
            ]
    return f'<svg class="boxes" viewBox="0 0 100 100" preserveAspectRatio="none">{"".join(drawn)}</svg>'


def _swatches(annotations: Sequence[Annotation]) -> str:
    swatches = []
    for annotation in annotations:
        if annotation.color:
            rings = [f"0 0 0 {2 + 2 * i}px {color}" for i, color in enumerate(outlines(annotation))]
            swatches.append(f'<i style="background: rgb{annotation.color}; box-shadow: {", ".join(rings)}"></i>')
    return f'<div class="swatches">{"".join(swatches)}</div>' if swatches else ""


def _values(annotations: Sequence[Annotation]) -> str:
    lines = [
        f'<div class="{" ".join(annotation.roles) or "unused"}"><span>{escape(annotation.label)}</span><span class="n">{annotation.value}</span></div>'
        for annotation in annotations
        if annotation.value
    ]
    return f'<div class="values">{"".join(lines)}</div>' if lines else ""


def overlay(grid: np.ndarray) -> str:
    """Render a unit square per token: outlined for inputs, tinted for targets, faded for the rest."""
    height, width = grid.shape
    squares = {role: "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(grid == role)) for role in range(3)}
    line = max(height, width) / 110
    styles = {
        0: f'fill="{UNUSED}" fill-opacity=".82"',
        2: f'fill="{TARGET}" fill-opacity=".42" stroke="{TARGET}" stroke-width="{line:.3f}"',
        1: f'fill="none" stroke="{INPUT}" stroke-width="{line:.3f}"',
    }
    paths = "".join(f'<path d="{squares[role]}" {style}/>' for role, style in styles.items() if squares[role])
    return f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{paths}</svg>'


def _words(pieces: Sequence[Piece]) -> str:
    """Render tokens; adjacent tokens of one role share a span, and the parts of a word are joined."""
    html, role = [], ""
    for piece in pieces:
        text = piece.text.removeprefix("##")
        space = "" if piece.text.startswith("##") else " "
        if piece.role != role:
            html.append(f'{"</span>" if role else ""}{space}<span class="{piece.role}">{escape(text)}')
        else:
            html.append(f"{space}{escape(text)}")
        role = piece.role
    return "".join(html) + "</span>"


def _budgets(preview: Preview) -> str:
    """Render a table of budgets with a row per modality and a column per component."""
    draws = len(next(iter((preview.components[0].input_budgets | preview.components[0].target_budgets).values())))
    head = "".join(f"<th><b>Component {c.index + 1}</b> {c.share:.0%} of the samples</th>" for c in preview.components)
    rows = []
    for name, limit in budget_limits(preview).items():
        cells = "".join(f"<td>{_histogram(component, name, limit)}</td>" for component in preview.components)
        rows.append(f'<tr><th>{escape(name)}<div class="soft n">0 to {limit} tokens</div></th>{cells}</tr>')
    return (
        "<h3>Token budgets <small>how many tokens a sample may use, from "
        f'{draws:,} draws; <span class="in">input</span> upwards, <span class="out">target</span> downwards; '
        "pale: samples without any; heights are square roots of the share of samples</small></h3>"
        f'<div class="card scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def budget_limits(preview: Preview) -> dict[str, int]:
    """Return the maximum budget of each modality."""
    if preview.dataset.masking == "transfer":
        budgets = preview.components[0].input_budgets | preview.components[0].target_budgets
        return {name: int(budgets[name].max()) for name in preview.dataset.modalities}
    limit = max(preview.dataset.input_tokens_range[1], preview.dataset.target_tokens_range[1])
    return {name: min(m.max_tokens or limit, limit) for name, m in preview.dataset.modalities.items()}


def bins(budgets: np.ndarray, limit: int) -> tuple[float, np.ndarray]:
    """Return the share of draws without any token, and the share of each bin of the others."""
    bin_width = math.ceil(limit / BINS)  # in whole tokens
    count = math.ceil(limit / bin_width)
    counts, _ = np.histogram(budgets[budgets > 0], count, (0.5, bin_width * count + 0.5))
    return float(np.mean(budgets == 0)), counts / len(budgets)


def _histogram(component: Component, name: str, limit: int) -> str:
    width, half, drawn, notes = 308, 24, [], []
    for budgets, color, sign, label in (
        (component.input_budgets.get(name), INPUT, -1, "in"),
        (component.target_budgets.get(name), TARGET, 1, "out"),
    ):
        if budgets is None:
            continue
        none, shares = bins(budgets, limit)
        step = (width - 20) / len(shares)
        bars = [
            (0.0, 16.0, none, 0.3),
            *((20 + i * step, step - 1, share, 1.0) for i, share in enumerate(shares.tolist())),
        ]
        for x, wide, share, opacity in bars:
            length = half * share**0.5
            if share:
                y = half + 1 - length if sign < 0 else half + 2
                drawn.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{length:.1f}" fill="{color}" opacity="{opacity}"/>'
                )
        mean = budgets.mean()
        notes.append(
            f'<span class="{label}">{"in" if label == "in" else "target"} mean {mean:.1f}, {none:.0%} none</span>'
        )
    axis = f'<rect x="0" y="{half + 1}" width="{width}" height="1" fill="#d1d5db"/>'
    return (
        f'<svg width="{width}" height="{2 * half + 3}">{"".join(drawn)}{axis}</svg>'
        f'<div class="n">{" · ".join(notes)}</div>'
    )
