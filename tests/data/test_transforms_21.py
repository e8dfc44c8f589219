"""People, instances, embeddings, grids, scalars and codebooks: values by hand, and back from published words."""

import numpy as np
import pytest

from fourm.data.modality_info import MODALITY_INFO, declare
from fourm.data.modality_transforms import (
    CaptionEmbTransform,
    CodebooksTransform,
    GridTransform,
    HumanPoseTransform,
    InstanceMaskTransform,
    MaskTransform,
    SAMInstanceTransform,
    ScalarTransform,
    transforms_for,
)
from fourm.data.transforms.instances import Polygons
from fourm.data.transforms.objects import BodyPoseTransform
from fourm.generation.sequences import SEQUENCES, read_words
from fourm.utils.errors import DataError, UnreadableValue, UserError
from fourm.utils.tokenizer import TextEncoder, load_text_tokenizer

VOCABULARY = load_text_tokenizer("fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json")
PERSON = {
    "box": [0.1, 0.2, 0.5, 1.0],
    "pose": [0, 511, 512, 1023, 1, 2, 3, 4],
    "global": [-1, 0, 1, -2, 0.5, 0, 0, 0, 0],
    "shape": [-3, 0, 3, 0, 0, 0, 0, 0, 0, 9],
    "camera": [-1, 9, 25],
}
BOX = "human v0=100 v1=200 v2=500 v3=999"
PARTS = {
    "pose v0=0 v0=511 v1=0 v1=511 v0=1 v0=2 v0=3 v0=4",
    "global v0=0 v0=500 v0=999 v0=0 v0=749 v0=500 v0=500 v0=500 v0=500",
    "shape v0=0 v0=500 v0=999 v0=500 v0=500 v0=500 v0=500 v0=500 v0=500 v0=999",
    "camera v0=0 v0=500 v0=999",
}


def run(transform, value, crop=None, flip=False, orig=None, index=None, seed=0):
    value = transform.image_augment(transform.preprocess(value), crop, flip, orig, None, index)
    return transform.postprocess(transform.choose(value, np.random.default_rng(seed)))


def back(kind, text):
    return SEQUENCES[kind](read_words(TextEncoder(VOCABULARY)(text), VOCABULARY)[0])


def split(text, head):
    """A text cut before each of the words in ``head``."""
    parts = []
    for word in text.split():
        if word in head:
            parts.append([])
        parts[-1].append(word)
    return [" ".join(part) for part in parts]


def test_people_become_words_with_their_parts_in_random_order():
    texts = [run(HumanPoseTransform(), [PERSON], seed=seed) for seed in range(20)]
    orders = set()
    for text in texts:
        box, *parts = split(text, {"human", "pose", "global", "shape", "camera"})
        assert box == BOX and set(parts) == PARTS
        orders.add(tuple(parts))
    assert len(orders) > 5
    assert run(HumanPoseTransform(), []) == run(HumanPoseTransform(), [[], []], index=1) == "none"
    assert len(texts[0].split()) == 39  # of 7 people and two more tokens, the published 275


def test_people_come_back():
    (found,), dropped = back("human_poses", run(HumanPoseTransform(), [PERSON]))
    assert dropped == 0 and found["pose"] == PERSON["pose"]
    np.testing.assert_allclose(found["box"], PERSON["box"], atol=1e-3)
    np.testing.assert_allclose(found["global"], np.clip(PERSON["global"], -1, 1), atol=2e-3)
    np.testing.assert_allclose(found["shape"], np.clip(PERSON["shape"], -3, 3), atol=4e-3)
    np.testing.assert_allclose(found["camera"], [-1, 9, 19], atol=2e-2)


def test_people_follow_the_crop_or_are_given_for_each():
    moved = run(
        HumanPoseTransform(), [{"box": PERSON["box"]}, {"box": [0.6, 0, 1, 1]}], (0, 0, 50, 50), False, (50, 100)
    )
    assert moved == "human v0=200 v1=200 v2=999 v3=999"
    per_crop = [[{"box": [0, 0, 1, 1]}], [{"box": PERSON["box"]}]]
    assert run(HumanPoseTransform(), per_crop, (0, 0, 9, 9), True, (9, 9), 1) == BOX
    assert run(HumanPoseTransform(), [[{"box": [-0.2, 0, 0.5, 1.3]}]], index=0) == "human v0=0 v1=0 v2=500 v3=999"
    with pytest.raises(DataError, match="cannot be mirrored"):
        run(HumanPoseTransform(), [PERSON], flip=True)
    for change in ({"pose": [1]}, {"pose": [1024] * 8}, {"camera": [1, 2]}, {"shape": ["a"] * 10}):
        with pytest.raises(DataError, match="expected"):
            run(HumanPoseTransform(), [PERSON | change])


SQUARE = {"points": [[0, 0], [112, 0], [112, 224], [0, 224]], "token_ids": [0, 511, 512, 1023, *range(12)]}
CODES = "v0=0 v0=511 v1=0 v1=511 " + " ".join(f"v0={i}" for i in range(12))
EVERYWHERE = {"points": np.array([[-1, -1], [300, -1], [300, 300], [-1, 300]]), "token_ids": np.arange(16)}


def test_points_have_the_polygons_around_them():
    rows = np.empty(2, object)
    rows[:] = [[], [SQUARE, EVERYWHERE]]
    found, orders = set(), set()
    for seed in range(10):
        text = run(SAMInstanceTransform(), rows, index=1, seed=seed)
        points = split(text, {"point"})
        assert len(points) == 7
        for part in points:
            point, *polygons = split(part, {"point", "polygon"})
            row, column = (int(word[3:]) for word in point.split()[1:])
            assert 0 <= row < 224 and 0 <= column < 224
            left = f"polygon v0=0 v1=0 v2=500 v3=999 {CODES}"
            whole = "polygon v0=0 v1=0 v2=999 v3=999 " + " ".join(f"v0={i}" for i in range(16))
            assert sorted(polygons) == ([left, whole] if column < 112 else [whole])
            found.add(column < 112)
            orders.add(tuple(polygons))
    assert found == {True, False} and len(orders) == 3
    texts = [run(SAMInstanceTransform(), rows, index=0, seed=seed) for seed in (0, 1)]
    assert texts[0] != texts[1] and texts[0].count("none") == 7


def crossings(outline, x, y):
    """How often a ray from a point to the right crosses an outline."""
    edges = zip(outline, [*outline[1:], outline[0]], strict=True)
    return sum((y0 > y) != (y1 > y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) > x for (x0, y0), (x1, y1) in edges)


def test_polygons_of_any_form_and_number_enclose_what_a_ray_leaves_oddly_often():
    rng = np.random.default_rng(0)
    outlines = [rng.integers(0, 30, (count, 2)).tolist() for count in (3, 4, 7, 12, 3)]
    points = rng.integers(0, 30, (200, 2))
    inside = Polygons(outlines, [range(16)] * 5).enclosing(points)
    assert inside.tolist() == [[crossings(o, x, y) % 2 == 1 for o in outlines] for x, y in points.tolist()]
    assert Polygons([], []).enclosing(points).shape == (200, 0)


def test_instances_come_back_and_columns_are_read_too():
    columns = {"points": [SQUARE["points"]], "token_ids": [SQUARE["token_ids"]]}
    texts = [run(SAMInstanceTransform(), [value], index=0) for value in (columns, [SQUARE])]
    assert texts[0] == texts[1]
    points, dropped = back("sam_instance", texts[0])
    assert dropped == 0 and len(points) == 7
    assert {len(point["polygons"]) for point in points} == {0, 1}
    codes = next(p["polygons"][0] for p in points if p["polygons"])
    assert codes["codes"] == SQUARE["token_ids"] and codes["box"] == [0.0, 0.0, 0.5005, 1.0]
    for change in ({"token_ids": [1]}, {"points": [[0, 0]]}):
        with pytest.raises(DataError, match="expected"):
            run(SAMInstanceTransform(), [[SQUARE | change]], index=0)
    with pytest.raises(ValueError, match="cannot reshape"):
        run(SAMInstanceTransform(), [[SQUARE | {"token_ids": [[1, 2]] * 16}]], index=0)
    with pytest.raises(DataError, match="only 1 crops"):
        run(SAMInstanceTransform(), [[SQUARE]], index=1)


def embeddings(variants=2, rows=3, width=4):
    vectors = np.arange(variants * rows * width, dtype=np.float16).reshape(variants, rows, width)
    return {"emb": vectors, "mask_valid": np.array([[1, 0, 1], [1, 1, 0]][:variants])}


def test_vectors_of_captions_are_those_that_count():
    value = embeddings()
    out = run(CaptionEmbTransform(), value, index=0)
    assert out.dtype == np.float16 and out.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert run(CaptionEmbTransform(), value, index=1)[0, 0] == 12
    drawn = {run(CaptionEmbTransform(aligned_captions=False), value, index=0, seed=s)[0, 0] for s in range(20)}
    assert drawn == {0, 12}
    assert run(CaptionEmbTransform(), embeddings(1), index=5)[0, 0] == 0
    for other in (np.float32, np.float64, np.int8):  # the model takes float32 alone
        assert run(CaptionEmbTransform(), value | {"emb": value["emb"].astype(other)}, index=0).dtype == np.float32
    with pytest.raises(DataError, match="vectors of 4096 numbers, not of 4"):
        run(transforms_for({"t5_caption": MODALITY_INFO["t5_caption"]})["t5_caption"], value, index=0)
    with pytest.raises(DataError, match="mask_valid"):
        run(CaptionEmbTransform(), value | {"mask_valid": np.ones((2, 2))})


def test_grids_are_normalised_and_follow_stored_crops():
    out = run(GridTransform(mean=1, std=2), np.full((4, 4), 5, np.int16))
    assert out.shape == (1, 4, 4) and (out == 2).all() and out.dtype == np.float32
    crops = np.stack([np.zeros((2, 3, 3)), np.ones((2, 3, 3))])
    assert (run(GridTransform(per_crop=True), crops, index=1) == 1).all()
    fields = {"type": "img", "num_channels": 1, "input_size": 4, "patch_size": 2, "transform": "features"}
    transform = transforms_for({"sound": declare("sound", fields)})["sound"]
    assert run(transform, np.ones((4, 4))).shape == (1, 4, 4)
    for value in (np.ones((5, 4)), np.ones((2, 2, 4, 4)), np.array([["a"]])):
        with pytest.raises(DataError, match="expected a grid"):
            run(transform, value)


def scalar(**options):
    return transforms_for({"t": declare("t", {"type": "scalar", "vocab_size": 10, "transform_options": options})})["t"]


def test_scalars_are_bins_and_come_back():
    linear, ratio = scalar(low=-10, high=10), scalar(low=0.01, high=100, log=True)
    assert [int(run(linear, v)[0]) for v in (-50, -10, -8.1, 0, 9.9, 10, 50)] == [0, 0, 0, 5, 9, 9, 9]
    assert run(ratio, 0.9).tolist() == [4] and run(linear, np.array([3.0])).dtype == np.int64
    for transform in (linear, ratio):
        assert [int(run(transform, transform.decode(i))[0]) for i in range(10)] == list(range(10))
    assert linear.decode(5) == 1.0
    with pytest.raises(UnreadableValue, match="finite"):
        run(linear, float("nan"))
    for options in ({"low": 1, "high": 1}, {"low": 0, "high": 1, "log": True}):
        with pytest.raises(UserError, match="modality t: transform_options 'low' and 'high'"):
            scalar(**options)
    assert isinstance(linear, ScalarTransform) and declare("t", {"type": "scalar"}).max_tokens == 1


def codebooks(**options):
    fields = {"type": "seq_token", "max_tokens": 12, "vocab_size": 32, "vocab_offset": 8, "transform": "codebooks"}
    fields["transform_options"] = {"codebooks": 3, "codebook_size": 8} | options
    return transforms_for({"audio": declare("audio", fields)})["audio"]


def test_codebooks_take_turns_and_come_back():
    codes = np.array([[1, 2], [3, 4], [5, 7]], np.int16)
    ids = run(codebooks(), codes)
    assert ids.tolist() == [1, 11, 21, 2, 12, 23]
    assert codebooks().decode(ids).tolist() == codes.tolist()
    assert codebooks().decode(np.array([1, 11, 21, 2, 3, 23, 1])).tolist() == [[1], [3], [5]]
    assert (
        run(CodebooksTransform(per_crop=True, codebooks=3, codebook_size=8), codes[None], index=0).tolist()
        == ids.tolist()
    )
    for value, message in ((codes[:2], "codebooks 3"), (codes + 1, "from 0 to 7, not 2 to 8"), (codes - 2, "not -1")):
        with pytest.raises(DataError, match=message):
            run(codebooks(), value)
    with pytest.raises(UserError, match="3 codebooks of 9 codes need vocab_size 35"):
        codebooks(codebook_size=9)


def test_masks_are_valid_where_exactly_white():
    mask = np.array([[0, 254], [255, 255]], np.uint8)
    assert run(MaskTransform(), mask).tolist() == [[[False, False], [True, True]]]
    assert transforms_for({"sam_mask": MODALITY_INFO["sam_mask"]})["sam_mask"].size == 64


def test_tokens_of_features_have_their_sizes():
    for name, count in (
        ("tok_dinov2@224", 256),
        ("tok_imagebind@224", 256),
        ("tok_dinov2_global", 16),
        ("tok_imagebind_global", 16),
    ):
        transform = transforms_for({name: MODALITY_INFO[name]})[name]
        assert run(transform, np.full((2, count), 8191), index=1).shape == (count,)
        with pytest.raises(DataError, match=f"expected {count} tokens"):
            run(transform, np.zeros((2, count + 1), int), index=0)
        with pytest.raises(DataError, match="token id 8192"):
            run(transform, np.full((2, count), 8192), index=0)


def test_small_instances_are_ignored_where_the_file_tells_the_size_of_the_image():
    transform = InstanceMaskTransform(size=8)
    outlines = [{"points": [[x, 0], [x + side, 0], [x + side, side]]} for x, side in ((0, 4), (10, 5), (20, 0))]
    assert [outline[0, 0] for outline in transform.preprocess(outlines)] == [0, 10]
    image = {"width": 250, "height": 200}  # 0.05 % of it are 25 pixels
    (kept,) = transform.preprocess({"image": image, "annotations": outlines})
    assert kept[0].tolist() == [10, 0]
    with pytest.raises(UnreadableValue, match=r"no instance with a box of at least 0\.05% of the image"):
        transform.preprocess({"image": image, "annotations": outlines[:1]})
    for wrong in ({}, {"width": 4}, {"width": -1, "height": 2}, [4, 4]):
        with pytest.raises(DataError, match="expected the width and height of the image under 'image'"):
            transform.preprocess({"image": wrong, "annotations": outlines})
    with pytest.raises(DataError, match="expected a list of outlines, not None"):
        transform.preprocess({"image": image})


def test_tokenizers_of_poses_train_on_people_and_on_bare_rotations():
    people = np.random.default_rng(0).normal(size=(2, 23, 3, 3)).astype(np.float32)
    described = [{"box": [0, 0, 1, 1], "rotations": rotations.tolist()} for rotations in people]
    for value in (people, people.reshape(2, 207).tolist(), described, [described[:1], described[1:]]):
        np.testing.assert_array_equal(BodyPoseTransform().preprocess(value).reshape(people.shape), people)
    assert not run(BodyPoseTransform(), []).any() and not run(BodyPoseTransform(), [[], []]).any()
    with pytest.raises(DataError, match="expected one person's 'rotations', 207 numbers, not 414"):
        BodyPoseTransform().preprocess([{"rotations": people.tolist()}])
