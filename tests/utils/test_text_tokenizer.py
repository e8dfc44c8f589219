"""The text vocabulary: its layout, its file, and the encoding of text."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fourm.utils.errors import UserError
from fourm.utils.tokenizer import TextEncoder, load_text_tokenizer
from fourm.utils.tokenizer.special_tokens import COCO_CLASSES
from fourm.utils.tokenizer.text_tokenizer import UnreadableText

PATH = "fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json"
SHIPPED = load_text_tokenizer(PATH)
ENCODE = TextEncoder(SHIPPED)

PIECES = st.one_of(
    st.sampled_from(
        ["v0=1", "v3=999", "v0=1000", "v0=", "[s_1]", "V0=1", "Dining", "dining", "table", "tables", "hot",
         "dog", "dog,", "(teddy", "bear", "café", "e\u0301", "\n", "\t", " ", "", "person", "##s", "don't", "東京", "="]
    ),
    st.sampled_from(COCO_CLASSES),
    st.text(max_size=8).map(lambda text: text.replace("\0", "")),
)  # fmt: skip


def test_layout_of_the_shipped_vocabulary():
    ids = SHIPPED.get_vocab()
    assert len(ids) == 30_000 and sorted(ids.values()) == list(range(30_000))
    expected = {
        "[PAD]": 0, "[UNK]": 1, "[SOS]": 2, "[EOS]": 3, "[S_0]": 4, "[S_1]": 5, "[S_199]": 203,
        "v0=0": 204, "v0=999": 1203, "v1=0": 1204, "v2=0": 2204, "v3=0": 3204, "v3=999": 4203,
        "airplane": 4204, "baseball bat": 4208, "teddy bear": 4270, "zebra": 4283,
    }  # fmt: skip
    assert {token: ids[token] for token in expected} == expected
    assert len(COCO_CLASSES) == 80 and list(COCO_CLASSES) == sorted(COCO_CLASSES)
    assert [ids[name] for name in COCO_CLASSES] == list(range(4204, 4284))


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("v0=17 v1=4 v2=999 v3=0 dining table v0=1", ["v0=17", "v1=4", "v2=999", "v3=0", "dining table", "v0=1"]),
        ("A Teddy bear, a person.", ["a", "teddy bear", ",", "a", "person", "."]),
        ("[S_1] tv [S_12] [EOS]", ["[S_1]", "tv", "[S_12]", "[EOS]"]),
        ("trains", ["trains"]),  # not train + s: class names are whole words
    ],
)
def test_special_tokens_are_whole_words(text, tokens):
    assert SHIPPED.encode(text).tokens == tokens


def test_special_tokens_are_not_matched_within_words():
    assert "train" not in SHIPPED.encode("trainspotting").tokens
    assert "v0=1" not in SHIPPED.encode("v0=1000").tokens


def test_decoding_restores_the_text():
    text = "a photograph of a small duck on a wooden table next to a red bicycle."
    ids = SHIPPED.encode(text).ids
    assert 1 not in ids and SHIPPED.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=300, deadline=None)
@example(["hot", "dog"], "\t")
@example(["dining\u200b table"], " ")
@given(st.lists(PIECES, max_size=12), st.sampled_from([" ", "  ", "", "\n"]))
def test_encoder_agrees_with_the_tokenizer(pieces, separator):
    text = separator.join(pieces)
    assert ENCODE(text) == SHIPPED.encode(text, add_special_tokens=False).ids


@settings(max_examples=200, deadline=None)
@example(["hot"] * 9, " dog ", 2)
@example(["dining", "", "table", "x"], " ", 1)
@example(["hot dog"] * 9, " ", 3)
@example(["v0=1"] * 2, "  ", 2)  # an empty part has no id
@given(st.lists(PIECES, max_size=12), st.sampled_from([" ", "  ", "", "\n"]), st.integers(1, 9))
def test_a_limit_leaves_out_the_rest(pieces, separator, limit):
    text = separator.join(pieces)
    assert ENCODE(text, limit) == SHIPPED.encode(text, add_special_tokens=False).ids[:limit]


def test_whole_words_need_no_tokenizer_and_get_the_same_ids():
    words = [piece for piece in SHIPPED.get_vocab() if piece.isascii() and piece.isalpha()]
    words = [word.title() if index % 2 else word for index, word in enumerate(sorted(words)[::7])]
    encode = TextEncoder(SHIPPED)
    assert len(words) > 1000
    for word, encoding in zip(words, SHIPPED.encode_batch(words, add_special_tokens=False), strict=True):
        assert encode(word, 9) == encoding.ids
    encode._cache._tokenizer = None
    assert encode("Photographs", 9) == SHIPPED.encode("photographs").ids


def test_words_beyond_the_limit_are_not_encoded():
    encode = TextEncoder(SHIPPED)
    assert len(encode(" ".join(f"v0={number}" for number in range(1000)), 8)) == 8
    assert len(encode._cache) <= 8


def test_the_cache_of_the_encoder_is_bounded(monkeypatch):
    monkeypatch.setattr("fourm.utils.tokenizer.text_tokenizer._MAX_CACHED", 3)
    encode = TextEncoder(SHIPPED)
    for text in ("one two three four five", "six seven one two"):
        assert encode(text) == SHIPPED.encode(text).ids
        assert len(encode._cache) <= 3


def test_the_shipped_vocabulary_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_text_tokenizer(PATH).get_vocab_size() == 30_000


def test_missing_file():
    with pytest.raises(UserError, match="^nowhere/vocabulary.json: no such text vocabulary; set text_tokenizer_path"):
        load_text_tokenizer("nowhere/vocabulary.json")


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "Nothing"}}', "\xff\xfe"])
def test_corrupt_file(tmp_path, content):
    path = tmp_path / "vocabulary.json"
    path.write_text(content, encoding="latin1")
    with pytest.raises(UserError, match="vocabulary.json: not a text vocabulary"):
        load_text_tokenizer(path)


@pytest.mark.parametrize("token, found", [("[EOS]", "None"), ("[S_1]", "None"), ("[PAD]", "None")])
def test_file_without_the_special_tokens(tmp_path, token, found):
    content = json.loads(SHIPPED.to_str())
    content["model"]["vocab"] = {"x" if t == token else t: i for t, i in content["model"]["vocab"].items()}
    content["added_tokens"] = []
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_text_tokenizer(path)
    assert f"token {token} must have id" in str(error.value) and found in str(error.value)


def test_control_tokens_in_untrusted_text_are_encoded_as_text():
    encode, plain = TextEncoder(PATH), load_text_tokenizer(PATH)
    for token in ("[PAD]", "[EOS]", "[SOS]", "[UNK]", "[S_1]", "[S_199]"):
        ids = encode(f"a cat {token}dog")
        assert plain.token_to_id(token) not in ids
        expected = [
            t
            for part in ("a", "cat", "[", token[1:-1], "]", "dog")
            for t in plain.encode(part, add_special_tokens=False).ids
        ]
        assert ids == expected
    assert encode("v0=12 v1=3 hot dog") == [plain.token_to_id(t) for t in ("v0=12", "v1=3", "hot dog")]


@pytest.mark.parametrize("text", ["a dog \ud83d", "\udc00", "a\0b"])
def test_texts_that_no_tokenizer_accepts_raise_an_error(text):
    with pytest.raises(UnreadableText, match="character"):
        TextEncoder(PATH)(text)


def test_a_huge_text_is_truncated_before_it_is_tokenized():
    encode = TextEncoder(PATH)
    assert encode("a cat " * 4_000_000)[:300] == encode("a cat " * 200)[:300]
    assert len(encode("hot dog " * 100_000)) == 2**16 // 8
