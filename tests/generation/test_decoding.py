"""Every kind of modality is decoded to its natural form, even if parts of it are missing or unknown."""

import numpy as np
import pytest
import torch

from fourm.data.modality_info import resolve_modalities
from fourm.generation.decoding import Detokenizer, decode
from fourm.utils.errors import UserError
from tests.generation.test_sequences import TOKENIZER
from tests.generation.toy_tokenizers import CHANNELS, MODALITIES, PATCH, SIZE, VOCAB, toy_tokenizer

INFO = resolve_modalities(MODALITIES, MODALITIES)
TOKENIZERS = {name: toy_tokenizer(name) for name in CHANNELS}
GRID = SIZE // PATCH


def entry(tensor, masked=None):
    masked = torch.zeros(len(tensor), tensor[0].numel(), dtype=torch.bool) if masked is None else masked
    return {"tensor": tensor, "input_mask": masked}


def tokens(batch_size=2, seed=0):
    return torch.randint(VOCAB, (batch_size, GRID**2), generator=torch.Generator().manual_seed(seed))


def image(kind, ids, masked=None):
    name = f"tok_{kind}@{SIZE}"
    return [sample[name] for sample in decode({name: entry(ids, masked)}, INFO, TOKENIZERS)]


@pytest.mark.parametrize("kind", CHANNELS)
def test_pictures_are_what_their_tokenizer_says(kind):
    ids = tokens()
    pixels = TOKENIZERS[kind].decode_tokens(ids.view(-1, GRID, GRID)).permute(0, 2, 3, 1).numpy()
    expected = {
        "rgb": lambda x: ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8),
        "depth": lambda x: x[..., 0],
        "normal": lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True),
        "semseg": lambda x: x[..., 0].astype(int),
        "canny_edge": lambda x: (x[..., 0] + 1) / 2,
    }[kind](pixels)
    for sample, wanted in zip(image(kind, ids), expected, strict=True):
        assert sample.dropped == 0
        np.testing.assert_allclose(sample.value, wanted, atol=1e-5)


@pytest.mark.parametrize(("kind", "missing"), [("rgb", 128), ("normal", 0), ("semseg", -1), ("depth", np.nan)])
def test_unknown_and_unfinished_tokens_are_missing_in_the_picture_and_counted(kind, missing):
    ids, masked = tokens(), torch.zeros(2, GRID**2, dtype=torch.bool)
    ids[0, 0] = VOCAB  # at the top left
    masked[0, -1] = True
    first, second = image(kind, ids, masked)
    assert (first.dropped, second.dropped) == (2, 0)
    whole = image(kind, tokens())[0].value
    for corner in (np.s_[:PATCH, :PATCH], np.s_[-PATCH:, -PATCH:]):
        np.testing.assert_array_equal(first.value[corner], np.full_like(whole[corner], missing))
    np.testing.assert_array_equal(first.value[:PATCH, PATCH:], whole[:PATCH, PATCH:])


def test_tokens_without_a_tokenizer_are_a_grid_of_ids():
    ids, masked = tokens(), torch.zeros(2, GRID**2, dtype=torch.bool)
    masked[0, 2] = True
    (sample, _) = image("clip", ids, masked)
    expected = ids[0].view(GRID, GRID).clone()
    expected[0, 2] = -1
    np.testing.assert_array_equal(sample.value, expected)
    assert (sample.kind, sample.dropped) == ("tokens", 1)


@pytest.mark.parametrize("kind", CHANNELS)
def test_a_batch_has_the_pictures_of_its_samples(kind):
    ids, masked = tokens(5), torch.rand(5, GRID**2, generator=torch.Generator().manual_seed(1)) < 0.2
    ids[3, 2] = VOCAB
    name, calls = f"tok_{kind}@{SIZE}", []
    tokenizer = toy_tokenizer(kind)
    whole = tokenizer.decode_tokens
    tokenizer.decode_tokens = lambda ids: calls.append(len(ids)) or whole(ids)
    batch = decode({name: entry(ids, masked)}, INFO, {kind: tokenizer}, detokenizer=Detokenizer(batch_size=3))
    assert calls == [3, 2], "together, but not more than fit into memory"
    for index, sample in enumerate(batch):
        own = slice(index, index + 1)
        (alone,) = decode({name: entry(ids[own], masked[own])}, INFO, TOKENIZERS)
        np.testing.assert_array_equal(sample[name].value, alone[name].value)
        assert torch.equal(sample[name].tensor, alone[name].tensor) and sample[name].dropped == alone[name].dropped


def test_pixels_of_an_input_are_the_picture_again():
    from fourm.data.modality_transforms import MODALITY_TRANSFORMS

    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    pixels = torch.from_numpy(MODALITY_TRANSFORMS["rgb"].postprocess(picture))[None]
    name = f"rgb@{SIZE}"
    (sample,) = decode({name: entry(pixels, torch.zeros(1, GRID**2))}, INFO)
    np.testing.assert_array_equal(sample[name].value, picture)


def test_texts_are_read_from_what_is_not_masked():
    ids = torch.tensor([TOKENIZER.encode("v0=0 v1=0 v2=999 v3=999 cat [EOS] duck").ids])
    masked = torch.zeros(1, ids.shape[1], dtype=torch.bool)
    (sample,) = decode({"det": entry(ids, masked), "caption": entry(ids, ~masked)}, INFO, None, TOKENIZER)
    assert sample["det"].value == [{"boxes": [0.0, 0.0, 1.0, 1.0], "class_name": "cat"}]
    assert sample["caption"].value == ""
    with pytest.raises(UserError, match="caption: reading texts needs the text vocabulary"):
        decode({"caption": entry(ids, masked)}, INFO)
