"""Draws results: one plotter per kind, and contact sheets. No other module of this package uses matplotlib."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fourm.generation.decoding import CLASSES, Decoded
from fourm.generation.instances import draw_instances
from fourm.generation.poses import draw_pose
from fourm.utils.dependencies import optional_import
from fourm.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT, _EMPTY = "#222222", "#777777", "#f3f3f3"
_CELL = 2.1  # side of a picture in inches
_LINE_LENGTH = 42  # characters on a line of text
_TEXT_WIDTH = 1.35  # width of a column of text, relative to one of pictures
_TEXTS = ("caption", "metadata", "color_palette", "scalar", "vectors")


def plot(
    samples: Sequence[Mapping[str, Decoded]] | Mapping[str, Decoded], title: str = "", labels: Sequence[str] = ()
) -> Figure:
    """Draw a contact sheet with one row per sample and one column per modality, in the order of the first sample.

    Args:
        samples: Results of ``Sampler`` or :func:`fourm.generation.decode`; their keys become the titles of the columns.
        title: Title of the sheet.
        labels: Labels of the rows.

    Returns:
        The figure; save it with ``plot(samples).savefig("sheet.png")``.

    Raises:
        UserError: If there is nothing to plot.
        MissingDependency: If matplotlib is not installed.
    """
    rows = [samples] if isinstance(samples, Mapping) else list(samples)
    if not rows or not rows[0]:
        raise UserError("plot: there is no sample to plot")
    matplotlib_module()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = [*rows[0]]
    widths = [_TEXT_WIDTH if rows[0][name].kind in _TEXTS else 1.0 for name in columns]
    classes = _classes_of(rows)
    legend = 0.3 * -(-len(classes) // _per_line(sum(widths)))
    height = len(rows) * _CELL * 1.04 + 0.35 + legend + (0.35 if title else 0)
    # Leave a margin at the top, because the layout would cut off the titles of the columns.
    rect = (0, 0, 1, 1 - 0.07 / height)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01, rect=rect)
    figure = Figure(figsize=(sum(widths) * _CELL, height), layout=layout, dpi=120)
    grid = figure.subplots(len(rows), len(columns), squeeze=False, gridspec_kw={"width_ratios": widths})
    features = {
        name: [row[name].value for row in rows if name in row and row[name].kind == "feature"] for name in columns
    }
    # The same colour stands for the same feature in the whole column.
    colors = {name: principal_colors(maps) for name, maps in features.items() if maps}
    for axes_of_row, sample in zip(grid, rows, strict=True):
        for axes, name, width in zip(axes_of_row, columns, widths, strict=True):
            axes.set(xticks=[], yticks=[], box_aspect=1 / width)
            axes.spines[:].set_visible(False)
            if name in sample:
                _draw(axes, sample[name], sample, colors.get(name))
    for axes, name in zip(grid[0], titles_of(columns), strict=True):
        axes.set_title(name, fontsize=9, color=_INK)
    for axes_of_row, label in zip(grid, labels, strict=False):
        axes_of_row[0].set_ylabel(label, fontsize=9, color=_INK)
    if classes:
        _legend(figure, classes, _per_line(sum(widths)))
    if title:
        figure.suptitle(title, fontsize=11, color=_INK)
    return figure


def as_image(result: Decoded) -> np.ndarray | None:
    """Return the picture of a result, (H, W, 3) uint8, or None if it is not a picture, such as a caption."""
    if result.kind in DRAWINGS:
        return DRAWINGS[result.kind](result.value, None)
    if result.kind not in IMAGES:
        return None
    return _eight_bits(IMAGES[result.kind](result.value))


def _eight_bits(image: np.ndarray) -> np.ndarray:
    return image if image.dtype == np.uint8 else (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def class_colors(count: int) -> np.ndarray:
    """Return colours (count, 3) uint8: grey, then hues spread by the golden ratio, alternately light and dark."""
    matplotlib_module()
    from matplotlib.colors import hsv_to_rgb

    index = np.arange(count - 1)
    hsv = np.stack([index * 0.618 % 1, np.full(count - 1, 0.75), np.where(index % 2, 0.65, 0.95)], axis=-1)
    return np.concatenate([[[205, 205, 205]], hsv_to_rgb(hsv) * 255]).round().astype(np.uint8)


def colormap(name: str, values: np.ndarray) -> np.ndarray:
    """Return the colours (…, 3) in [0, 1] of ``values`` in [0, 1], in a colormap of matplotlib."""
    return matplotlib_module().colormaps[name](values)[..., :3]


def matplotlib_module() -> Any:
    """Import matplotlib.

    Raises:
        MissingDependency: If it is not installed.
    """
    with optional_import("matplotlib", "plotting"):
        import matplotlib
    return matplotlib


# Pictures.


def _depth(depth: np.ndarray) -> np.ndarray:
    """Colour depth from red (near) to blue (far) between the 2nd and the 98th percentile; unknown depth is grey."""
    known = depth[np.isfinite(depth)]
    low, high = np.percentile(known, [2, 98]) if known.size else (0.0, 1.0)
    image = colormap("Spectral", np.nan_to_num((depth - low) / max(high - low, 1e-6)))
    return np.where(np.isfinite(depth)[..., None], image, 0.5)


def _classes(ids: np.ndarray) -> np.ndarray:
    colors = class_colors(max(int(ids.max()) + 1, 1))
    return np.where(ids[..., None] < 0, 255, colors[np.maximum(ids, 0)]).astype(np.uint8)


def _edges(edges: np.ndarray) -> np.ndarray:
    return np.repeat(1 - edges[..., None], 3, axis=-1)  # dark lines on white paper


def _tokens(ids: np.ndarray) -> np.ndarray:
    """Give each id a colour, which is the same in all pictures."""
    mixed = (np.maximum(ids, 0).astype(np.uint64)[..., None] + 1) * np.array(
        [2654435761, 2246822519, 3266489917], np.uint64
    )
    colors = ((mixed % np.uint64(2**32)) >> np.uint64(24)).astype(np.float64) / 255
    return np.where(ids[..., None] < 0, 1.0, 0.25 + 0.7 * colors)


def principal_colors(maps: Sequence[np.ndarray], count: int = 3) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that draws feature maps (h, w, C): the first principal components of ``maps``, three as RGB."""
    rows = np.nan_to_num(np.concatenate([values.reshape(-1, values.shape[-1]) for values in maps]).astype(np.float64))
    mean = rows.mean(0)
    directions = np.linalg.svd(rows - mean, full_matrices=False)[2][:count].T
    low, high = np.percentile((rows - mean) @ directions, [1, 99], axis=0)

    def draw(values: np.ndarray) -> np.ndarray:
        parts = ((np.nan_to_num(values) - mean) @ directions - low) / np.maximum(high - low, 1e-9)
        return np.pad(parts, [(0, 0), (0, 0), (0, count - parts.shape[-1])])

    return draw


def pca_picture(features: np.ndarray) -> np.ndarray:
    """Draw a feature map (h, w, C): its first three principal components as RGB, (h, w, 3) in [0, 1]."""
    return principal_colors([features])(features).clip(0, 1)


IMAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rgb": lambda image: image,
    "depth": _depth,
    "normal": lambda normals: (normals + 1) / 2,
    "semseg": _classes,
    "semseg_coco": _classes,
    "canny_edge": _edges,
    "sam_edge": _edges,
    "tokens": _tokens,
    "feature": pca_picture,
}
"""Maps each kind of picture to a function that converts its value to (H, W, 3), uint8 or in [0, 1]."""

DRAWINGS: dict[str, Callable[[Any, np.ndarray | None], np.ndarray]] = {
    "human_poses": draw_pose,
    "sam_instance": draw_instances,
}
"""Maps each kind that is drawn on a picture, (H, W, 3) uint8 or None, to the function that does so."""


# Plotters of other kinds get the axes, the value, and the sample that it belongs to.


def _caption(axes: Axes, text: str, sample: Mapping[str, Decoded]) -> None:
    lines = textwrap.wrap(text, _LINE_LENGTH, max_lines=11, placeholder=" …") or ["(nothing)"]
    quoted = [f"“{lines[0]}", *lines[1:]]
    _write(axes, "\n".join(quoted) + "”", style="italic")


def _boxes(axes: Axes, boxes: list[dict[str, Any]], sample: Mapping[str, Decoded]) -> None:
    """Draw boxes on the picture of the sample, in the colours of its segmentation."""
    from matplotlib.patches import Rectangle

    height, width = _draw_background(axes, sample)
    classes = next((other.names for other in sample.values() if other.names), ("",))  # grey is the first colour
    names = [*classes, *sorted({box["class_name"] for box in boxes}.difference(classes))]
    colors = class_colors(len(names)) / 255
    for box in boxes:
        color = colors[names.index(box["class_name"])]
        xmin, ymin, xmax, ymax = (c * side - 0.5 for c, side in zip(box["boxes"], (width, height) * 2, strict=True))
        axes.add_patch(Rectangle((xmin, ymin), xmax - xmin, ymax - ymin, fill=False, color=color, lw=1.6))
        axes.text(
            xmin,
            max(ymin, 0.08 * height),
            box["class_name"],
            fontsize=6,
            va="bottom",
            clip_on=True,
            color=_INK if color @ (0.3, 0.6, 0.1) > 0.55 else "white",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8},
        )


def _drawing(kind: str) -> Callable[[Any, Any, Mapping[str, Decoded]], None]:
    """Return the plotter of a kind in :data:`DRAWINGS`, which draws on the faded picture of the sample."""

    def draw(axes: Axes, value: Any, sample: Mapping[str, Decoded]) -> None:
        axes.imshow(DRAWINGS[kind](value, _faded_picture(sample)), interpolation="nearest")

    return draw


def _vector(axes: Axes, values: np.ndarray, sample: Mapping[str, Decoded]) -> None:
    """Draw a bar for each number, from the middle up or down."""
    limit = np.abs(np.nan_to_num(values)).max(initial=1e-6)
    axes.set(xlim=(0, len(values)), ylim=(-1.1 * limit, 1.1 * limit), facecolor=_EMPTY)
    axes.fill_between(np.arange(len(values)), np.nan_to_num(values), step="mid", color=_INK, lw=0)
    axes.text(0.03, 0.97, f"{len(values)} numbers", transform=axes.transAxes, va="top", fontsize=6, color=_FAINT)


def _palette(axes: Axes, colors: list[list[int]], sample: Mapping[str, Decoded]) -> None:
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, 1), ylim=(0, 1))
    for i, color in enumerate(colors):
        left = i / len(colors)
        axes.add_patch(Rectangle((left, 0.35), 0.96 / len(colors), 0.45, color=np.array(color) / 255, lw=0))
        axes.text(
            left + 0.48 / len(colors),
            0.32,
            "#{:02x}{:02x}{:02x}".format(*color),
            fontsize=5.5,
            rotation=90,
            ha="center",
            va="top",
            color=_FAINT,
            family="monospace",
        )


def _metadata(axes: Axes, values: Mapping[str, float], sample: Mapping[str, Decoded]) -> None:
    """Write each value on a line of its own."""
    lines = max(len(values), 8)
    axes.set(xlim=(0, 1), ylim=(lines, 0))
    for line, (name, value) in enumerate(values.items()):
        size = min(7.0, 110 / lines)
        axes.text(0.02, line + 0.5, name.replace("_", " "), fontsize=size, va="center", color=_FAINT)
        axes.text(0.98, line + 0.5, f"{value:.4g}", fontsize=size, va="center", ha="right", color=_INK)
        axes.axhline(line + 1, color="#e5e5e5", lw=0.6)


def _json(axes: Axes, value: Any, sample: Mapping[str, Decoded]) -> None:
    text = json.dumps(value) if not isinstance(value, np.ndarray) else f"{' × '.join(map(str, value.shape))} numbers"
    _write(axes, "\n".join(textwrap.wrap(text, _LINE_LENGTH, max_lines=11, placeholder=" …")), family="monospace")


PLOTTERS: dict[str, Callable[[Any, Any, Mapping[str, Decoded]], None]] = {
    "caption": _caption,
    "det": _boxes,
    "sam_instance": _drawing("sam_instance"),
    "color_palette": _palette,
    "metadata": _metadata,
    "human_poses": _drawing("human_poses"),
    "scalar": _json,
    "vector": _vector,
    "vectors": _json,
}
"""Maps each kind that is not a picture (see :data:`IMAGES`) to the function that draws it."""


def _draw(
    axes: Axes, result: Decoded, sample: Mapping[str, Decoded], features: Callable[[np.ndarray], np.ndarray] | None
) -> None:
    if result.kind in PLOTTERS:
        PLOTTERS[result.kind](axes, result.value, sample)
    else:
        draw = features if features and result.kind == "feature" else IMAGES[result.kind]
        axes.imshow(_eight_bits(draw(result.value)), interpolation="nearest")
    if result.dropped:
        unit, state = ("token", "missing") if result.kind in (*IMAGES, "vector") else ("word", "left out")
        text = f"{result.dropped} {unit}{'s' if result.dropped > 1 else ''} {state}"
        axes.set_xlabel(text, fontsize=6, color=_FAINT, labelpad=2)


def _write(axes: Axes, text: str, **options: Any) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.text(0.03, 0.97, text, va="top", fontsize=8.5, color=_INK, linespacing=1.3, **options)


def _faded_picture(sample: Mapping[str, Decoded]) -> np.ndarray | None:
    """Return the picture of the sample in pale colours, or None if it has none."""
    pictures = [other.value for other in sample.values() if other.kind == "rgb"]
    return (255 - (255 - pictures[0].astype(float)) * 0.75).round().astype(np.uint8) if pictures else None


def _draw_background(axes: Axes, sample: Mapping[str, Decoded]) -> tuple[int, int]:
    """Draw the faded picture of the sample, or an empty area if it has none, and return its height and width."""
    picture = _faded_picture(sample)
    if picture is not None:
        axes.imshow(picture, interpolation="nearest")
        return picture.shape[0], picture.shape[1]
    axes.set(xlim=(-0.5, 99.5), ylim=(99.5, -0.5), aspect="equal", facecolor=_EMPTY)
    return 100, 100


def titles_of(columns: Sequence[str]) -> list[str]:
    """Shorten ``tok_depth@224`` to ``depth``, unless another column has the same short name."""
    short = [name.split("@")[0].removeprefix("tok_").replace("_", " ") for name in columns]
    return [name if short.count(title) > 1 else title for name, title in zip(columns, short, strict=True)]


def _classes_of(rows: Sequence[Mapping[str, Decoded]]) -> dict[int, str]:
    """Return the class ids in all segmentations, with their names."""
    names: dict[int, str] = {}
    for result in (result for row in rows for result in row.values() if result.kind in CLASSES):
        for index in np.unique(result.value[result.value >= 0]).tolist():
            names[index] = result.names[index] if index < len(result.names) else f"class {index}"
    return dict(sorted(names.items()))


def _per_line(width: float) -> int:
    """Return the number of entries of the legend that fit on one line."""
    return max(int(width * _CELL / 1.05), 1)


def _legend(figure: Figure, classes: Mapping[int, str], per_line: int) -> None:
    from matplotlib.patches import Patch

    colors = class_colors(max(classes) + 1) / 255
    handles = [Patch(color=tuple(colors[index]), label=name) for index, name in classes.items()]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(per_line, len(handles)),
        fontsize=7,
        frameon=False,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.2,
        labelcolor=_INK,
    )
