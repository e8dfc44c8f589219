"""Pixels follow the crop, the flip and the target size; encoded, PIL and array inputs agree."""

import io

import numpy as np
import pytest
from PIL import Image

from fourm.data.modality_transforms import (
    DepthTransform,
    MaskTransform,
    NormalTransform,
    PixelTransform,
    RGBTransform,
    SemsegTransform,
)
from fourm.data.transforms.image import IMAGENET_MEAN, IMAGENET_STD, cut, image_size, resize
from fourm.utils.errors import DataError, UserError


def smooth_picture(height, width, channels=3, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), np.uint8)
    picture = Image.fromarray(coarse if channels == 3 else coarse[..., 0]).resize((width, height), Image.BICUBIC)
    return np.asarray(picture)


def encode(array, kind):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def augment(transform, value, crop=None, flip=False, orig=None, size=None, **options):
    return transform.image_augment(value, crop, flip, orig, size, None, **options)


def test_rgb_equals_crop_resize_flip_normalise_step_by_step():
    array = smooth_picture(90, 120)
    crop = (11, 7, 61, 83)
    got = RGBTransform().postprocess(augment(RGBTransform(), encode(array, "PNG"), crop, True, (90, 120), (32, 32)))
    expected = Image.fromarray(array).crop((7, 11, 90, 72)).resize((32, 32), Image.BICUBIC)
    expected = np.asarray(expected.transpose(Image.FLIP_LEFT_RIGHT), np.float64) / 255
    expected = ((expected - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    assert got.dtype == np.float32 and got.shape == (3, 32, 32) and got.flags.c_contiguous
    np.testing.assert_allclose(got, expected, atol=2.1 / 255 / 0.224)


def test_normalisation_is_exact_for_every_level():
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    got = RGBTransform().postprocess(levels)
    for channel in range(3):
        expected = (np.arange(256) / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        np.testing.assert_allclose(got[channel, 0], expected, atol=1e-6)
    tokenizer = RGBTransform(imagenet_default_mean_and_std=False).postprocess(levels)
    np.testing.assert_allclose(tokenizer[0, 0], np.arange(256) / 127.5 - 1, atol=1e-6)


def test_bytes_pil_and_arrays_give_the_same_pixels():
    array = smooth_picture(60, 80)
    inputs = [encode(array, "PNG"), Image.fromarray(array), array]
    results = [augment(RGBTransform(), value, (5, 5, 40, 50), False, (60, 80), (16, 24)) for value in inputs]
    assert results[0].shape == (16, 24, 3)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_stored_mode_becomes_rgb(mode):
    picture = Image.fromarray(smooth_picture(20, 20)).convert(mode)
    assert RGBTransform().postprocess(augment(RGBTransform(), picture, size=(8, 8))).shape == (3, 8, 8)


def test_draft_decoding_looks_the_same_and_spares_most_pixels():
    array = smooth_picture(480, 640)
    jpeg, crop = encode(array, "JPEG"), (37, 51, 401, 503)
    assert cut(jpeg, crop, target_size=(32, 32)).shape[0] < 401 / 3
    draft = augment(RGBTransform(), jpeg, crop, False, None, (32, 32)).astype(float)
    full = augment(RGBTransform(), Image.open(io.BytesIO(jpeg)), crop, False, None, (32, 32)).astype(float)
    assert abs(draft - full).mean() < 2.5


def test_draft_decoding_needs_four_times_the_target():
    jpeg = encode(smooth_picture(256, 256), "JPEG")
    assert cut(jpeg, (0, 0, 256, 256), target_size=(64, 64)).shape == (128, 128, 3)
    assert cut(jpeg, (0, 0, 255, 256), target_size=(64, 64)).shape == (255, 256, 3)


def test_an_image_handed_in_keeps_its_size():
    picture = Image.open(io.BytesIO(encode(smooth_picture(256, 256), "JPEG")))
    augment(RGBTransform(), picture, (0, 0, 200, 200), size=(8, 8))
    assert picture.size == (256, 256)


def test_crop_scales_to_a_modality_stored_at_another_resolution():
    small, large = np.zeros((2, 50, 100), np.uint8)[0], np.zeros((100, 200), np.uint8)
    small[10:30, 20:60], large[20:60, 40:120] = 255, 255
    for array in (small, large):
        assert (cut(array, (20, 40, 40, 80), orig_size=(100, 200)) == 255).all()


@pytest.mark.parametrize("crop", [(0, 0, 21, 10), (-1, 0, 5, 5), (0, 15, 5, 6), (0, 0, 0, 5)])
def test_a_crop_outside_the_image_is_an_error_with_its_numbers(crop):
    with pytest.raises(DataError, match=f"top {crop[0]}, left {crop[1]}, {crop[2]}x{crop[3]}.*20x20"):
        cut(np.zeros((20, 20), np.uint8), crop)


def test_image_size_reads_the_header_only():
    whole = encode(smooth_picture(40, 70), "JPEG")
    assert image_size(whole[:700]) == (40, 70)


@pytest.mark.parametrize("size", [(5, 9), (13, 4), (64, 64)])
def test_resize_agrees_with_pil(size):
    array = smooth_picture(31, 47).copy()
    for mode, pil in (("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR), ("nearest", Image.NEAREST)):
        expected = np.asarray(Image.fromarray(array).resize(size[::-1], pil)).astype(int)
        assert abs(resize(array, size, mode) - expected).max() <= (0 if mode == "nearest" else 2)


def test_unknown_resample_mode_is_named():
    with pytest.raises(UserError, match="nearest, bilinear, bicubic, not 'cubic'"):
        augment(RGBTransform(), np.zeros((4, 4, 3), np.uint8), resample_mode="cubic")


def test_color_jitter_changes_pixels_reproducibly():
    image, jitter = smooth_picture(16, 16), RGBTransform(color_jitter=0.5)
    first, again = (jitter.choose(image, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.uint8 and abs(first.astype(int) - image).mean() > 1
    assert RGBTransform().choose(image, np.random.default_rng(3)) is image
    flat = np.full((4, 4, 3), 100, np.uint8)  # only brightness acts on a grey image: at most ±50 %
    values = [jitter.choose(flat, np.random.default_rng(seed)) for seed in range(50)]
    assert all(v.min() >= 49 and v.max() <= 151 and (v == v[0, 0, 0]).all() for v in values)


def test_depth_is_the_share_of_sixteen_bits():
    depth = np.array([[0, 65535], [13107, 32768]], np.uint16)
    got = DepthTransform(standardize_depth=False)
    got = got.postprocess(augment(got, encode(depth, "PNG"), flip=True))
    np.testing.assert_allclose(got, [[[1.0, 0.0], [32768 / 65535, 0.2]]], rtol=1e-6)
    assert got.dtype == np.float32


def test_standardised_depth_ignores_the_outer_tenths():
    depth = np.linspace(10000, 20000, 100).astype(np.uint16).reshape(10, 10)
    middle = np.sort(depth.ravel() / 65535)[10:90]
    expected = (depth / 65535 - middle.mean()) / np.sqrt(middle.var(ddof=1) + 1e-6)
    got = DepthTransform().postprocess(augment(DepthTransform(), depth))
    np.testing.assert_allclose(got[0], expected, rtol=1e-4)
    extreme = depth.copy()
    extreme[0, :5], extreme[-1, -5:] = 0, 65535
    again = DepthTransform().postprocess(augment(DepthTransform(), extreme))
    np.testing.assert_allclose(again[0, 1:9], got[0, 1:9], rtol=1e-4)


def test_depth_of_eight_bits_is_refused():
    with pytest.raises(DataError, match="16 bits"):
        augment(DepthTransform(), np.zeros((4, 4), np.uint8))


def test_mirrored_normals_turn_their_x_around():
    transform = NormalTransform()
    image = np.full((8, 8, 3), 128, np.uint8)
    image[:, :4, 0] = 255  # the left half looks to the right
    plain, mirrored = (transform.postprocess(augment(transform, image, flip=flip)) for flip in (False, True))
    np.testing.assert_allclose(plain[0, :, :4], 1.0, atol=1e-6)
    np.testing.assert_allclose(mirrored[0, :, 4:], -1.0, atol=1e-6)  # now the right half looks to the left
    np.testing.assert_allclose(mirrored[0], -plain[0, :, ::-1], atol=1e-6)
    np.testing.assert_allclose(mirrored[1:], plain[1:, :, ::-1])


def test_class_ids_are_never_averaged():
    ids = np.kron(np.array([[3, 200], [133, 7]], np.uint8), np.ones((50, 50), np.uint8))
    got = SemsegTransform().postprocess(
        augment(SemsegTransform(), encode(ids, "PNG"), (5, 5, 90, 90), True, None, (9, 9))
    )
    assert got.dtype == np.int64 and got.shape == (9, 9) and set(np.unique(got)) == {3, 200, 133, 7}
    assert got[0, 0] == 200 and got[-1, 0] == 7


def test_masks_are_valid_only_where_they_are_white():
    mask = np.array([[255, 254], [0, 255]], np.uint8)
    np.testing.assert_array_equal(MaskTransform().postprocess(augment(MaskTransform(), mask)), [[[1, 0], [0, 1]]])
    binary = Image.fromarray(mask > 254)
    got = MaskTransform().postprocess(augment(MaskTransform(), binary, flip=True))
    np.testing.assert_array_equal(got, [[[0, 1], [1, 0]]])
    assert got.dtype == np.bool_


def test_one_channel_pixels_are_normalised_to_minus_one_and_one():
    edges = np.array([[0, 255]], np.uint8)
    np.testing.assert_allclose(PixelTransform().postprocess(augment(PixelTransform(), edges)), [[[-1, 1]]], atol=1e-6)


def test_channel_count_is_checked_when_bound_and_when_read():
    with pytest.raises(UserError, match="rgbx.*num_channels is 1.*gives 3"):
        RGBTransform().bind({"name": "rgbx", "num_channels": 1, "transform": "rgb", "input_size": 32})
    with pytest.raises(DataError, match="3 channels of 8 bits, not 1 of float32"):
        augment(RGBTransform(), np.zeros((4, 4), np.float32))


def test_a_picture_that_nobody_cropped_can_be_postprocessed():
    array = smooth_picture(10, 12)
    assert RGBTransform().postprocess(encode(array, "PNG")).shape == (3, 10, 12)


def test_load_reads_a_file_without_decoding_it(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(smooth_picture(10, 12), "PNG"))
    assert image_size(RGBTransform().load(path)) == (10, 12)


@pytest.mark.parametrize("flip", [False, True])
def test_levels_are_normalised_by_one_multiplication_and_one_addition(flip):
    levels = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)[:, :: -1 if flip else 1]
    transform = RGBTransform()
    scale, bias = (np.array(values, np.float32) for values in transform.scaling)
    expected = np.float32(levels * scale) + bias  # rounded after each step
    got = transform.postprocess(levels)
    assert got.dtype == np.float32 and got.flags.c_contiguous and np.array_equal(got, expected.transpose(2, 0, 1))
    assert np.array_equal(RGBTransform(raw=True).postprocess(levels), levels.transpose(2, 0, 1))


@pytest.mark.parametrize("target", [None, (40, 50), (16, 24)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_not_copied_before_it_is_resized_and_the_result_is_always_a_copy(target, flip):
    before, crop = smooth_picture(60, 80), (5, 5, 40, 50)
    array = before.copy()
    assert np.shares_memory(cut(array, crop), array)
    augment(RGBTransform(), array, crop, flip, (60, 80), target)[:] = 0
    assert np.array_equal(array, before)
    array.flags.writeable = False  # such as pixels from Pillow
    augment(RGBTransform(), array, crop, flip, (60, 80), target)[:] = 0
