"""A preview as one picture, for where no browser is: strips of text, histograms and samples under each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fourm.tools.preview.page import INPUT, TARGET, bins, budget_limits, outlines
from fourm.tools.preview.samples import Component, Example, Preview, Shown
from fourm.tools.preview.sequences import Part, Piece

_WIDTH, _MARGIN, _TILE, _GAP = 1400, 28, 120, 12
_INK, _SOFT, _LINE = "#1f2937", "#6b7280", "#e5e7eb"
_ROLES = {"input": ("#1e40af", "#dbeafe"), "target": ("#9a3412", "#ffedd5"), "mark": ("#9ca3af", None), "unused": ("#9ca3af", None)}  # fmt: skip
_Text = Sequence[tuple[str, str, int]]  # words, colour, size


def sheet(title: str, previews: Sequence[Preview]) -> Image.Image:
    """All of it, RGB."""
    legend = [("input  ", INPUT, 14), ("target  ", TARGET, 14), ("faded: neither", _SOFT, 14)]
    strips = [_words_strip([(title, _INK, 26)], 8), _words_strip(legend, 4)]
    for preview in previews:
        strips += [_words_strip([(preview.dataset.name, _INK, 20)], 24), _budgets(preview)]
        for component in preview.components:
            note = f"   {component.share:.0%} of the samples"
            strips.append(_words_strip([(f"Component {component.index + 1}", _INK, 16), (note, _SOFT, 14)], 18))
            strips += [
                _sample(example, shown) for example, shown in zip(preview.examples, component.shown, strict=True)
            ]
    image = Image.new("RGB", (_WIDTH, sum(strip.height for strip in strips) + 2 * _MARGIN), "white")
    top = _MARGIN
    for strip in strips:
        image.paste(strip, (0, top))
        top += strip.height
    return image


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _words_strip(texts: _Text, above: int) -> Image.Image:
    strip, draw = _strip(above + max(size for _, _, size in texts) + 10)
    _write(draw, (_MARGIN, strip.height - 8), texts)
    return strip


def _strip(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    strip = Image.new("RGB", (_WIDTH, height), "white")
    return strip, ImageDraw.Draw(strip)


def _write(draw: ImageDraw.ImageDraw, at: tuple[float, float], texts: _Text, right: bool = False) -> None:
    """On a base line, from ``at`` on or up to it."""
    x, y = at
    if right:
        x -= sum(_font(size).getlength(text) for text, _, size in texts)
    for text, color, size in texts:
        draw.text((x, y), text, color, _font(size), anchor="ls")
        x += _font(size).getlength(text)


def _sample(example: Example, shown: dict[str, Shown]) -> Image.Image:
    """Its tiles from left to right, pictures first, on as many lines as they need."""
    places, x, line = [], _MARGIN, 0
    for name, entry in sorted(shown.items(), key=lambda item: item[1].grid is None):
        tiles = 1 if entry.grid is not None else 2 + any(p.boxes or p.point or p.value for p in entry.parts)
        width = tiles * (_TILE + _GAP) - _GAP
        if x + width > _WIDTH - _MARGIN:
            x, line = _MARGIN, line + 1
        places.append((name, entry, x, line, width))
        x += width + _GAP
    high = _TILE + 38
    strip, draw = _strip(30 + (line + 1) * high)
    draw.line((_MARGIN, 4, _WIDTH - _MARGIN, 4), _LINE)
    _write(draw, (_MARGIN, 22), [(example.key, _SOFT, 12)])
    for name, entry, x, line, width in places:
        top = 30 + line * high
        counts = [(f" {entry.inputs}", INPUT, 12)] * (entry.inputs > 0) + [(f" {entry.targets}", TARGET, 12)] * (entry.targets > 0)  # fmt: skip
        _write(draw, (x, top + 14), [(_shortened(name, width - 38), _INK, 12)])
        _write(draw, (x + width, top + 14), counts, right=True)
        if entry.grid is not None:
            _paste(strip, draw, _masked(example.pictures.get(name), entry.grid), (x, top + 20))
        else:
            _sequence(strip, draw, entry, example.pictures.get(example.main or ""), (x, top + 20), width)
    return strip


def _shortened(name: str, width: int) -> str:
    while _font(12).getlength(name) > width:
        name = name.rstrip("…")[:-1] + "…"
    return name


def _paste(strip: Image.Image, draw: ImageDraw.ImageDraw, tile: Image.Image, at: tuple[int, int]) -> None:
    strip.paste(tile, at)
    draw.rectangle((*at, at[0] + _TILE - 1, at[1] + _TILE - 1), outline=_LINE)


def _tile(picture: np.ndarray | None) -> Image.Image:
    source = np.full((1, 1, 3), 230, np.uint8) if picture is None else picture
    smooth = Image.Resampling.NEAREST if min(source.shape[:2]) < 100 else Image.Resampling.LANCZOS
    return Image.fromarray(source).resize((_TILE, _TILE), smooth)


def _masked(picture: np.ndarray | None, grid: np.ndarray) -> Image.Image:
    """The picture with inputs outlined, targets tinted, and the rest faded."""
    tile = _tile(picture)
    cells = Image.fromarray(grid).resize((_TILE, _TILE), Image.Resampling.NEAREST)
    for role, color, strength in ((0, "white", 0.82), (2, TARGET, 0.45)):
        mask = Image.fromarray(((np.asarray(cells) == role) * round(255 * strength)).astype(np.uint8))
        tile.paste(Image.new("RGB", tile.size, color), mask=mask)
    draw, sides = ImageDraw.Draw(tile), (_TILE / grid.shape[1], _TILE / grid.shape[0])
    for role, color in ((2, TARGET), (1, INPUT)):
        for y, x in np.argwhere(grid == role):
            draw.rectangle(
                (round(x * sides[0]), round(y * sides[1]), round((x + 1) * sides[0]), round((y + 1) * sides[1])), outline=color
            )  # fmt: skip
    return tile


def _sequence(
    strip: Image.Image, draw: ImageDraw.ImageDraw, entry: Shown, picture: np.ndarray | None, at: tuple[int, int], width: int
) -> None:  # fmt: skip
    """What it says in pictures or numbers, and its words.

    Args:
        picture: that boxes are in.
    """
    (left, top), pieces = at, list(entry.pieces)
    if any(part.boxes or part.point for part in entry.parts):
        _paste(strip, draw, _boxed(picture, entry.parts), at)
        left, width = left + _TILE + _GAP, width - _TILE - _GAP
    elif colors := [part for part in entry.parts if part.color]:
        step = width // len(colors)
        for i, part in enumerate(colors):
            edges = (left + i * step, top, left + (i + 1) * step, top + 28)
            _outline(draw, edges, part)
            draw.rectangle((edges[0] + 4, top + 4, edges[2] - 4, top + 24), fill=part.color)
        top += 34
    elif any(part.value for part in entry.parts):
        pieces = [Piece(f"{part.label} {part.value}".strip(), (*part.roles, "unused")[0]) for part in entry.parts]
    _pieces(draw, list(_elided(pieces)), left, top + 4, width, at[1] + _TILE)


def _boxed(picture: np.ndarray | None, parts: Sequence[Part]) -> Image.Image:
    """The faded picture with boxes and points."""
    tile = Image.blend(_tile(picture), Image.new("RGB", (_TILE, _TILE), "white"), 0.35)
    draw = ImageDraw.Draw(tile)
    for part in parts:
        for box in part.boxes:
            left, top, right, bottom = (round(c * (_TILE - 1)) for c in box)
            _outline(draw, (left, top, right, bottom), part)
            color = outlines(part)[-1]
            draw.text((left + 4, top + 2), part.label, color, _font(10), stroke_width=1, stroke_fill="white")
        if part.point:
            x, y = (c * _TILE for c in part.point)
            for radius, color in zip((4, 2), outlines(part), strict=False):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)
    return tile


def _outline(draw: ImageDraw.ImageDraw, edges: tuple[int, int, int, int], part: Part) -> None:
    left, top, right, bottom = edges
    for inset, color in zip((0, 2), outlines(part), strict=False):
        if min(right - left, bottom - top) >= 2 * inset:
            draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), outline=color, width=2)


def _elided(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Here long runs of what is neither input nor target are cut short, for the room."""
    for role, run in itertools.groupby(pieces, lambda piece: piece.role):
        words = list(run)
        yield from words if role != "unused" or len(words) <= 8 else [*words[:6], Piece("…", role)]


def _pieces(draw: ImageDraw.ImageDraw, pieces: Sequence[Piece], left: int, top: int, width: int, bottom: int) -> None:
    """Words in the colours of their roles; what finds no room is cut."""
    font, x, y = _font(12), float(left), top
    for i, piece in enumerate(pieces):
        text, (color, paper) = piece.text.removeprefix("##"), _ROLES[piece.role]
        space = 0 if piece.text.startswith("##") or i == 0 else font.getlength(" ")
        if x + space + font.getlength(text) > left + width:
            x, y, space = left, y + 17, 0
        if y + 14 > bottom:
            draw.text((left, y - 4), "…", _SOFT, font)
            return
        end = x + space + font.getlength(text)
        if paper:
            joined = space and pieces[i - 1].role == piece.role
            draw.rectangle((x if joined else x + space, y - 1, end, y + 14), fill=paper)
        draw.text((x + space, y + 11), text, color, font, anchor="ls")
        x = end


def _budgets(preview: Preview) -> Image.Image:
    """A row per modality, a column per component: input upwards, target downwards; pale: without any."""
    row, left, limits = 66, 190, budget_limits(preview)
    column = min((_WIDTH - left - _MARGIN) // len(preview.components), 400)
    strip, draw = _strip(34 + row * len(limits))
    for i, component in enumerate(preview.components):
        texts = [(f"Component {component.index + 1}", _INK, 13), (f"  {component.share:.0%} of the samples", _SOFT, 12)]
        _write(draw, (left + i * column, 20), texts)
    for j, (name, limit) in enumerate(limits.items()):
        top = 34 + j * row
        draw.line((_MARGIN, top - 4, _WIDTH - _MARGIN, top - 4), _LINE)
        _write(draw, (_MARGIN, top + 22), [(_shortened(name, left - 40), _INK, 12)])
        _write(draw, (_MARGIN, top + 38), [(f"0 to {limit} tokens", _SOFT, 11)])
        for i, component in enumerate(preview.components):
            _histogram(draw, component, name, limit, left + i * column, top, column - 24)
    return strip


def _histogram(
    draw: ImageDraw.ImageDraw, component: Component, name: str, limit: int, left: int, top: int, width: int
) -> None:
    half, middle, notes = 21, top + 22, []
    for label, budgets, color, sign in (
        ("in", component.input_budgets.get(name), INPUT, -1),
        ("target", component.target_budgets.get(name), TARGET, 1),
    ):
        if budgets is None:
            continue
        none, shares = bins(budgets, limit)
        step = (width - 14) // len(shares)
        pale = "#" + "".join(f"{round(255 - (255 - int(color[k : k + 2], 16)) * 0.3):02x}" for k in (1, 3, 5))
        bars = [
            (left, 10, none, pale),
            *((left + 14 + k * step, step - 1, share, color) for k, share in enumerate(shares)),
        ]
        for x, wide, share, paint in bars:
            if share:
                ends = sorted((middle + sign, middle + sign * (1 + round(half * share**0.5))))
                draw.rectangle((x, ends[0], x + wide - 1, ends[1]), fill=paint)
        notes.append((f"{label} mean {budgets.mean():.1f}, {none:.0%} none   ", color, 11))
    draw.line((left, middle, left + width - 1, middle), "#d1d5db")
    _write(draw, (left, top + 57), notes)
