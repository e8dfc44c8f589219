"""What drawings of people and instances share: the picture that they are drawn on, and colours."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

SIZE = 224
"""Side in pixels of a drawing, at least."""


def canvas(background: np.ndarray | None = None, size: int = SIZE) -> Image.Image:
    """Return a picture to draw on: the background, enlarged until its shorter side has ``size`` pixels, or white.

    Args:
        background: Picture (H, W, 3) uint8, or None.
        size: Minimum side in pixels.
    """
    if background is None:
        return Image.new("RGB", (size, size), "white")
    picture = Image.fromarray(background)
    factor = max(size / min(picture.size), 1.0)
    width, height = (round(side * factor) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.NEAREST)


def color(index: int) -> tuple[int, int, int]:
    """Return the colour of an object; neighbouring indices differ clearly."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618 % 1, 0.75, 0.65 if index % 2 else 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)
