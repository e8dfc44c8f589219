"""Pictures of what :func:`fourm.generation.decode_dict.decode_dict` returns, and figures that show several of them.

The names are those of the published notebooks. matplotlib is imported where something is drawn with it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fourm.generation.decode_dict import pca_visualize, tensor_to_images
from fourm.generation.plotting import matplotlib_module
from fourm.generation.sequences import SEQUENCES
from fourm.utils.errors import UserError
from fourm.utils.files import atomic_path
from fourm.utils.tokenizer.special_tokens import NUM_BINS

Decoded = Mapping[str, Any]
_CANVAS = 224  # side in pixels of a picture of boxes, if there is no other
_DPI = 100
_TITLES = {
    "rgb": "RGB",
    "tok_rgb": "RGB",
    "tok_clip": "CLIP",
    "tok_dinov2": "DINOv2",
    "tok_imagebind": "ImageBind",
    "tok_dinov2_global": "DINOv2 global",
    "tok_imagebind_global": "ImageBind global",
    "tok_sam_edge": "SAM edges",
    "tok_semseg": "Semantic segmentation",
    "det": "Boxes",
    "sam_instance": "SAM instances",
    "t5_caption": "T5 caption",
}


# Single pictures.


def convert_string_to_bboxes(text: str, bins: int = 1000) -> list[list[Any]]:
    """Parse the text of boxes.

    Args:
        text: Such as ``v0=10 v1=20 v2=500 v3=999 cup``.
        bins: Number of bins of a coordinate.

    Returns:
        ``[xmin, ymin, xmax, ymax, class]`` of each box, in [0, 1]; what cannot be read is left out.
    """
    scale = (NUM_BINS - 1) / (bins - 1)
    boxes, _ = SEQUENCES["det"](text.split())
    return [[*(min(coordinate * scale, 1.0) for coordinate in box["boxes"]), box["class_name"]] for box in boxes]


def visualize_bboxes(img: Any, text: str | Sequence[str], color: Any = (255, 0, 0), thickness: int = 2) -> np.ndarray:
    """Draw boxes and the names of their classes.

    Args:
        img: The picture, see :func:`to_pil`; None draws on white.
        text: The text of the boxes.
        color: Red, green and blue, from 0 to 255, or the name of a colour.
        thickness: Width of lines in pixels.

    Returns:
        (H, W, 3) uint8.
    """
    picture = Image.new("RGB", (_CANVAS, _CANVAS), "white") if img is None else to_pil(img)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(picture.height // 20, 8))
    fill = tuple(color) if isinstance(color, (list, tuple, np.ndarray)) else color
    for *box, name in convert_string_to_bboxes(text if isinstance(text, str) else text[0]):
        corners = [coordinate * side for coordinate, side in zip(box, picture.size * 2, strict=True)]
        draw.rectangle(corners, outline=fill, width=thickness)
        draw.text((corners[0] + thickness + 1, corners[1] + thickness), name, fill=fill, font=font)
    return np.asarray(picture)


def plot_text_in_square(ax: Any, text: str, padding: float = 0.5, fontsize: int = 14, wrap_width: int = 50) -> None:
    """Write a text into the middle of an axes.

    Args:
        ax: Axes of matplotlib.
        text: The text.
        padding: Padding of the box around it, in units of the font size.
        fontsize: Size of the font in points.
        wrap_width: Maximum number of characters of a line.
    """
    box = {"facecolor": "white", "edgecolor": "none", "boxstyle": f"square,pad={padding}"}
    ax.text(
        0.5,
        0.5,
        "\n".join(textwrap.wrap(text, wrap_width)),
        ha="center",
        va="center",
        fontsize=fontsize,
        bbox=box,
        transform=ax.transAxes,
        parse_math=False,
    )
    ax.set_axis_off()


def text_to_pil_image(
    text: str, padding: float = 0.5, fontsize: int = 14, wrap_width: int = 40, image_size: tuple[int, int] = (512, 512)
) -> Image.Image:
    """Draw a text as a picture of ``image_size`` (width, height) pixels; see :func:`plot_text_in_square`."""
    matplotlib_module()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(image_size[0] / _DPI, image_size[1] / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    plot_text_in_square(figure.add_axes((0, 0, 1, 1)), text, padding, fontsize, wrap_width)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()).resize(image_size)


def to_pil(image: Any) -> Image.Image:
    """Convert a PIL image, a tensor (C, H, W) or (1, C, H, W), or an array (H, W, C) or (H, W), uint8 or in [0, 1].

    Raises:
        UserError: If it has another shape.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Tensor):
        image = tensor_to_images(image.reshape(1, *image.shape[-3:])) if image.ndim > 2 else image.cpu().numpy()
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise UserError(f"a picture has the shape (H, W, 3) or (H, W), not {image.shape}")
    if image.dtype != np.uint8:
        image = (image.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3))))


def modality_to_pil(result: Decoded, key: str) -> Image.Image:
    """Draw one modality of the result of one sample; boxes are drawn on the picture of the sample, if it has one.

    Args:
        result: What ``decode_dict`` returned.
        key: The modality.
    """
    value, name = result[key], key.split("@")[0]
    if name == "det":
        return Image.fromarray(visualize_bboxes(_picture_of(result), value))
    if isinstance(value, Mapping):
        lines = "    ".join(f"{item}: {number:.4g}" for item, number in value.items())
        return text_to_pil_image(lines or "(nothing)", fontsize=11)
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return text_to_pil_image(value if isinstance(value, str) else "\n".join(value))
    if isinstance(value, Tensor) and value.ndim == 1:
        return text_to_pil_image(f"{len(value)} numbers")
    if isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] != 3:
        value = pca_visualize(value)
    picture = to_pil(value)
    if min(picture.size) < _CANVAS:  # a feature map has a pixel per token
        picture = picture.resize((_CANVAS, _CANVAS), Image.Resampling.NEAREST)
    return picture


def title_of(key: str) -> str:
    """Return the title of a modality: ``tok_depth@448`` → ``Depth``."""
    name = key.split("@")[0]
    return _TITLES.get(name, name.removeprefix("tok_").replace("_", " ").capitalize())


def _picture_of(result: Decoded) -> Any:
    pictures = [key for key in result if key.split("@")[0] in ("rgb", "tok_rgb")]
    return result[max(pictures, key=lambda key: int(key.partition("@")[2] or 0))] if pictures else None


# Figures.


def plot_conds_and_targets(
    cond_domains: Sequence[str],
    target_domains: Sequence[str],
    dec_dicts: Decoded | Sequence[Decoded],
    save_path: str | Path | None = None,
    figscale: float = 4.0,
    dpi: int = _DPI,
) -> None:
    """Show inputs and targets of one or several samples, a row for each.

    Args:
        cond_domains, target_domains: The modalities.
        dec_dicts: What ``decode_dict`` returned, of one or several samples.
        save_path: File to write instead of showing the figure.
        figscale: Side of a picture in inches.
        dpi: Pixels per inch.
    """
    rows = [dec_dicts] if isinstance(dec_dicts, Mapping) else list(dec_dicts)
    keys = [*cond_domains, *target_domains]
    pictures = [(modality_to_pil(row, key), title_of(key)) for row in rows for key in keys]
    plot_pictures(pictures, len(keys), figscale, save_path, dpi)


def save_conds_and_targets(
    cond_domains: Sequence[str],
    target_domains: Sequence[str],
    dec_dicts: Decoded | Sequence[Decoded],
    save_dir: str | Path,
    sample_idx: int = 0,
) -> None:
    """Write inputs and targets of one or several samples to files: ``SAMPLE_MODALITY.png``, of a text ``.txt``.

    Args:
        cond_domains, target_domains, dec_dicts: See :func:`plot_conds_and_targets`.
        save_dir: The folder.
        sample_idx: Number of the first sample.
    """
    rows = [dec_dicts] if isinstance(dec_dicts, Mapping) else list(dec_dicts)
    for index, row in enumerate(rows, sample_idx):
        for key in (*cond_domains, *target_domains):
            value, name = row[key], f"{index:05d}_{key}"
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            if isinstance(value, (str, list)):
                with atomic_path(Path(save_dir, f"{name}.txt")) as path:
                    path.write_text((value if isinstance(value, str) else "\n".join(value)) + "\n", encoding="utf-8")
            else:
                with atomic_path(Path(save_dir, f"{name}.png")) as path:
                    modality_to_pil(row, key).save(path, format="png")


def plot_images_with_captions(
    images: Sequence[Any],
    captions: Sequence[str],
    save_path: str | Path | None = None,
    ncols_max: int = 5,
    figscale: float = 4.0,
    wrap_width: int = 30,
    dpi: int = _DPI,
) -> None:
    """Show pictures (see :func:`to_pil`) with a text above each; other arguments are those of :func:`plot_pictures`."""
    titles = [textwrap.fill(caption, wrap_width) for caption in captions]
    plot_pictures(list(zip(map(to_pil, images), titles, strict=True)), ncols_max, figscale, save_path, dpi)


def plot_pictures(
    pictures: Sequence[tuple[Image.Image, str]],
    ncols_max: int = 5,
    figscale: float = 4.0,
    save_path: str | Path | None = None,
    dpi: int = _DPI,
) -> None:
    """Show pictures with their titles in a grid.

    Args:
        pictures: Pictures and titles.
        ncols_max: Maximum number of columns.
        figscale: Side of a picture in inches.
        save_path: File to write instead of showing the figure.
        dpi: Pixels per inch.

    Raises:
        UserError: If there are no pictures.
        MissingDependency: If matplotlib is not installed.
    """
    if not pictures:
        raise UserError("there is nothing to plot")
    matplotlib_module()
    from matplotlib import pyplot

    columns = min(ncols_max, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(columns * figscale, rows * figscale), squeeze=False, layout="constrained", dpi=dpi
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (picture, title) in zip(grid.flat, pictures, strict=False):
        axes.imshow(picture)
        axes.set_title(title)
    if save_path is None:
        pyplot.show()
        return
    with atomic_path(save_path) as path:
        figure.savefig(path, format=Path(save_path).suffix.removeprefix(".") or "png")
    pyplot.close(figure)
