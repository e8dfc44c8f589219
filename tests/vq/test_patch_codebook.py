import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from fourm.utils.errors import DataError, UserError
from fourm.vq import TOKENIZERS, ImageTokenizer, PatchCodebook, PatchCodebookConfig, TokenizerConfig, load_tokenizer

P = 4


def _codebook(images, vocab_size=32, **options):
    config = PatchCodebookConfig(
        modality="rgb", vocab_size=vocab_size, patch_size=P, num_channels=images.shape[1], input_size=16, **options
    )
    codebook = PatchCodebook(config)
    pool = codebook.to_patches(images).flatten(0, 2)
    return codebook, codebook.fit(pool, epochs=5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mosaics():
    """Images put together from 12 different patches, and which patch is where."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.rand(12, 3, P, P, generator=generator) * 2 - 1
    places = torch.randint(12, (40, 4, 6), generator=generator)
    images = torch.zeros(40, 3, 4 * P, 6 * P)
    for row in range(4):
        for column in range(6):
            images[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P] = tiles[places[:, row, column]]
    return images, places


def test_tokens_lie_where_their_patches_are(mosaics):
    images, places = mosaics
    codebook, _ = _codebook(images, vocab_size=12)
    ids = codebook.tokenize(images)
    assert ids.shape == (40, 4, 6)
    assert ids.dtype == torch.int64
    assert len({(a, b) for a, b in zip(ids.flatten().tolist(), places.flatten().tolist(), strict=True)}) == 12
    torch.testing.assert_close(codebook.decode_tokens(ids), images, atol=1e-3, rtol=0)


def test_any_size_that_patches_fill(mosaics):
    images, _ = mosaics
    codebook, _ = _codebook(images)
    ids = codebook.tokenize(torch.rand(2, 3, 8, 20))
    assert ids.shape == (2, 2, 5)
    assert ids.min() >= 0
    assert ids.max() < codebook.vocab_size
    assert codebook.decode_tokens(ids).shape == (2, 3, 8, 20)


def test_decoding_is_closer_with_a_larger_vocabulary():
    images = torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    errors = []
    for vocab_size in (2, 16, 128, 512):
        codebook, _ = _codebook(images, vocab_size)
        errors.append(float((codebook.decode_tokens(codebook.tokenize(images)) - images).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]


def test_maps_of_classes_decode_to_classes():
    # Class 7 is not "between" 0 and 9: compared as numbers, the patches of 7 would be mixed up with the others.
    ids = torch.tensor([0.0, 7.0, 9.0])[torch.randint(3, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0))]
    images = ids.repeat_interleave(P, 2).repeat_interleave(P, 3)
    codebook, report = _codebook(images, vocab_size=3, one_hot_classes=10)
    assert report.used_codes == 3
    assert torch.equal(codebook.decode_tokens(codebook.tokenize(images)), images)
    noisy = images.clone()
    noisy[:, :, ::P, ::P] = 1.0  # one pixel of each patch
    assert torch.equal(codebook.decode_tokens(codebook.tokenize(noisy)), images)


def test_class_beyond_the_classes_is_an_error():
    images = torch.randint(5, (20, 1, 16, 16)).float()
    codebook, _ = _codebook(images, vocab_size=4, one_hot_classes=5)
    images[3, 0, 2, 2] = 255
    with pytest.raises(DataError, match="class id 255 .* one_hot_classes = 5"):
        codebook.tokenize(images)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 16, 15), (3, 16, 16)])
def test_wrong_images_are_an_error(mosaics, shape):
    codebook, _ = _codebook(mosaics[0])
    with pytest.raises(DataError, match=r"takes images of shape \(B, 3, H, W\)"):
        codebook.tokenize(torch.zeros(shape))


def test_save_and_load(mosaics, tmp_path):
    images, _ = mosaics
    codebook, _ = _codebook(images, transform_options={"color_jitter": 0.0})
    codebook.save(tmp_path / "rgb")
    assert sorted(path.name for path in (tmp_path / "rgb").iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "rgb" / "model.safetensors")["codebook"].shape == (32, 3 * P * P)
    loaded = load_tokenizer(tmp_path / "rgb")
    assert isinstance(loaded, PatchCodebook)
    assert loaded.config == codebook.config
    assert loaded.config.value_range == pytest.approx((float(images.min()), float(images.max())))
    assert torch.equal(loaded.tokenize(images), codebook.tokenize(images))
    codebook.save(tmp_path / "rgb")  # replaces it
    assert [path.name for path in tmp_path.iterdir()] == ["rgb"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "patch_codebok"}, r"unknown tokenizer type 'patch_codebok' \(did you mean 'patch_codebook'\?\)"),
        ({"vocab_size": 33}, r"model.safetensors does not fit config.json"),
        ({"vocab_siz": 33}, r"unknown key 'vocab_siz' \(did you mean 'vocab_size'\?\)"),
        ({"patch_size": 5}, r"input_size 16 is not a multiple of patch_size 5"),
    ],
)
def test_config_that_does_not_fit_is_an_error(mosaics, tmp_path, change, message):
    _codebook(mosaics[0])[0].save(tmp_path / "t")
    path = tmp_path / "t" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "t")


def test_damaged_or_missing_folder_is_an_error(mosaics, tmp_path):
    with pytest.raises(UserError, match="nowhere is not a tokenizer folder"):
        load_tokenizer(tmp_path / "nowhere")
    _codebook(mosaics[0])[0].save(tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path / "t")


def test_a_learned_tokenizer_fits_the_interface(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class ThresholdConfig(TokenizerConfig):
        bias: float = 0.0

    class Threshold(ImageTokenizer):
        kind = "threshold"
        Config = ThresholdConfig

        def __init__(self, config):
            super().__init__(config)
            self.project = torch.nn.Conv2d(config.num_channels, 1, config.patch_size, config.patch_size)

        def tokenize(self, x):
            return (self.project(x)[:, 0] > self.config.bias).long()

        def decode_tokens(self, ids):
            return ids[:, None].float().repeat_interleave(P, 2).repeat_interleave(P, 3)

    monkeypatch.setitem(TOKENIZERS, "threshold", Threshold)
    tokenizer = Threshold(ThresholdConfig("depth", 2, P, 1, 16, bias=0.1))
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    images = torch.randn(3, 1, 16, 16)
    assert type(loaded) is Threshold
    assert torch.equal(loaded.tokenize(images), tokenizer.tokenize(images))


def test_a_tokenizer_need_not_have_weights(tmp_path, monkeypatch):
    class Brightness(ImageTokenizer):
        kind = "brightness"

        def tokenize(self, x):
            return (self.to_patches(x).mean((3, 4, 5)) > 0).long()

        def decode_tokens(self, ids):
            return ids[:, None].float().repeat_interleave(P, 2).repeat_interleave(P, 3)

    monkeypatch.setitem(TOKENIZERS, "brightness", Brightness)
    Brightness(TokenizerConfig("depth", 2, P, 1, 16)).save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert loaded.device == torch.device("cpu")
    assert loaded.tokenize(torch.ones(1, 1, 8, 8)).tolist() == [[[1, 1], [1, 1]]]
