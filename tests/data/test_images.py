"""Pictures are opened by a list of formats, upright, and in 8 bits; the four steps by hand give what they should."""

import io
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fourm.data.images import EncodedImage, UnreadableImage, open_image, plain_jpeg_size
from fourm.data.transforms.image import (
    DepthTransform,
    NormalTransform,
    PixelTransform,
    RGBTransform,
    SemsegTransform,
    cut,
    image_size,
)
from fourm.utils.errors import DataError, UnreadableValue, UserError

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def encode(image, kind="PNG", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def held(orientation, kind="PNG", pixels=PIXELS):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(pixels, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def test_no_program_is_started_by_a_picture(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 48\n%%EndComments\n{} loop\n%%EOF\n"
    with pytest.raises(UnreadableImage, match="JPEG, PNG"):
        EncodedImage(eps)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    "orientation, turned",
    [
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, np.rot90(PIXELS, 2)),
        (4, PIXELS[::-1]),
        (5, PIXELS.swapaxes(0, 1)),
        (6, np.rot90(PIXELS, -1)),
        (7, np.rot90(PIXELS, 2).swapaxes(0, 1)),
        (8, np.rot90(PIXELS)),
    ],
)
def test_pictures_are_upright_on_all_paths(tmp_path, kind, orientation, turned):
    content = held(orientation, kind)
    (tmp_path / f"a.{kind.lower()}").write_bytes(content)
    loaded = RGBTransform().load(tmp_path / f"a.{kind.lower()}")
    for picture in (content, EncodedImage(content), EncodedImage(content, keep=True), open_image(content), loaded):
        assert image_size(picture) == turned.shape[:2]
        np.testing.assert_array_equal(cut(picture, None, mode="RGB"), turned)


def test_a_turned_jpeg_is_still_decoded_coarsely():
    pixels = np.kron(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6), np.ones((64, 64), np.uint8))
    got = cut(held(6, "JPEG", pixels), (0, 0, 384, 256), target_size=(48, 32), mode="L")
    assert got.shape == (96, 64)
    assert abs(got.astype(int) - np.rot90(pixels, -1)[::4, ::4]).max() <= 3


GREY = np.array([[0, 257 * 10], [257 * 200, 65535]], np.uint16)


@pytest.mark.parametrize(
    "picture",
    [
        encode(GREY),
        encode(GREY, "TIFF"),
        Image.fromarray(GREY),
        Image.fromarray(GREY.astype(np.int32)),
        encode(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
        encode((GREY / 65535).astype(np.float32), "TIFF"),
    ],
)
def test_grey_of_more_than_eight_bits_is_scaled(picture):
    expected = np.array([[0, 10], [200, 255]])
    np.testing.assert_array_equal(cut(picture, None, mode="L"), expected)
    np.testing.assert_array_equal(cut(picture, None, mode="RGB"), np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.5, -0.1])
def test_floats_without_a_range_are_refused(value):
    with pytest.raises(UnreadableImage, match="floats from 0 to 1"):
        RGBTransform().postprocess(encode(np.full((2, 2), value, np.float32), "TIFF"))


def palette(transparent=None):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return encode(image, **({} if transparent is None else {"transparency": transparent}))


@pytest.mark.parametrize(
    "content, expected",
    [
        (palette(), [[10, 20, 30], [40, 50, 60]]),
        (palette(1), [[10, 20, 30], [40, 50, 60]]),
        (encode(np.array([[[9, 0], [200, 255]]], np.uint8)), [[9] * 3, [200] * 3]),
        (encode(np.array([[[1, 2, 3, 0], [4, 5, 6, 128]]], np.uint8)), [[1, 2, 3], [4, 5, 6]]),
        (
            encode(Image.fromarray(np.array([[0, 0, 0, 0], [255, 0, 0, 0]], np.uint8)[None], "CMYK"), "TIFF"),
            [[255] * 3, [0, 255, 255]],
        ),
        (encode(Image.fromarray(np.array([[False, True]]))), [[0] * 3, [255] * 3]),
    ],
    ids=["palette", "transparent palette", "LA", "RGBA", "CMYK", "1 bit"],
)
def test_every_mode_has_its_colours(content, expected):
    np.testing.assert_array_equal(cut(content, None, mode="RGB")[0], expected)


def test_class_ids_are_places_in_a_palette_and_not_spread():
    np.testing.assert_array_equal(SemsegTransform().postprocess(palette()), [[0, 1], [2, 1]])
    ids = Image.fromarray(np.array([[0, 3, 1, 2]], np.uint8))
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for bits, row in ((2, b"\0\x36"), (4, b"\0\x03\x12")):
        header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
        png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
        if bits == 2:
            np.testing.assert_array_equal(SemsegTransform().postprocess(png), [[0, 3, 1, 2]])
        else:
            np.testing.assert_array_equal(SemsegTransform().postprocess(png), [[0, 3, 1, 2]])
    assert np.asarray(ids).shape == (1, 4)


def test_pictures_of_another_kind_are_refused():
    with pytest.raises(DataError, match="one channel of class ids"):
        SemsegTransform().postprocess(encode(PIXELS))
    with pytest.raises(DataError, match="grey"):
        NormalTransform().image_augment(encode(PIXELS[..., 0]), None, False, None, None, None)
    with pytest.raises(UnreadableValue, match="16 bits"):
        DepthTransform().postprocess(encode(GREY.astype(np.float32), "TIFF"))
    with pytest.raises(ValueError, match="-5"):
        DepthTransform().postprocess(np.array([[-5, 70000]], np.int32))
    with pytest.raises(UserError, match="nearest"):
        SemsegTransform().image_augment(palette(), None, False, None, None, None, resample_mode="bilinear")


def test_large_and_cut_off_pictures_are_refused_before_they_take_memory():
    file = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(file, "PNG")
    with pytest.raises(UnreadableImage, match="pixels"), pytest.warns(Image.DecompressionBombWarning):
        EncodedImage(file.getvalue())
    with pytest.raises(UnreadableImage):
        EncodedImage(encode(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))[:-2000]).pixels("RGB")


def test_pictures_that_do_not_show_the_same_are_not_cropped_alike():
    with pytest.raises(ValueError, match="40x20 pixels does not match the sample's image of 20x40"):
        cut(np.zeros((40, 20), np.uint8), (0, 0, 10, 10), orig_size=(20, 40))
    assert cut(np.zeros((83, 125), np.uint8), (0, 0, 333, 500), orig_size=(333, 500)).shape == (83, 125)


def test_the_steps_of_a_notebook(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(PIXELS))
    for default, expected in ((True, (PIXELS[0, 0] / 255 - 0.45) / 0.226), (False, PIXELS[0, 0] / 127.5 - 1)):
        transform = RGBTransform(imagenet_default_mean_and_std=default)
        image = transform.preprocess(transform.load(tmp_path / "a.png"))
        assert isinstance(image, Image.Image) and image.mode == "RGB"
        tensor = transform.postprocess(image.resize((6, 4))).unsqueeze(0)
        assert tensor.shape == (1, 3, 4, 6) and tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor[0, :, 0, 0], expected, atol=0.2 if default else 1e-6)
    (tmp_path / "d.png").write_bytes(encode(GREY))
    depth = DepthTransform(standardize_depth=False)
    tensor = depth.postprocess(depth.preprocess(depth.load(tmp_path / "d.png")))
    torch.testing.assert_close(tensor, torch.from_numpy(GREY / np.float32(65535))[None])
    assert SemsegTransform().postprocess(SemsegTransform().load(tmp_path / "d.png")).dtype == torch.int64


@pytest.mark.parametrize(
    "transform, value",
    [
        (RGBTransform(), np.zeros((4, 4, 3), np.float32)),
        (RGBTransform(), np.zeros((3, 4, 4), np.uint8)),
        (PixelTransform(), np.zeros((4, 4), np.float32)),
        (DepthTransform(), np.zeros((4, 4), np.uint8)),
        (DepthTransform(), np.full((4, 4), 0.5, np.float32)),
        (DepthTransform(), np.full((4, 4), np.nan, np.float32)),
        (SemsegTransform(), np.full((4, 4), 1.5)),
    ],
)
def test_values_of_another_range_are_not_taken_for_pixels(transform, value):
    with pytest.raises((DataError, UnreadableValue), match="expected"):
        transform.postprocess(value)


def photograph(height=93, width=141, mode="RGB"):
    coarse = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC).convert(mode)


def turbo_calls(monkeypatch):
    """Returns the list to which each file is added that simplejpeg decodes, in place of Pillow."""
    package, calls = pytest.importorskip("simplejpeg"), []
    decode = package.decode_jpeg

    def spied(content, *arguments, **options):
        pixels = decode(content, *arguments, **options)
        calls.append(content)
        return pixels

    monkeypatch.setattr(package, "decode_jpeg", spied)
    return calls


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(93, 141), (64, 96), (33, 17)])
def test_jpegs_are_decoded_to_the_pixels_of_pillow(monkeypatch, scale, size):
    calls = turbo_calls(monkeypatch)
    files = [encode(photograph(*size), "JPEG", quality=90, subsampling=kind) for kind in (0, 1, 2)]
    files += [encode(photograph(*size), "JPEG", quality=50, **{how: True}) for how in ("progressive", "keep_rgb")]
    for kind in ("440", "411"):
        files.append(sys.modules["simplejpeg"].encode_jpeg(np.asarray(photograph(*size)), 90, "RGB", kind))
    for content in files:
        image = Image.open(io.BytesIO(content))
        image.draft(None, (image.width // scale, image.height // scale))
        got = EncodedImage(content).pixels("RGB", scale)
        assert np.array_equal(got, np.asarray(image)) and got.dtype == np.uint8
    assert calls == files


def test_other_and_damaged_jpegs_are_left_to_pillow(monkeypatch):
    calls = turbo_calls(monkeypatch)
    pictures = [
        encode(photograph(mode="L"), "JPEG"),
        encode(photograph(mode="CMYK"), "JPEG"),
        encode(photograph(), "PNG"),
    ]
    for content in [*pictures, held(6, "JPEG", np.asarray(photograph()))]:
        pixels = EncodedImage(content).pixels("RGB")
        assert pixels.shape in ((93, 141, 3), (141, 93, 3))
    whole = encode(photograph(), "JPEG")
    with pytest.raises(UnreadableImage, match="^a damaged image: image file is truncated"):
        EncodedImage(whole[: len(whole) // 2]).pixels("RGB")
    padded = EncodedImage(whole[:-2] + bytes(9) + whole[-2:]).pixels("RGB")  # Pillow can read it
    assert not calls and np.array_equal(padded, EncodedImage(whole).pixels("RGB")) and calls == [whole]


def opened_by_pillow(content):
    try:
        image = open_image(content)
    except UnreadableImage:
        return None
    return image.format, image.mode, (image.height, image.width)


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"optimize": True, "subsampling": 0}], ids=str)
def test_a_plain_jpeg_is_what_pillow_says_however_its_header_is_damaged(how):
    whole = encode(photograph(37, 53), "JPEG", **how)
    assert plain_jpeg_size(whole) == (37, 53)
    header = whole.index(b"\xff\xda") + 14
    changed = [whole[:at] for at in range(header)]
    for at in range(header):
        before, after = whole[:at], whole[at + 1 :]
        changed += [before + bytes([byte]) + after for byte in {0, 0xC0, 0xDA, 0xE1, 0xFF, whole[at] ^ 1} - {whole[at]}]
        changed += [before + after, before + b"\xff" + whole[at:]]
    accepted = [content for content in changed if plain_jpeg_size(content)]
    assert len(accepted) > 100
    for content in accepted:
        assert opened_by_pillow(content) == ("JPEG", "RGB", plain_jpeg_size(content))


def test_an_uncommon_jpeg_is_left_to_pillow():
    uncommon = [
        encode(photograph(mode="L"), "JPEG"),
        encode(photograph(mode="CMYK"), "JPEG"),
        encode(photograph(), "JPEG", keep_rgb=True),
        encode(photograph(), "JPEG", comment=b"x"),
        held(6, "JPEG", np.asarray(photograph())),
        encode(photograph(), "PNG"),
    ]
    for content in uncommon:
        assert plain_jpeg_size(content) is None
        assert EncodedImage(content).mode == open_image(content).mode
