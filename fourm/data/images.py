"""Open images: supported formats, maximum size, EXIF orientation, and conversion of pixels to 8 bits."""

from __future__ import annotations

import functools
import io
from types import ModuleType

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fourm.data.limits import MAX_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Supported formats. By default, Pillow would detect EPS by its content and run Ghostscript on it."""

_ORIENTATION = 0x0112  # the EXIF tag
_JFIF, _QUANTIZATION, _HUFFMAN, _START_OF_SCAN = 0xE0, 0xDB, 0xC4, 0xDA  # markers of JPEG segments
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive
# Functions that turn the pixels (h, w, …) of each orientation upright; from 5 on, height and width are swapped.
_UPRIGHT_VIEWS = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
_GREY_FACTORS = {"L;2": 85, "L;4": 17}  # Pillow multiplies 2-bit and 4-bit grey by these factors


class UnreadableImage(OSError):
    """Raised if a file is not an image of a supported format, or is damaged or too large."""


def open_image(content: bytes) -> Image.Image:
    """Open the image in ``content``; only its header is read.

    Raises:
        UnreadableImage: The image is in none of :data:`FORMATS`, is damaged, or has more than :data:`MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnreadableImage(f"not an image ({', '.join(FORMATS)}), or damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"more than {MAX_PIXELS} pixels: {error}") from error
    except Exception as error:  # parsers raise many types of errors for damaged files
        raise UnreadableImage(f"not an image, or damaged: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.height}x{image.width} pixels exceed the limit of {MAX_PIXELS}")
    return image


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return the (height, width) of a JPEG that is certainly upright and in RGB, several times as fast as Pillow.

    Returns:
        None if the header is damaged or holds anything uncommon, such as EXIF data. Pillow then has to open the file.
    """
    if content[:2] != b"\xff\xd8":
        return None
    at, size, end = 2, None, len(content)
    while at + 4 <= end and content[at] == 0xFF:
        marker = content[at + 1]
        data, at = at + 4, at + 2 + (content[at + 2] << 8 | content[at + 3])
        length = at - data
        if at > end or length < 0:
            return None
        if marker == _START_OF_SCAN:
            return size
        if marker in _FRAMES:
            # 8 bits, the height and width, and three components of three bytes.
            if size or length != 15 or content[data] != 8 or content[data + 5] != 3:
                return None
            height, width = content[data + 1] << 8 | content[data + 2], content[data + 3] << 8 | content[data + 4]
            if not 0 < height * width <= MAX_PIXELS:
                return None
            size = height, width
        elif marker == _QUANTIZATION:
            if length != 65 * (1 + (length == 130)) or any(content[table] > 15 for table in range(data, at, 65)):
                return None
        elif marker != _HUFFMAN and (marker != _JFIF or length < 14):
            return None
    return None


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, from 1 (upright) to 8. Pillow itself turns TIFFs upright."""
    if image.format == "TIFF" or not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the metadata are damaged, but the pixels may be intact
        return 1
    return orientation if orientation in _UPRIGHT_VIEWS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (height, width) of the upright image."""
    return (image.width, image.height) if orientation_of(image) > 4 else (image.height, image.width)


def pixels_of(image: Image.Image, mode: str | None) -> np.ndarray:
    """Decode the upright pixels, (h, w) or (h, w, C), in 8 bits and the channels of ``mode``; None = values as stored.

    Raises:
        UnreadableImage: The image is damaged, or its values cannot be converted to 8 bits.
    """
    orientation = orientation_of(image)
    try:
        if mode is None:
            factor = _grey_factor(image)
            pixels = np.asarray(image)
            if pixels.dtype.byteorder == ">":
                pixels = pixels.astype(pixels.dtype.newbyteorder("="))
            pixels = pixels if factor == 1 else pixels // np.uint8(factor)
        else:
            pixels = np.asarray(image if mode == image.mode else in_mode(image, mode))
    except UnreadableImage:
        raise
    except Exception as error:  # parsers raise many types of errors for damaged files
        raise UnreadableImage(f"a damaged image: {error}") from error
    return pixels if orientation == 1 else _UPRIGHT_VIEWS[orientation](pixels)


def _grey_factor(image: Image.Image) -> int:
    """Return the factor by which Pillow will multiply the values of an image that is not decoded yet."""
    if image.format == "PNG" and getattr(image, "tile", None):
        return _GREY_FACTORS.get(image.tile[0][3], 1)  # type: ignore[attr-defined]
    return 1


def upright(image: Image.Image, mode: str | None) -> Image.Image:
    """Return the upright image, like :func:`pixels_of`.

    Raises:
        UnreadableImage: The image is damaged, or its values cannot be converted to 8 bits.
    """
    try:
        factor = _grey_factor(image) if mode is None else 1
        image.load()
        rotated = image if orientation_of(image) == 1 else ImageOps.exif_transpose(image)
        if factor > 1:
            return Image.fromarray(np.asarray(rotated) // np.uint8(factor))
        return rotated if mode in (None, rotated.mode) else in_mode(rotated, mode)
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"a damaged image: {error}") from error


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert ``image`` to the 8-bit ``mode``.

    Palettes are resolved and transparency is dropped, as in Pillow. Unlike Pillow, which clips most values to white or
    black, 16-bit grey is scaled from 0 … 65535, and floating-point grey from 0 … 1.

    Raises:
        UnreadableImage: Values are outside these ranges.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise UnreadableImage(f"expected grey of 16 bits, 0 to 65535, not {values.min()} to {values.max()}")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # also rejects NaN
            raise UnreadableImage(f"expected grey of floats from 0 to 1, not {values.min()} to {values.max()}")
        image = Image.fromarray(np.round(values * 255).astype(np.uint8))
    elif image.mode in ("RGBa", "La"):  # premultiplied alpha
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    return image if image.mode == mode else image.convert(mode)


@functools.cache
def _simplejpeg() -> ModuleType | None:
    """Return the optional package that decodes JPEGs to the same pixels as Pillow in less time."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _turbo_pixels(content: bytes, stored: tuple[int, int], size: tuple[int, int]) -> np.ndarray | None:
    """Decode an upright JPEG in RGB with ``simplejpeg``.

    Args:
        content: Bytes of the file.
        stored: (height, width) of the image in the file.
        size: (height, width) at which it is decoded: ``stored``, or as in Pillow's draft mode.

    Returns:
        Pixels (h, w, 3); None if the package is not installed, or has anything to object to the file. Pillow then
        decides whether it can be read.
    """
    package = _simplejpeg()
    if package is None:
        return None
    height, width = size if size != stored else (0, 0)  # 0: not reduced
    pixels = np.empty((*size, 3), np.uint8)
    try:
        decoded = package.decode_jpeg(content, "RGB", min_height=height, min_width=width, buffer=pixels, strict=True)
    except ValueError:
        return None
    return pixels if decoded.shape == pixels.shape else None


class EncodedImage:
    """An image whose pixels are decoded on access; until then, only its header is read.

    Args:
        content: Bytes of the file.
        keep: Decode the image once at full resolution and keep the pixels. Otherwise it is decoded at each access, at
            the resolution that is requested.

    Attributes:
        shape: (height, width) of the upright image.
        mode: Pillow mode of the stored image.

    Raises:
        UnreadableImage: The content is not an image, or is too large.
    """

    def __init__(self, content: bytes, keep: bool = False):
        self.content, self._keep = content, keep
        self._opened: Image.Image | None = None
        self._kept: dict[str | None, np.ndarray] = {}
        self.mode, self._is_upright_jpeg = "RGB", True
        size = plain_jpeg_size(content)
        if size is None:
            self._opened = image = open_image(content)
            self.mode, size = image.mode, upright_size(image)
            self._is_upright_jpeg = image.format == "JPEG" and orientation_of(image) == 1
        self.shape = size

    def pixels(self, mode: str | None, scale: int = 1) -> np.ndarray:
        """Return the pixels, (h, w) or (h, w, C), which callers must not modify.

        Args:
            mode: Pillow mode to convert to; None = as stored.
            scale: Factor (1, 2, 4 or 8) by which a JPEG that is not kept may be smaller than stored.

        Raises:
            UnreadableImage: The image is damaged, or its values cannot be converted to ``mode``.
        """
        if mode in self._kept:
            return self._kept[mode]
        opened, self._opened = self._opened, None
        scale = 1 if self._keep else scale
        pixels = None
        if self._is_upright_jpeg and self.mode == mode == "RGB":
            height, width = self.shape
            pixels = _turbo_pixels(self.content, self.shape, (-(-height // scale), -(-width // scale)))
        if pixels is None:
            image = opened or open_image(self.content)
            if scale > 1:
                image.draft(None, (image.width // scale, image.height // scale))  # type: ignore[arg-type]
            pixels = pixels_of(image, mode)
        if self._keep:
            self._kept[mode] = pixels
        return pixels
