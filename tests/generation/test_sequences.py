"""Generated texts are parsed as far as possible: texts of the transforms survive a round trip, and nothing raises."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer

from fourm.data.transforms.sequence import METADATA, ColorPaletteTransform, DetectionTransform, MetadataTransform
from fourm.generation.sequences import SEQUENCES, read_words
from fourm.utils.tokenizer.special_tokens import COCO_CLASSES, CONTROL, COORDINATES, EOS_ID, SENTINELS

PIECES = [
    *(
        [
            "none",
            "human",
            "pose",
            "global",
            "shape",
            "camera",
            "point",
            "polygon",
            "a",
            "red",
            ",",
            ".",
            "'",
            "s",
            "duck",
            "rub",
            "##ber",
            "##s",
            "tea",
        ]
    ),
    *(f"##{c}" for c in "xyz"),
]
SPECIAL = [*CONTROL, *SENTINELS, *COORDINATES, *COCO_CLASSES]


def _tokenizer():
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *PIECES]))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZER = _tokenizer()


def read(kind, text):
    words, dropped = read_words(TOKENIZER.encode(text, add_special_tokens=False).ids, TOKENIZER)
    value, unread = SEQUENCES[kind](words)
    return value, dropped + unread


def numbers(role, *values):
    return " ".join(f"v{role}={value}" for value in values)


def test_captions_are_sentences():
    assert read("caption", "a rubber duck , a teddy bear . a duck ' s tea") == (
        "a rubber duck, a teddy bear. a duck's tea",
        0,
    )


def test_reading_ends_at_the_end_token_and_counts_what_means_nothing():
    ids = TOKENIZER.encode("a [S_3] duck [UNK]", add_special_tokens=False).ids
    assert read_words([0, *ids, 10**6, -1, EOS_ID, ids[0]], TOKENIZER) == (["a", "duck"], 4)


def test_boxes_come_back():
    instances = [
        {"boxes": [0.1, 0.2, 0.5, 0.9], "class_name": "teddy bear"},
        {"boxes": [0.25, 0.3, 1.0, 1.0], "class_name": "rubber duck"},
    ]
    transform = DetectionTransform()
    found, dropped = read("det", transform.postprocess(transform.preprocess({"instances": instances})))
    assert dropped == 0
    assert [box["class_name"] for box in found] == ["teddy bear", "rubber duck"]
    np.testing.assert_allclose([b["boxes"] for b in found], [i["boxes"] for i in instances], atol=1e-3)


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("v0=1 v1=1 v2=9 duck", 4),  # a coordinate is missing
        ("v0=1 v1=1 v2=9 v3=9", 4),  # the class is missing
        ("v0=9 v1=1 v2=1 v3=9 duck", 5),  # no area
        ("red duck", 2),
    ],
)
def test_what_is_no_box_is_dropped_and_the_next_one_kept(text, dropped):
    good = "v0=0 v1=0 v2=999 v3=999 cat"
    found, lost = read("det", f"{text} {good}")
    assert (found, lost) == ([{"boxes": [0.0, 0.0, 1.0, 1.0], "class_name": "cat"}], dropped)


def test_palettes_come_back():
    palette = [[1, 2, 3], [255, 0, 7]]
    assert read("color_palette", ColorPaletteTransform().postprocess(palette)) == (palette, 0)
    assert read("color_palette", "v1=1 " + numbers(0, 1, 2, 3, 4, 5, 6)) == ([[1, 2, 3]], 3)
    assert read("color_palette", "v1=2 " + numbers(0, 1, 2, 256, 4, 5, 6)) == ([[4, 5, 6]], 3)


@pytest.mark.parametrize("key", METADATA)
def test_every_metadata_value_stands_for_the_number_that_was_read(key):
    index = [*METADATA].index(key)
    valid = 0
    for number in range(1000):
        found, dropped = read_metadata(index, number)
        if found:
            assert MetadataTransform().preprocess(found) == [f"v1={index} v0={number}"]
            valid += 1
        else:
            assert dropped == 2
    assert valid in (2, 3, 50, 1000)


def read_metadata(key, number):
    return SEQUENCES["metadata"]([f"v1={key}", f"v0={number}"])


def test_metadata_keeps_the_first_of_two_values_and_drops_unknown_keys():
    assert read("metadata", "v1=5 v0=2 v1=99 v0=3 v1=5 v0=4") == ({"n_humans": 2}, 4)


def test_people_have_the_parts_that_are_whole():
    box = "v0=0 v1=0 v2=500 v3=999"
    pose = "pose " + " ".join(["v0=3", "v1=4"] * 4)
    camera = f"camera {numbers(0, 0, 999)}"
    found, dropped = read("human_poses", f"human {box} {camera} {pose} shape {numbers(0, 1, 2)} human v0=1")
    assert [person.keys() for person in found] == [{"box", "pose", "camera"}]
    assert found[0]["pose"] == [3, 516] * 4
    np.testing.assert_allclose(found[0]["camera"], [-1, 19], atol=1e-3)
    assert dropped == 3 + 2
    assert read("human_poses", "none") == ([], 0)


def test_instances_have_their_point_and_whole_polygons():
    polygon = "polygon v0=1 v1=2 v2=30 v3=40 " + numbers(1, *range(16))
    text = f"point v0=3 v1=4 {polygon} polygon v0=1 point v0=5 v1=6 none"
    found, dropped = read("sam_instance", text)
    assert [f["point"] for f in found] == [[3, 4], [5, 6]]
    assert [p["codes"] for p in found[0]["polygons"]] == [[512 + i for i in range(16)]]
    assert found[1]["polygons"] == []
    assert dropped == 2


ANYTHING = st.lists(
    st.sampled_from([*PIECES, *CONTROL[:3], "[S_1]", "cat"])
    | st.builds("v{}={}".format, st.integers(0, 3), st.integers(0, 999)),
    max_size=60,
)


@pytest.mark.parametrize("kind", SEQUENCES)
@settings(max_examples=150, deadline=None)
@given(tokens=ANYTHING)
def test_whatever_is_written_is_read_without_an_error_and_every_word_is_used_or_counted(kind, tokens):
    ids = [TOKENIZER.token_to_id(token) for token in tokens]
    words, meaningless = read_words(ids, TOKENIZER)
    value, dropped = SEQUENCES[kind](words)
    json.dumps(value)
    assert 0 <= dropped <= len(words)
    assert meaningless == sum(token in ("[UNK]", "[SOS]", "[S_1]") for token in tokens)
    used = {
        "caption": lambda: len(words),
        "det": lambda: sum(4 + len(box["class_name"].split(" ")) for box in value),
        "color_palette": lambda: 3 * len(value) + bool(words and words[0] in [f"v1={n}" for n in range(1, 8)]),
        "metadata": lambda: 2 * len(value),
    }
    if kind in used:
        assert dropped + used[kind]() == len(words)
