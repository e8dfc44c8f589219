"""Draw the two figures of the report: samples of the data, and loss curves."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fourm.data.images import open_image
from fourm.demo.report import ModalityResult
from fourm.generation.plotting import class_colors
from fourm.utils.dependencies import optional_import
from fourm.utils.files import atomic_path

# Paul Tol's muted scheme, which colour-blind readers can distinguish.
_COLORS = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
)
_INK, _FAINT = "#222222", "#999999"


def _pyplot() -> Any:
    with optional_import("matplotlib", "drawing the demo's figures"):
        import matplotlib
    matplotlib.use("Agg")  # draws to files, without a display
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.edgecolor": _FAINT, "axes.labelcolor": _INK, "text.color": _INK})
    return plt


def sample_sheet(samples: Sequence[Mapping[str, Path]], classes: Sequence[str], path: Path) -> None:
    """Draw a row per sample and a column per modality.

    Args:
        samples: For each sample, modality → file.
        classes: Names of the class ids.
        path: The file to write.
    """
    plt = _pyplot()
    titles = ("colour and boxes", "depth", "surface normals", "segmentation", "edges", "caption, palette, metadata")
    figure, grid = plt.subplots(
        len(samples),
        len(titles),
        figsize=(15, 2.35 * len(samples) + 0.8),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"width_ratios": [1, 1, 1, 1, 1, 1.5]},
    )
    figure.suptitle("Samples of the demonstration data: rendered scenes with exact ground truth", fontsize=13)
    colors = class_colors(len(classes))
    for row, sample in zip(grid, samples, strict=True):
        image = {m: np.asarray(open_image(f.read_bytes())) for m, f in sample.items() if f.suffix in (".jpg", ".png")}
        parsed = {m: json.loads(f.read_text()) for m, f in sample.items() if f.suffix == ".json"}
        size = len(image["rgb"])
        row[0].imshow(image["rgb"])
        for box in parsed["det"]["instances"]:
            xmin, ymin, xmax, ymax = (size * c - 0.5 for c in box["boxes"])
            color = colors[classes.index(box["class_name"])] / 255
            row[0].add_patch(plt.Rectangle((xmin, ymin), xmax - xmin, ymax - ymin, fill=False, color=color, lw=1.6))
            row[0].text(
                xmin,
                max(ymin, 6),
                box["class_name"],
                fontsize=7,
                va="bottom",
                color=_INK if color @ (0.3, 0.6, 0.1) > 0.55 else "white",
                bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8},
            )
        row[1].imshow(image["depth"], cmap="Spectral", vmin=image["depth"].min(), vmax=image["depth"].max())
        row[2].imshow(image["normal"])
        row[3].imshow(colors[image["semseg"]])
        row[4].imshow(image["canny_edge"], cmap="gray_r")
        _facts(row[5], sample["caption"].read_text(), parsed["color_palette"][0]["7"], parsed["metadata"])
        for axes in row[:5]:
            axes.set(xticks=[], yticks=[], anchor="N")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    _save(plt, figure, path)


def _facts(axes: Any, caption: str, palette: list[list[int]], metadata: Mapping[str, float]) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    axes.text(0.02, 0.97, textwrap.fill(f"“{caption}”", 38), va="top", fontsize=9, style="italic")
    for i, color in enumerate(palette):
        axes.add_patch(_pyplot().Rectangle((0.02 + 0.136 * i, 0.3), 0.13, 0.14, color=np.array(color) / 255))
    names = ("brightness", "colorfulness", "entropy", "geometric_complexity")
    facts = [f"{name.replace('_', ' ')} {metadata[name]:.3g}" for name in names]
    axes.text(0.02, 0.2, "\n".join([", ".join(facts[:2]), ", ".join(facts[2:])]), va="top", fontsize=8, color="#555555")


def loss_curves(
    training: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    results: Sequence[ModalityResult],
    stopped_at: int | None,
    path: Path,
) -> None:
    """Draw the training loss, and the validation loss of each modality with its baseline as a dashed line.

    Args:
        training, evaluations: The results of :func:`fourm.demo.report.read_log`.
        results: One per modality.
        stopped_at: Step at which the run was stopped and resumed.
        path: The file to write.
    """
    plt = _pyplot()
    columns = (len(results) + 1) // 2
    figure = plt.figure(figsize=(5 + 2.6 * columns, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[5, 2.6 * columns])
    figure.suptitle("A small 4M model on the demonstration data", fontsize=13)

    axes = left.subplots()
    axes.plot([t["step"] for t in training], [t["loss"] for t in training], color=_COLORS[0], lw=1.2)
    axes.set(title="training loss (mean over modalities)", xlabel="step", ylabel="nats per token")
    _finish(axes)
    _mark_stop(axes, stopped_at, "stopped and resumed")

    grid = right.subplots(2, columns, sharex=True, squeeze=False)
    for axes, result, color in zip(grid.flat, results, _COLORS, strict=False):
        axes.axhline(result.entropy, color=_INK, ls="--", lw=1)
        axes.plot(
            [e["step"] for e in evaluations],
            [e["per_modality"][result.modality] for e in evaluations],
            color=color,
            lw=1.6,
            marker="o",
            ms=2.5,
        )
        axes.set_title(f"{result.modality}: {result.loss:.2f} of {result.entropy:.2f}", fontsize=9)
        axes.set_ylim(bottom=0)
        _finish(axes)
        _mark_stop(axes, stopped_at)
    for axes in grid.flat[len(results) :]:
        axes.axis("off")
    right.supxlabel("step", fontsize=9)
    right.suptitle("validation loss, and (dashed) the entropy of the modality's tokens", fontsize=10)
    _save(plt, figure, path)


def _finish(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)


def _mark_stop(axes: Any, step: int | None, text: str = "") -> None:
    if step is not None:
        axes.axvline(step, color=_FAINT, ls=":", lw=1.2)
        axes.text(step, 0.97, f" {text}", transform=axes.get_xaxis_transform(), va="top", fontsize=8, color="#666666")


def _save(plt: Any, figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
