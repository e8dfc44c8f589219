"""The steps of each transform called by hand, on a file, give what the loader gives."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fourm.data.decoding import decode_value
from fourm.data.image_augmenter import CenterCropImageAugmenter, EmptyAugmenter, PreTokenizedImageAugmenter
from fourm.data.modality_transforms import (
    MODALITY_TRANSFORMS,
    CaptionTransform,
    CodebooksTransform,
    ScalarTransform,
    TokTransform,
    UnifiedDataTransform,
)
from fourm.utils.errors import DataError, UnreadableValue
from tests.data.dataset_files import npy

RNG = np.random.default_rng(0)
BOX = {"boxes": [0.1, 0.2, 0.6, 0.8], "class_name": "dog", "score": 0.9}
SQUARE = {"points": [[-5, -5], [300, -5], [300, 300], [-5, 300]], "token_ids": list(range(500, 516))}
PALETTE = {str(n): [[n, 0, 9]] * n for n in range(1, 8)}


def picture(array, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


COLOUR = RNG.integers(0, 256, (48, 40, 3), np.uint8)
IDS = RNG.integers(0, 9, (48, 40), np.uint8)
FILES = {
    "rgb": ("jpg", picture(COLOUR, "JPEG")),
    "normal": ("png", picture(COLOUR)),
    "canny_edge": ("png", picture(IDS)),
    "depth": ("png", picture(RNG.integers(0, 65536, (48, 40), np.uint16))),
    "semseg": ("png", picture(IDS)),
    "semseg_coco": ("png", picture(IDS % 4)),
    "mask_valid": ("png", picture(IDS > 4)),
    "sam_mask": ("png", picture(IDS > 4)),
    "tok_rgb": ("npy", npy(np.arange(8).reshape(1, 8))),
    "caption": ("json", b'["a dog"]'),
    "det": ("json", json.dumps({"instances": [BOX]}).encode()),
    "metadata": ("json", b'{"n_humans": 2}'),
    "human_poses": ("json", json.dumps([[{"box": BOX["boxes"], "pose": list(range(508, 516))}]]).encode()),
    "color_palette": ("json", json.dumps([PALETTE]).encode()),
    "sam_instance": ("json", json.dumps([[SQUARE]]).encode()),
    "t5_caption": ("npz", npz(emb=np.ones((1, 3, 4), np.float16), mask_valid=np.array([[1, 1, 0]]))),
    "features": ("npy", npy(RNG.normal(size=(2, 4, 4)))),
    "scalar": ("cls", b"0.25"),
    "codebooks": ("npy", npy(np.array([[[1, 2, 3]]]))),
}
RANDOM = {"color_palette": 2, "sam_instance": 0}  # what is drawn, as the number of words that do not depend on it


@pytest.mark.parametrize("name", FILES)
def test_steps_by_hand_give_what_the_loader_gives(tmp_path, name):
    extension, content = FILES[name]
    path = tmp_path / f"a.{extension}"
    path.write_bytes(content)
    transform = MODALITY_TRANSFORMS[name]
    is_picture = extension in ("jpg", "png")
    augmenter = CenterCropImageAugmenter(32, main_domain=name) if is_picture else PreTokenizedImageAugmenter(32)
    crops = (
        None
        if is_picture or name in ("features", "scalar", "metadata", "color_palette", "det")
        else np.array([[0, 0, 48, 40, 0]])
    )
    if crops is None and not is_picture:
        augmenter = EmptyAugmenter()
    raw = {name: decode_value(path.name, content)} | ({} if crops is None else {"crop_settings": crops})
    loaded = UnifiedDataTransform(MODALITY_TRANSFORMS, augmenter)(raw, np.random.default_rng(0))[name]
    value = transform.preprocess(transform.load(path))
    shared = augmenter({name: value}, crops, np.random.default_rng(0))
    if not is_picture:
        shared = shared._replace(crop_coords=None) if name == "det" else shared
    by_hand = transform.postprocess(transform.image_augment(value, **shared._asdict()))
    if name in RANDOM:
        assert by_hand.split()[0][:2] == loaded.split()[0][:2]
        if name == "sam_instance":
            assert by_hand.count("polygon") == loaded.count("polygon") == 7 and len(by_hand.split()) == len(
                loaded.split()
            )
    elif isinstance(loaded, np.ndarray):
        by_hand = by_hand.numpy() if isinstance(by_hand, torch.Tensor) else by_hand
        np.testing.assert_array_equal(by_hand, loaded)
        assert by_hand.dtype == loaded.dtype
    else:
        assert by_hand == loaded


def test_ids_of_few_bits_are_the_same_by_hand(tmp_path):
    image = Image.fromarray(IDS % 4).convert("L")
    image.save(tmp_path / "a.png", bits=2)
    transform = MODALITY_TRANSFORMS["semseg"]
    value = transform.postprocess(transform.load(tmp_path / "a.png"))
    raw = {"semseg": decode_value("a.png", (tmp_path / "a.png").read_bytes())}
    loaded = UnifiedDataTransform(MODALITY_TRANSFORMS, CenterCropImageAugmenter(40, main_domain="semseg"))(raw)
    assert np.isin(value, range(256)).all() and set(np.unique(value)) == set(np.unique(loaded["semseg"]))


def test_the_number_of_a_class_is_text_a_number_or_a_token():
    value = decode_value("a.cls", b"207\n")
    assert CaptionTransform().preprocess(value) == ["207"]
    assert ScalarTransform(high=1000).preprocess(value) == 207
    assert TokTransform(per_crop=False, vocab_size=1000).preprocess(value).tolist() == [207]
    with pytest.raises(DataError, match="outside the vocabulary"):
        TokTransform(per_crop=False, vocab_size=100).preprocess(value)
    assert CodebooksTransform(codebooks=1).preprocess(np.array([[[1]]])).tolist() == [[1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9]]}, r"lie in \[0, 1\]"),
        ({"points": [[0, 0], [9000, 0], [9000, 9000]]}, "far outside"),
        ({"points": [[0, 0], [-9000, 0], [0, 9]]}, "far outside"),
        ({"token_ids": [0.5] * 16}, "whole numbers"),
        ({"token_ids": ["7"] * 16}, "whole numbers"),
        ({"token_ids": [1024] * 16}, "0 to 1023"),
        ({"token_ids": [1] * 15}, "16 codes"),
    ],
)
def test_instances_of_another_convention_break_the_contract(change, message):
    transform = MODALITY_TRANSFORMS["sam_instance"]
    with pytest.raises(DataError, match=message):
        transform.image_augment([[SQUARE | change]], None, False, None, None, 0)


def person(**parts):
    transform = MODALITY_TRANSFORMS["human_poses"]
    people = [{"box": BOX["boxes"]} | parts]
    return transform.postprocess(transform.image_augment(transform.preprocess(people), None, False, None, None, None))


@pytest.mark.parametrize("pose", [[1.0] * 8, ["1"] * 8, [1] * 7, "12345678", [1024] * 8])
def test_codes_of_people_are_whole_numbers(pose):
    with pytest.raises(DataError, match="8 codes"):
        person(pose=pose)
    with pytest.raises(DataError, match="pixels"):
        person(box=[10, 20, 300, 400])
    with pytest.raises(UnreadableValue, match="finite"):
        person(box=[float("nan"), 0, 1, 1])


def test_vectors_with_a_mask_that_is_not_finite_are_unreadable():
    with pytest.raises(UnreadableValue, match="not finite"):
        MODALITY_TRANSFORMS["t5_caption"].preprocess({"emb": np.ones((1, 2, 4)), "mask_valid": np.array([[1, np.nan]])})
    with pytest.raises(DataError, match="emb and mask_valid, not embeddings"):
        MODALITY_TRANSFORMS["t5_caption"].preprocess({"embeddings": np.ones((1, 2, 4))})
