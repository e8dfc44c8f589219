"""What the values of a sample mean: missing ones, other conventions, numbers that are not finite."""

import functools

import numpy as np
import pytest

from fourm.data.image_augmenter import EmptyAugmenter
from fourm.data.modality_info import MODALITY_INFO, resolve_modalities
from fourm.data.modality_transforms import MODALITY_TRANSFORMS, UnifiedDataTransform
from fourm.models.encoder_embeddings import SequenceEncoderEmbedding
from fourm.utils.errors import DataError, UnreadableValue

TRANSFORM = UnifiedDataTransform(MODALITY_TRANSFORMS, EmptyAugmenter())
INSTANCE = {"boxes": [0.1, 0.2, 0.3, 0.4], "class_name": "dog", "score": 0.9}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("caption", v)
        for v in (None, "", " ", [], {}, [None], ["", None], {"caption": None}, {"text": ""}, [{"caption": None}])
    ]
    + [("det", v) for v in (None, {}, {"instances": None})]
    + [("metadata", v) for v in (None, {}, {"n_humans": None})]
    + [("human_poses", None), ("color_palette", []), ("scalar", "")]
    + [("t5_caption", {"emb": np.zeros((1, 0, 4)), "mask_valid": np.zeros((1, 0))})],
)
def test_null_and_empty_values_are_missing(name, value):
    assert TRANSFORM.lacking({name: value}) == [name]


@pytest.mark.parametrize(
    ("name", "value"), [("det", {"instances": []}), ("human_poses", []), ("caption", ["a", None]), ("scalar", 0)]
)
def test_nothing_found_is_a_value(name, value):
    assert TRANSFORM.lacking({name: value}) == []


def test_the_captions_that_are_there_are_used():
    for value in (["a dog", None], {"text": "a dog"}, {"captions": ["", "a dog"]}, {"caption": None, "text": "a dog"}):
        assert TRANSFORM({"caption": value})["caption"] == "a dog"
    with pytest.raises(UnreadableValue, match="there are alt, url") as error:
        TRANSFORM({"caption": {"alt": "a dog", "url": "u"}})
    assert error.value.modality == "caption"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [100, 50, 200, 200]}, "in pixels"),
        ({"boxes": [0.5, 0.5, 0.2, 0.2]}, "x, y, width, height"),
        ({"boxes": [float("nan"), 0.2, 0.3, 0.4]}, "not finite"),
        ({"boxes": [0.1, 0.2, float("nan"), 0.4]}, "not finite"),
        ({"boxes": ["0.1", "0.2", "0.3", "0.4"]}, "four numbers"),
        ({"class_name": ""}, "class_name"),
        ({"score": "0.9"}, "score"),
    ],
)
def test_instances_of_another_convention_break_the_contract(change, message):
    with pytest.raises(DataError, match=message) as error:
        TRANSFORM({"det": {"instances": [INSTANCE | change]}})
    assert error.value.modality == "det"


def test_rounding_is_clipped_and_cocos_own_file_is_named():
    value = {"instances": [INSTANCE | {"boxes": [-1e-4, 0, 1.001, 1]}]}
    assert TRANSFORM({"det": value})["det"] == "v0=0 v1=0 v2=999 v3=999 dog"
    with pytest.raises(DataError, match="COCO's annotation file"):
        TRANSFORM({"det": {"images": [], "annotations": [], "categories": []}})


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_value_that_is_not_finite_spoils_its_sample(dtype, bad):
    grid, vectors = np.ones((1, 4, 4), dtype), np.ones((1, 3, 4), dtype)
    grid[0, 1, 2] = vectors[0, 1, 2] = bad
    for sample in ({"features": grid}, {"t5_caption": {"emb": vectors, "mask_valid": np.ones((1, 3))}}):
        with pytest.raises(UnreadableValue, match="not finite"):
            TRANSFORM(sample)


@pytest.mark.parametrize("colors", [[[0, 0, 256]], [[0, 0.5, 1]], [[0, 0]], []])
def test_palettes_are_checked(colors):
    palette = {str(n): [[n, n, n]] * n for n in range(1, 8)}
    with pytest.raises(DataError, match="colour"):
        TRANSFORM({"color_palette": [palette | {"1": colors}]})
    transform = MODALITY_TRANSFORMS["color_palette"]
    count, *channels = transform.postprocess(transform.preprocess([palette])).split()
    assert channels == [f"v0={count[3:]}"] * 3 * int(count[3:])


def test_metadata_as_notebooks_call_it():
    transform = type(MODALITY_TRANSFORMS["metadata"])(shuffle=False, random_trunc=False, return_chunks=False)
    assert transform.metadata_to_string({"semantic_diversity": 2}) == "v1=16 v0=2"


def test_a_plain_dict_in_the_table_is_a_modality(monkeypatch):
    embedding = functools.partial(SequenceEncoderEmbedding, vocab_size=30_000, max_length=32, padding_idx=0)
    entry = {
        "type": "seq",
        "vocab_size": 30_000,
        "max_tokens": 32,
        "min_tokens": 0,
        "encoder_embedding": embedding,
        "id": 7,
    }
    monkeypatch.setitem(MODALITY_INFO, "mine", entry)
    mine = resolve_modalities(["mine"])["mine"]
    assert (mine.encoder_embedding, mine.max_tokens) == ("SequenceEncoderEmbedding", 32)
    assert mine.embedding_options == {"max_length": 32, "padding_idx": 0}
