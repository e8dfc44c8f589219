"""What users upload and type is checked like anything that a stranger wrote."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fourm.app import cards
from fourm.app.forms import (
    MAX_CHARACTERS,
    default_rows,
    picture_modalities,
    read_picture,
    read_settings,
    read_texts,
    target_modalities,
    text_modalities,
)
from fourm.generation import Sampler
from fourm.generation.decoding import Decoded
from fourm.utils.errors import UserError
from tests.app.toy_app import DEPTH, RGB, SEMSEG, TOK_RGB, toy_sampler, write_photo
from tests.generation.toy_tokenizers import SIZE
from tests.vq.test_vqvae import FEATURES, toy


@pytest.fixture(scope="module")
def sampler():
    return toy_sampler()


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60 000 x 60 000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


HOSTILE = {
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\n", "not an image"),
    "text": (b"<script>alert(1)</script>", "not an image"),
    "empty": (b"", "not an image"),
    "bomb": (bomb(), "pixels"),
    "large": (b"\x89PNG\r\n\x1a\n" + bytes(200_000), "larger than 0.0954 MiB"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_in_one_sentence(sampler, tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / "upload.png").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_picture(tmp_path / "upload.png", RGB, sampler, 100_000)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_a_truncated_picture_is_refused(sampler, tmp_path):
    path = write_photo(tmp_path / "photo.png")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read as a picture|damaged"):
        read_picture(path, RGB, sampler, 10**6)


def test_a_picture_is_read_as_the_model_sees_it(sampler, tmp_path):
    path = write_photo(tmp_path / "photo.png")
    assert picture_modalities(sampler)[0] == RGB and TOK_RGB not in picture_modalities(sampler)
    (result,) = sampler({"rgb": path}, [DEPTH], seed=0)
    assert np.array_equal(read_picture(path, RGB, sampler, 10**6).value, result[RGB].value)
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(path)
    assert read_picture(path, SEMSEG, sampler, 10**6).tensor.shape == (4, 4)
    with pytest.raises(UserError, match="'caption' is not a picture"):
        read_picture(path, "caption", sampler, 10**6)


def test_features_of_a_network_are_no_pictures_to_upload(sampler):
    assert not any("clip" in name for name in picture_modalities(sampler)), "it has no tokenizer"
    for modality, is_picture in (("rgb", True), ("CLIP-B16", False)):
        tokenizers = {"clip": toy(**FEATURES, modality=modality)}
        names = picture_modalities(Sampler(sampler.generation.model, tokenizers))
        assert names == [RGB, f"tok_clip@{SIZE}"][: 1 + is_picture]


def test_texts_become_inputs(sampler):
    assert text_modalities(sampler) == ["caption", "det", "color_palette"]
    texts = {
        "caption": "  a cup ",
        "det": "tea cup 0.1, 0.2, 0.5, 1\n\nduck 0 0 1 1",
        "color_palette": "#ff8800 2040A0",
    }
    inputs = read_texts(texts, sampler)
    assert inputs["caption"] == "a cup"
    assert inputs["det"][0] == {"boxes": [0.1, 0.2, 0.5, 1.0], "class_name": "tea cup"} and len(inputs["det"]) == 2
    assert inputs["color_palette"] == [[255, 136, 0], [32, 64, 160]]
    assert read_texts({"caption": " \n", "det": ""}, sampler) == {}
    (result,) = sampler(inputs, [DEPTH], seed=0)
    assert result["color_palette"].value == inputs["color_palette"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("caption", "x" * (MAX_CHARACTERS + 1), "maximum is 4000"),
        ("caption", "half \ud83d an emoji", "characters that are not valid"),
        ("caption", "nul \0", "characters that are not valid"),
        ("det", "cup 0.1 0.2 0.5", "line 1"),
        ("det", "0.1 0.2 0.5 0.9", "line 1"),
        ("det", "cup 0 0 1 1\ncup 0.5 0.2 0.1 0.9", "line 2"),
        ("det", "cup 0 0 1 nan", "line 1"),
        ("det", "cup 0 0 1 1e999", "line 1"),
        ("color_palette", "red", "1 to 7 colours"),
        ("color_palette", "#123456 " * 8, "1 to 7 colours"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(sampler, name, text, message):
    with pytest.raises(UserError, match=message):
        read_texts({name: text}, sampler)


def test_only_settings_that_differ_from_the_defaults_are_passed_on(sampler):
    rows = default_rows(sampler)
    assert len(rows) == len(target_modalities(sampler)) and read_settings(rows, sampler) == {}
    row = target_modalities(sampler).index(DEPTH)
    rows[row] = [rows[row][0], "0.7", 2, 3]
    assert read_settings(rows, sampler) == {
        "temps": {DEPTH: 0.7},
        "cfg_scales": {DEPTH: 2.0},
        "decoding_steps": {DEPTH: 3},
    }


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (1, -1, "temperature must be a number from 0 to 100"),
        (1, "hot", "temperature"),
        (1, None, "temperature"),
        (2, float("inf"), "guidance"),
        (3, 0, "steps"),
        (3, 17, "steps must be a whole number from 1 to 16"),
        (3, 1.5, "steps"),
    ],
)
def test_a_setting_outside_of_its_range_is_refused(sampler, column, value, message):
    rows = default_rows(sampler)
    rows[0][column] = value
    with pytest.raises(UserError, match=f"rgb: {message}"):
        read_settings(rows, sampler)


def test_cards_escape_what_users_and_models_wrote():
    evil = "<img src=x onerror=alert(1)> ${1+1} {{value}} `x` \"'"
    results = [
        {
            "caption": Decoded("caption", evil),
            "det": Decoded("det", [{"boxes": [0, 0, 1, 1], "class_name": evil}]),
            "metadata": Decoded("metadata", {evil: 1.0}),
            "scalar": Decoded("scalar", [evil]),
            "tok_semseg@32": Decoded("semseg", np.zeros((2, 2), int), names=(evil,)),
            evil: Decoded("caption", evil),
        }
    ]
    page = cards.samples(results, [], [*results[0]], [0], editable=[evil])
    assert page.count("<img src=") == page.count('<img src="data:image/') == 2
    assert not {"${", "{{", "`"} & {page[i : i + n] for n in (1, 2) for i in range(len(page))}
    assert "&lt;img src=x" in page
