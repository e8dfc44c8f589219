"""The one place where pictures are opened: which formats, how large, which way up, and what their pixels mean in 8 bits."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fourm.data.limits import MAX_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Pillow chooses by content, not by name, and would run Ghostscript on an EPS. These run nothing, and are what people have."""

_ORIENTATION = 0x0112  # the EXIF tag
# What turns the pixels (h, w, …) of each orientation upright; from 5 on height and width change places.
_UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
_SHARED_BITS = {"L;2": 85, "L;4": 17}  # Pillow spreads grey of 2 and 4 bits over 0 … 255, by these factors


class UnreadableImage(OSError):
    """A file is not an image of a known format, or is damaged or too large."""


def open_image(content: bytes) -> Image.Image:
    """The image in ``content``; only its header is read.

    Raises:
        UnreadableImage: not an image of :data:`FORMATS`, damaged, or of more than :data:`MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnreadableImage(f"not an image ({', '.join(FORMATS)}), or a damaged one") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"more than {MAX_PIXELS} pixels: {error}") from error
    except Exception as error:  # of many kinds: parsers of foreign bytes
        raise UnreadableImage(f"not an image, or a damaged one: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.height}x{image.width} pixels are more than {MAX_PIXELS}")
    return image


def orientation_of(image: Image.Image) -> int:
    """How the camera was held, from 1 (upright) to 8. A TIFF is turned by Pillow itself."""
    if image.format == "TIFF" or not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata say nothing, and the pixels may be whole
        return 1
    return found if found in _UPRIGHT else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of ``image`` once it is upright."""
    return (image.width, image.height) if orientation_of(image) > 4 else (image.height, image.width)


def pixels_of(image: Image.Image, mode: str | None) -> np.ndarray:
    """The upright pixels: (h, w) or (h, w, C), in 8 bits and the channels of ``mode``; None = the values as stored.

    Raises:
        UnreadableImage: it is damaged, or its values have no meaning in 8 bits.
    """
    orientation = orientation_of(image)
    try:
        if mode is None:
            factor = _spread(image)
            pixels = np.asarray(image)
            if pixels.dtype.byteorder == ">":
                pixels = pixels.astype(pixels.dtype.newbyteorder("="))
            pixels = pixels if factor == 1 else pixels // np.uint8(factor)
        else:
            pixels = np.asarray(image if mode == image.mode else in_mode(image, mode))
    except UnreadableImage:
        raise
    except Exception as error:  # of many kinds: parsers of foreign bytes
        raise UnreadableImage(f"a damaged image: {error}") from error
    return pixels if orientation == 1 else _UPRIGHT[orientation](pixels)


def _spread(image: Image.Image) -> int:
    """By what Pillow will multiply the values of an image that is not yet decoded."""
    if image.format == "PNG" and getattr(image, "tile", None):
        return _SHARED_BITS.get(image.tile[0][3], 1)  # type: ignore[attr-defined]
    return 1


def upright(image: Image.Image, mode: str | None) -> Image.Image:
    """The same as an image, without the orientation.

    Raises:
        UnreadableImage: as of :func:`pixels_of`.
    """
    try:
        factor = _spread(image) if mode is None else 1
        image.load()
        turned = image if orientation_of(image) == 1 else ImageOps.exif_transpose(image)
        if factor > 1:
            return Image.fromarray(np.asarray(turned) // np.uint8(factor))
        return turned if mode in (None, turned.mode) else in_mode(turned, mode)
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"a damaged image: {error}") from error


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """``image`` in the 8-bit ``mode``.

    Colours of palettes are looked up and transparency is left out, as Pillow does. Grey of 16 bits is scaled from 0 …
    65535, where Pillow makes all but the darkest white, and of floats from 0 … 1, where it makes everything black.

    Raises:
        UnreadableImage: values beyond these ranges.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise UnreadableImage(f"grey of {values.min()} to {values.max()}, not of 16 bits: 0 to 65535")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # false of what is not finite
            raise UnreadableImage(f"grey of {values.min()} to {values.max()}, not of floats from 0 to 1")
        image = Image.fromarray(np.round(values * 255).astype(np.uint8))
    elif image.mode in ("RGBa", "La"):  # premultiplied
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    return image if image.mode == mode else image.convert(mode)


class EncodedImage:
    """An image that is decoded when its pixels are wanted; until then only its header is read.

    Args:
        keep: decode all of it, once for all that ask; else each time anew, and only as finely as is asked for.

    Attributes:
        shape: (height, width), upright.
        mode: as stored, in Pillow's terms.

    Raises:
        UnreadableImage: not an image, or too large.
    """

    def __init__(self, content: bytes, keep: bool = False):
        self.content, self._keep = content, keep
        self._opened: Image.Image | None = open_image(content)
        self._kept: dict[str | None, np.ndarray] = {}
        self.shape, self.mode = upright_size(self._opened), self._opened.mode

    def pixels(self, mode: str | None, scale: int = 1) -> np.ndarray:
        """(h, w) or (h, w, C), to be read only.

        Args:
            mode: PIL mode to convert to; None = as stored.
            scale: a JPEG that is not kept may come so many times smaller: 1, 2, 4 or 8.

        Raises:
            UnreadableImage: the image is damaged, or its values have no meaning in ``mode``.
        """
        if mode in self._kept:
            return self._kept[mode]
        image, self._opened = self._opened or open_image(self.content), None
        if scale > 1 and not self._keep:
            image.draft(None, (image.width // scale, image.height // scale))  # type: ignore[arg-type]
        pixels = pixels_of(image, mode)
        if self._keep:
            self._kept[mode] = pixels
        return pixels
