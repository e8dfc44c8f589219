"""Where crops lie, which one is drawn, and that a sample's modalities share it."""

import numpy as np
import pytest

from fourm.data.image_augmenter import (
    CenterCropImageAugmenter,
    EmptyAugmenter,
    PreTokenizedImageAugmenter,
    RandomCropImageAugmenter,
    center_crop,
    random_crop,
)
from fourm.utils.errors import DataError

IMAGE = {"rgb@224": np.zeros((100, 160, 3), np.uint8)}


def test_center_crop_is_the_largest_of_its_shape():
    assert center_crop((100, 160)) == (0, 30, 100, 100)
    assert center_crop((160, 100)) == (30, 0, 100, 100)
    assert center_crop((100, 160), ratio=2.0) == (10, 0, 80, 160)
    augmentation = CenterCropImageAugmenter(64, main_domain="rgb@224")(IMAGE)
    assert augmentation == ((0, 30, 100, 100), False, (100, 160), (64, 64), None)
    assert CenterCropImageAugmenter((32, 64), hflip=1.0, main_domain="rgb@224")(IMAGE)[:2] == ((10, 0, 80, 160), True)


def test_random_crops_keep_their_bounds_and_fill_them():
    generator = np.random.default_rng(0)
    crops = np.array([random_crop((100, 160), (0.2, 1.0), (3 / 4, 4 / 3), generator) for _ in range(2000)])
    top, left, h, w = crops.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 100).all() and (left + w <= 160).all()
    area, ratio = h * w / 16000, w / h
    assert 0.19 < area.min() < 0.22 and area.max() > 0.75
    assert 0.73 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.36
    assert top.max() > 40 and left.max() > 80 and top.min() == 0 and left.min() == 0


def test_a_crop_that_never_fits_falls_back_to_the_centre():
    top, left, h, w = random_crop((10, 1000), (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert (top, h) == (0, 10) and w == 13 and abs(left - 493) <= 1


def test_a_seed_decides_the_random_crop_and_hflip_how_often_it_is_mirrored():
    augmenter = RandomCropImageAugmenter(64, main_domain="rgb@224")
    draws = [augmenter(IMAGE, None, np.random.default_rng(seed)) for seed in range(200)]
    assert draws[:5] == [augmenter(IMAGE, None, np.random.default_rng(seed)) for seed in range(5)]
    assert len({draw.crop_coords for draw in draws}) > 190
    assert 70 < sum(draw.flip for draw in draws) < 130
    assert not any(
        RandomCropImageAugmenter(64, hflip=0.0, main_domain="rgb")(
            {"rgb": IMAGE["rgb@224"]}, None, np.random.default_rng(seed)
        ).flip
        for seed in range(20)
    )


def test_stored_crops_are_drawn_with_their_index():
    settings = np.array([[0, 30, 100, 100, 0], [5, 6, 70, 80, 1], [1, 2, 30, 40, 0]])
    augmenter = PreTokenizedImageAugmenter(64, main_domain="rgb@224")
    draws = {augmenter(IMAGE, settings, np.random.default_rng(seed)) for seed in range(30)}
    assert draws == {
        ((top, left, h, w), bool(flip), (100, 160), (64, 64), index)
        for index, (top, left, h, w, flip) in enumerate(settings.tolist())
    }


def test_without_augmentation_the_first_stored_crop_is_taken():
    settings = np.array([[1, 2, 3, 4, 0], [5, 6, 7, 8, 1]])
    augmenter = PreTokenizedImageAugmenter(64, no_aug=True, main_domain="rgb@224")
    assert {augmenter({}, settings, np.random.default_rng(seed)).rand_aug_idx for seed in range(10)} == {0}
    assert augmenter({}, settings).orig_size is None


@pytest.mark.parametrize(
    ("settings", "found"), [(None, "none"), (np.zeros((3, 4)), r"\(3, 4\)"), (np.zeros(5), r"\(5,\)")]
)
def test_bad_crop_settings_are_described(settings, found):
    with pytest.raises(DataError, match=f"crop_settings.*found.*{found}"):
        PreTokenizedImageAugmenter(64)({}, settings)


def test_a_missing_main_image_is_named():
    with pytest.raises(DataError, match=r"'rgb@448' is not an image of this sample \(caption\)"):
        RandomCropImageAugmenter(64, main_domain="rgb@448")({"caption": "a"})
    assert RandomCropImageAugmenter(64, main_domain="rgb@448")({"rgb": IMAGE["rgb@224"]}).orig_size == (100, 160)


def test_text_alone_needs_no_crop():
    assert EmptyAugmenter()({"caption": "a"}) == (None, False, None, None, None)
