import io

import numpy as np
import pytest
from PIL import Image

from fourm.utils.errors import UserError
from fourm.vq.crops import draw_crops, tokenizer_transform


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (64, 64), (31, 200)])
def test_crops_lie_inside_and_begin_with_the_centre(size):
    for number in range(20):
        crops = draw_crops(f"key{number}", size, 8, 0.5, seed=0)
        top, left, height, width = crops[:, :4].T
        assert crops.shape == (8, 5)
        assert (top >= 0).all() and (left >= 0).all()
        assert (top + height <= size[0]).all() and (left + width <= size[1]).all()
        side = min(size)
        assert crops[0].tolist() == [(size[0] - side) // 2, (size[1] - side) // 2, side, side, 0]


def test_random_crops_have_the_published_scale_and_ratio():
    crops = np.concatenate([draw_crops(str(i), (400, 500), 10, 0.5, seed=0)[1:] for i in range(100)])
    share, ratio = crops[:, 2] * crops[:, 3] / (400 * 500), crops[:, 3] / crops[:, 2]
    assert share.min() > 0.19 and share.max() < 1.01 and share.std() > 0.15
    assert ratio.min() > 0.74 and ratio.max() < 1.35 and ratio.std() > 0.1
    assert 0.4 < crops[:, 4].mean() < 0.6
    assert not draw_crops("a", (40, 40), 10, 0.0, seed=0)[:, 4].any()


def test_crops_depend_on_seed_key_and_size_only():
    crops = draw_crops("a", (60, 100), 6, 0.5, seed=1)
    assert np.array_equal(crops, draw_crops("a", (60, 100), 6, 0.5, seed=1))
    assert np.array_equal(crops[:3], draw_crops("a", (60, 100), 3, 0.5, seed=1))
    assert not np.array_equal(crops, draw_crops("b", (60, 100), 6, 0.5, seed=1))
    assert not np.array_equal(crops, draw_crops("a", (60, 100), 6, 0.5, seed=2))


def _png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_tokenizers_see_colours_between_minus_one_and_one():
    extremes = _png(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8))
    assert tokenizer_transform("rgb", {}).postprocess(extremes)[0].tolist() == [[-1, 1]]


def test_transform_options_are_set_and_checked():
    depth = _png(np.array([[0, 65535]], np.uint16))
    plain = tokenizer_transform("depth", {"standardize_depth": False})
    assert plain.postprocess(depth)[0].tolist() == [[0, 1]]
    with pytest.raises(UserError, match=r"unknown option 'standardise_depth' \(did you mean 'standardize_depth'\?\)"):
        tokenizer_transform("depth", {"standardise_depth": False})
    for option in ("size", "color_jitter"):  # of the transform, but without effect here
        with pytest.raises(UserError, match=f"unknown option '{option}'"):
            tokenizer_transform("rgb", {option: 0.5})


@pytest.mark.parametrize("modality", ["caption", "tok_rgb", "dpeth", "CLIP-B16"])
def test_only_pixels_can_be_tokenized(modality):
    with pytest.raises(UserError, match=f"'{modality}' is not a modality of pixels"):
        tokenizer_transform(modality, {})


def test_a_tokenizer_of_an_unknown_modality_is_told_where_to_name_it():
    with pytest.raises(UserError, match="set 'modality' in its configuration; there are rgb"):
        tokenizer_transform("", {})
