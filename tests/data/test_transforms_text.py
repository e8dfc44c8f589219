"""Captions, boxes, metadata, palettes and token rows: values by hand."""

import numpy as np
import pytest

from fourm.data.modality_transforms import (
    CaptionTransform,
    ColorPaletteTransform,
    DetectionTransform,
    MetadataTransform,
    TokTransform,
)
from fourm.utils.errors import DataError


def run(transform, value, crop=None, flip=False, orig=None, index=None, seed=0):
    value = transform.image_augment(transform.preprocess(value), crop, flip, orig, None, index)
    return transform.postprocess(transform.choose(value, np.random.default_rng(seed)))


def boxes(*items):
    return {"instances": [{"boxes": box, "class_name": name, "score": score} for box, name, score in items]}


def test_boxes_become_words_nearest_to_the_top_left_first():
    value = boxes(
        ([0.5, 0.5, 1.0, 1.0], "cat", 0.9), ([0.1, 0.2, 0.3, 0.4], "fire hydrant", 0.6), ([0, 0, 1, 1], "dog", 0.59)
    )
    assert (
        run(DetectionTransform(), value) == "v0=100 v1=200 v2=300 v3=400 fire hydrant v0=500 v1=500 v2=999 v3=999 cat"
    )


def test_boxes_are_expressed_in_the_crop_clipped_and_mirrored():
    # Image 100 high, 200 wide; the crop takes rows 20-70 and columns 40-140.
    value = boxes(([0.1, 0.1, 0.4, 0.45], "cat", 1.0))  # columns 20-80, rows 10-45
    crop, orig = (20, 40, 50, 100), (100, 200)
    assert run(DetectionTransform(), value, crop, False, orig) == "v0=0 v1=0 v2=400 v3=500 cat"
    assert run(DetectionTransform(), value, crop, True, orig) == "v0=599 v1=0 v2=999 v3=500 cat"


def test_boxes_without_any_area_left_are_dropped():
    outside = ([0.0, 0.0, 0.2, 0.2], "a", 1.0)  # touches the crop's corner only
    flat = ([0.5, 0.5, 0.5, 0.9], "b", 1.0)
    inside = ([0.3, 0.3, 0.4, 0.4], "c", 1.0)
    assert run(DetectionTransform(), boxes(outside, flat, inside), (20, 20, 80, 80), False, (100, 100)).endswith("c")
    assert run(DetectionTransform(), boxes(outside, flat), (20, 20, 80, 80), False, (100, 100)) == ""
    assert run(DetectionTransform(), boxes()) == ""


def test_order_follows_the_mirrored_corner():
    value = boxes(([0.0, 0.1, 0.2, 0.2], "left", 1.0), ([0.8, 0.1, 1.0, 0.2], "right", 1.0))
    words = run(DetectionTransform(), value, flip=True).split()
    assert words[4::5] == ["right", "left"]


def test_boxes_without_a_score_count_as_certain_and_malformed_ones_are_errors():
    assert run(DetectionTransform(), {"instances": [{"boxes": [0, 0, 1, 1], "class_name": "cat"}]}).endswith("cat")
    with pytest.raises(DataError, match=r"\[0, 0, 1\]"):
        run(DetectionTransform(), boxes(([0, 0, 1], "cat", 1.0)))


def test_boxes_cannot_follow_a_crop_of_an_unknown_image():
    with pytest.raises(DataError, match="main_augment_domain"):
        run(DetectionTransform(), boxes(([0, 0, 1, 1], "cat", 1.0)), (0, 0, 5, 5))


@pytest.mark.parametrize("value", ["a dog", {"caption": "a dog"}, ["a dog"], [{"caption": "a dog"}]])
def test_every_form_of_a_caption_is_read(value):
    assert run(CaptionTransform(), value, index=0) == "a dog"
    assert run(CaptionTransform(), value, index=3) == "a dog"  # one caption serves all crops


def test_aligned_captions_follow_the_stored_crop():
    value = [{"caption": str(i)} for i in range(5)]
    assert [run(CaptionTransform(), value, index=i) for i in range(5)] == list("01234")
    with pytest.raises(DataError, match="only 5 crops"):
        run(CaptionTransform(), value, index=5)


def test_other_captions_are_drawn_at_random():
    drawn = {run(CaptionTransform(aligned_captions=False), list("abc"), index=0, seed=seed) for seed in range(30)}
    assert drawn == set("abc")
    assert {run(CaptionTransform(), list("abc"), seed=seed) for seed in range(30)} == set("abc")  # no stored crops


@pytest.mark.parametrize("value", [[], 3, ["a", 4]])
def test_what_is_no_caption_is_an_error(value):
    with pytest.raises(DataError, match="caption"):
        run(CaptionTransform(), value)


def test_metadata_values_are_binned_as_published():
    value = {
        "original_width": 1000,
        "original_height": 31,
        "caption_n_chars": 1234,
        "n_humans": 2,
        "semantic_diversity": 5,
        "colorfulness": 75,
        "brightness": 255,
        "contrast": 200,
        "entropy": -1,
        "geometric_complexity": 0.375,
        "occlusion_score": 0.1,
        "watermark_score": 0.5,
        "aesthetic_score": 5.4,
    }
    assert run(MetadataTransform(shuffle=False), value) == [
        "v1=0 v0=31",
        "v1=1 v0=0",
        "v1=2 v0=999",
        "v1=5 v0=2",
        "v1=16 v0=5",
        "v1=9 v0=24",
        "v1=10 v0=49",
        "v1=11 v0=49",
        "v1=13 v0=0",
        "v1=17 v0=24",
        "v1=18 v0=19",
        "v1=19 v0=1",
        "v1=20 v0=1",
    ]
    for score, expected in ((4.4, 0), (4.5, 1), (5.5, 2)):
        assert run(MetadataTransform(), {"aesthetic_score": score}) == [f"v1=20 v0={expected}"]
    assert run(MetadataTransform(), {"watermark_score": 0.49}) == ["v1=19 v0=0"]


def test_metadata_is_shuffled_by_the_generator():
    value = {"n_humans": 1, "brightness": 1, "contrast": 1, "entropy": 1}
    orders = {tuple(run(MetadataTransform(), value, seed=seed)) for seed in range(20)}
    assert len(orders) > 5 and len({tuple(sorted(order)) for order in orders}) == 1


def test_bad_metadata_is_named():
    with pytest.raises(DataError, match="'brightnes'.*brightness"):
        run(MetadataTransform(), {"brightnes": 1})
    with pytest.raises(DataError, match="'entropy' must be a number, not 'high'"):
        run(MetadataTransform(), {"entropy": "high"})


def test_a_palette_has_one_to_seven_colours():
    value = [{str(n): [[n, i, 255] for i in range(n)] for n in range(1, 8)}]
    texts = [run(ColorPaletteTransform(), value, seed=seed) for seed in range(60)]
    assert {text.split()[0] for text in texts} == {f"v1={n}" for n in range(1, 8)}
    assert "v1=2 v0=2 v0=0 v0=255 v0=2 v0=1 v0=255" in texts


def test_token_rows_follow_the_stored_crop():
    rows = np.arange(12, dtype=np.int16).reshape(3, 4)
    np.testing.assert_array_equal(run(TokTransform(), rows, index=2), [8, 9, 10, 11])
    assert run(TokTransform(), rows.reshape(3, 2, 2), index=1).shape == (2, 2)
    assert run(TokTransform(), rows, index=0).dtype == np.int64


def test_codes_without_crops_are_taken_whole():
    np.testing.assert_array_equal(run(TokTransform(per_crop=False), np.array([5, 6]), index=1), [5, 6])


@pytest.mark.parametrize(
    ("options", "value", "index", "message"),
    [
        ({}, [[1, 2]], None, "crop_settings"),
        ({}, [[1, 2]], 1, "only 1 crops"),
        ({}, [[1.0, 2.0]], 0, "whole numbers"),
        ({"num_tokens": 4}, [[1, 2]], 0, "expected 4 tokens, found 2"),
        ({"vocab_size": 8}, [[7, 8]], 0, "token id 8 lies outside the vocabulary of 8"),
        ({"vocab_size": 8}, [[7, -1]], 0, "token id -1"),
        ({"vocab_size": 8, "vocab_offset": 4}, [[3, 4]], 0, "token id 4 lies outside the vocabulary of 4"),
    ],
)
def test_bad_tokens_are_named(options, value, index, message):
    with pytest.raises(DataError, match=message):
        run(TokTransform(**options), np.array(value), index=index)
