"""A whole sample: every modality sees the same crop, flip and stored crop."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from fourm.data.image_augmenter import (
    CenterCropImageAugmenter,
    EmptyAugmenter,
    PreTokenizedImageAugmenter,
    RandomCropImageAugmenter,
)
from fourm.data.layout import CROP_SETTINGS, wanted_names
from fourm.data.modality_info import MODALITY_INFO, MODALITY_TRANSFORMS, resolve_modalities
from fourm.data.modality_transforms import (
    CaptionTransform,
    DepthTransform,
    UnifiedDataTransform,
    UnreadableValue,
    transforms_for,
)
from fourm.utils.errors import DataError, UserError

HEIGHT, WIDTH = 120, 160


def scene():
    """A bright object on a dark ground, as colour, depth, class ids and the box around it."""
    top, left, bottom, right = 48, 40, 96, 120
    rgb, depth = np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint16)
    rgb[top:bottom, left:right], depth[top:bottom, left:right] = 255, 65535
    box = [left / WIDTH, top / HEIGHT, right / WIDTH, bottom / HEIGHT]
    return {
        "rgb@64": Image.fromarray(rgb),
        "depth": depth,
        "semseg": (rgb[..., 0] > 0).astype(np.uint8) * 7,
        "det": {"instances": [{"boxes": box, "class_name": "cat", "score": 0.9}]},
    }


def bounds(visible):
    """xmin, ymin, xmax, ymax of what is visible, in [0, 1]; None if nothing is."""
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    if rows.size == 0:
        return None
    height, width = visible.shape
    return np.array([columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height])


def test_boxes_and_pixels_agree_under_random_crops_and_flips():
    transforms = {**MODALITY_TRANSFORMS, "depth": DepthTransform(standardize_depth=False)}
    transform = UnifiedDataTransform(transforms, RandomCropImageAugmenter(64, main_domain="rgb@64"))
    sample, whole = scene(), 0
    for seed in range(60):
        out = transform(sample, np.random.default_rng(seed))
        assert out["rgb@64"].shape == (3, 64, 64) and out["depth"].shape == (1, 64, 64)
        expected = bounds(out["rgb@64"][0] > 0.2)
        box = re.fullmatch(r"v0=(\d+) v1=(\d+) v2=(\d+) v3=(\d+) cat", out["det"])
        if expected is None or box is None:
            continue
        np.testing.assert_allclose(np.array([int(n) for n in box.groups()]) / 999, expected, atol=1.1 / 64)
        np.testing.assert_allclose(bounds(out["semseg"] == 7), expected, atol=1.1 / 64)
        np.testing.assert_allclose(bounds(out["depth"][0] > 0.5), expected, atol=1.1 / 64)
        whole += 1
    assert whole > 50


def pretokenized_sample():
    crops = np.array([[0, 30, 100, 100, 0], [0, 0, 80, 80, 1], [40, 80, 80, 80, 0]])
    ids = np.repeat(np.arange(3, dtype=np.int16)[:, None], 196, 1)
    return {
        **scene(),
        "tok_rgb@224": ids,
        "tok_semseg@224": ids + 10,
        "caption": ["zero", "one", "two"],
        "crop_settings": crops,
        "__key__": "000",
    }


def test_tokens_captions_pixels_and_boxes_follow_the_same_stored_crop():
    transform = UnifiedDataTransform(MODALITY_TRANSFORMS, PreTokenizedImageAugmenter(64, main_domain="rgb@64"))
    seen = set()
    for seed in range(20):
        out = transform(pretokenized_sample(), np.random.default_rng(seed))
        index = int(out["tok_rgb@224"][0])
        seen.add(index)
        assert (out["tok_semseg@224"] == index + 10).all() and out["caption"] == ("zero", "one", "two")[index]
        # Crop 1 sees columns 40-80 of 0-80, mirrored, and rows 48-80 of 0-80.
        # Crop 2 sees columns 80-120 of 80-160, and rows 48-96 of 40-120.
        det = {
            0: "v0=100 v1=480 v2=899 v3=959 cat",
            1: "v0=0 v1=599 v2=500 v3=999 cat",
            2: "v0=0 v1=100 v2=500 v3=699 cat",
        }[index]
        assert out["det"] == det
        assert out["__key__"] == "000" and "crop_settings" not in out
    assert seen == {0, 1, 2}


def test_a_seed_makes_a_sample_reproducible():
    transform = UnifiedDataTransform(MODALITY_TRANSFORMS, PreTokenizedImageAugmenter(64, main_domain="rgb@64"))
    first, again = (transform(pretokenized_sample(), np.random.default_rng(5)) for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])


def test_the_raw_sample_is_left_as_it_was():
    sample = pretokenized_sample()
    before = {name: np.array(value) if name != "det" else str(value) for name, value in sample.items()}
    UnifiedDataTransform(MODALITY_TRANSFORMS, PreTokenizedImageAugmenter(64, main_domain="rgb@64"))(sample)
    for name, value in before.items():
        np.testing.assert_array_equal(value, np.array(sample[name]) if name != "det" else str(sample[name]))


def test_each_modality_has_the_resolution_in_its_name():
    sample = {"rgb@64": scene()["rgb@64"], "rgb@32": scene()["rgb@64"], "normal": scene()["rgb@64"]}
    out = UnifiedDataTransform(MODALITY_TRANSFORMS, CenterCropImageAugmenter(16, main_domain="rgb@64"))(sample)
    assert [out[name].shape for name in sample] == [(3, 64, 64), (3, 32, 32), (3, 16, 16)]


def test_skipped_images_are_not_decoded():
    file = io.BytesIO()
    scene()["rgb@64"].save(file, "JPEG")
    broken = file.getvalue()[:-40]  # the header says the size, the pixels are cut off
    sample = {"rgb@64": broken, "det": scene()["det"]}
    transform = UnifiedDataTransform(MODALITY_TRANSFORMS, CenterCropImageAugmenter(64, main_domain="rgb@64"))
    out = transform(sample, skip={"rgb@64", "det"})
    assert out["rgb@64"].shape == (3, 64, 64) and out["rgb@64"].dtype == np.float32 and not out["rgb@64"].any()
    assert out["det"].endswith("cat")
    with pytest.raises(UnreadableValue, match="modality rgb@64: UnreadableImage.*truncated"):
        transform(sample)


def test_broken_values_name_their_modality():
    transform = UnifiedDataTransform(MODALITY_TRANSFORMS, EmptyAugmenter())
    with pytest.raises(UnreadableValue, match="modality det: no key instances"):
        transform({"det": {"boxes": []}})
    with pytest.raises(UnreadableValue, match="modality rgb@64: UnreadableImage: not an image"):
        transform({"rgb@64": b"not an image"})
    with pytest.raises(DataError, match="modality tok_rgb@224: .*crop_settings"):
        transform({"tok_rgb@224": np.zeros((2, 196), int)})


@pytest.mark.parametrize("name", ["tok_rgb@224", "caption"])
def test_values_must_match_the_number_of_stored_crops(name):
    sample = pretokenized_sample()
    sample[name] = sample[name][:2]
    transform = UnifiedDataTransform(MODALITY_TRANSFORMS, PreTokenizedImageAugmenter(64, main_domain="rgb@64"))
    with pytest.raises(DataError, match=f"modality {name}: .*2 crops, but crop_settings has 3"):
        transform(sample)


def test_bound_transforms_check_the_declared_vocabulary_and_count():
    bound = transforms_for({"tok_semseg@224": MODALITY_INFO["tok_semseg@224"]})
    transform = UnifiedDataTransform(bound, PreTokenizedImageAugmenter(224, no_aug=True))
    crops = np.array([[0, 0, 10, 10, 0]])
    with pytest.raises(DataError, match="modality tok_semseg@224: token id 4096 lies outside the vocabulary of 4096"):
        transform({"tok_semseg@224": np.full((1, 196), 4096), "crop_settings": crops})
    with pytest.raises(DataError, match="modality tok_semseg@224: expected 196 tokens, found 100"):
        transform({"tok_semseg@224": np.full((1, 100), 1), "crop_settings": crops})


def test_declared_modalities_find_their_transform():
    declarations = {
        "elevation": {"type": "img", "num_channels": 1, "input_size": 32, "patch_size": 8, "transform": "depth"},
        "tok_sonar@32": {"type": "img", "vocab_size": 9, "input_size": 32, "patch_size": 8},
        "notes": {"type": "seq", "max_tokens": 20},
        "codes": {"type": "seq_token", "vocab_size": 9, "max_tokens": 20},
    }
    bound = transforms_for(resolve_modalities(declarations, declarations))
    sample = {
        "elevation": scene()["depth"],
        "tok_sonar@32": np.full((1, 16), 8),
        "notes": "some words",
        "codes": np.array([1, 2, 3]),
        "crop_settings": np.array([[0, 0, 100, 100, 0]]),
    }
    out = UnifiedDataTransform(bound, PreTokenizedImageAugmenter(224, main_domain="elevation"))(sample)
    assert out["elevation"].shape == (1, 32, 32) and out["notes"] == "some words"
    np.testing.assert_array_equal(out["codes"], [1, 2, 3])
    np.testing.assert_array_equal(out["tok_sonar@32"], np.full(16, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "seq", "max_tokens": 9, "transform": "captoin"}, "no transform 'captoin'.*caption"),
        ({"type": "img", "num_channels": 1, "input_size": 32, "patch_size": 8}, "no transform 'new'.*'transform'"),
        (
            {"type": "img", "num_channels": 1, "input_size": 32, "patch_size": 8, "transform": "rgb"},
            "num_channels is 1",
        ),
    ],
)
def test_a_transform_that_does_not_exist_or_fit_is_an_error(fields, message):
    with pytest.raises(UserError, match=f"modality new: .*{message}"):
        transforms_for(resolve_modalities(["new"], {"new": fields}))


def test_every_modality_of_the_table_has_a_transform():
    assert transforms_for(MODALITY_INFO).keys() == MODALITY_INFO.keys()


def test_transform_options_are_fields_of_the_transform():
    declared = {"det": {"transform_options": {"det_threshold": 0.9}}}
    (transform,) = transforms_for(resolve_modalities(["det"], declared)).values()
    assert transform.det_threshold == 0.9
    for options, message in (
        ({"threshold": 1}, "unknown key 'threshold'.*det_threshold"),
        ({"det_threshold": "x"}, "a number"),
    ):
        with pytest.raises(UserError, match=f"modality det: transform_options: .*{message}"):
            transforms_for(resolve_modalities(["det"], {"det": {"transform_options": options}}))


def test_transforms_may_be_replaced_from_python():
    transforms = {**MODALITY_TRANSFORMS, "caption": CaptionTransform(aligned_captions=False)}
    out = {UnifiedDataTransform(transforms, EmptyAugmenter())({"caption": ["a", "b"]})["caption"] for _ in range(30)}
    assert out == {"a", "b"}
    with pytest.raises(UserError, match="modality captoin: no transform.*caption"):
        UnifiedDataTransform(transforms, EmptyAugmenter())({"captoin": "a"})


def test_tokens_need_no_crop_settings_where_nothing_else_needs_coordinates():
    modalities = {name: MODALITY_INFO[name] for name in ("tok_rgb@224", "tok_depth@224", "caption")}
    assert CROP_SETTINGS not in wanted_names(modalities)
    assert CROP_SETTINGS in wanted_names(modalities | {"det": MODALITY_INFO["det"]})
    transform = UnifiedDataTransform(transforms_for(modalities), PreTokenizedImageAugmenter(224))
    rows = np.repeat(np.arange(5, dtype=np.int16)[:, None], 196, axis=1)
    drawn = set()
    for seed in range(40):
        sample = transform({"tok_rgb@224": rows, "tok_depth@224": rows}, np.random.default_rng(seed))
        assert np.array_equal(sample["tok_rgb@224"], sample["tok_depth@224"])
        drawn.add(int(sample["tok_rgb@224"][0]))
    assert drawn == {0, 1, 2, 3, 4}
    assert np.array_equal(transform({"tok_rgb@224": rows[3]})["tok_rgb@224"], rows[3])
    with pytest.raises(DataError, match="5 of tok_rgb@224, 4 of tok_depth@224"):
        transform({"tok_rgb@224": rows, "tok_depth@224": rows[:4]})
