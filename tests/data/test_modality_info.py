import pytest

from fourm.data.modality_info import MODALITY_INFO, declare, register_modality, resolve_modalities
from fourm.utils.errors import UserError


def test_entries_read_like_dicts():
    caption = MODALITY_INFO["caption"]
    assert caption["type"] == "seq" and caption["vocab_size"] == 30_000 and caption.get("nothing", 7) == 7
    assert dict(caption)["max_tokens"] == 256 and "id" in caption
    with pytest.raises(KeyError):
        caption["nothing"]


@pytest.mark.parametrize(
    ("name", "kind", "vocab", "tokens"),
    [("rgb@224", "img", None, 196), ("tok_rgb@448", "img", 16384, 784), ("tok_clip@224", "img", 8192, 196)]
    + [
        ("tok_semseg@224", "img", 4096, 196),
        ("tok_dinov2@224", "img", 8192, 256),
        ("tok_dinov2_global", "img", 8192, 16),
    ]
    + [("det", "seq", 30000, 256), ("metadata", "seq", 30000, 40), ("human_poses", "seq", 30000, 275)]
    + [("color_palette", "seq", 30000, 23), ("sam_instance", "seq", 30000, 290), ("t5_caption", "seq_emb", None, 77)],
)
def test_published_figures(name, kind, vocab, tokens):
    modality = MODALITY_INFO[name]
    assert (modality.type, modality.vocab_size, modality.max_tokens) == (kind, vocab, tokens)


def test_ids_are_stable_15_bit_numbers():
    # The last 15 bits of `printf caption | sha256sum`, written down so that a change of the rule is seen.
    ids = {name: modality.id for name, modality in MODALITY_INFO.items()}
    assert len(set(ids.values())) == len(ids) and all(0 <= i < 2**15 for i in ids.values())
    assert ids["caption"] == 32652 and MODALITY_INFO["caption"]["id"] == 32652


def test_a_declaration_fills_in_its_kind():
    modality = declare("tok_heat@64", {"type": "img", "vocab_size": 128, "input_size": 64, "patch_size": 8})
    assert modality.max_tokens == 64 and modality.transform == "tok_heat" and modality.pretokenized
    assert modality.decoder_embedding == "ImageTokenDecoderEmbedding"
    pixels = declare("heat@64", {"type": "img", "num_channels": 2, "input_size": 64, "patch_size": 8})
    assert pixels.is_pixels and pixels.decoder_embedding is None
    assert declare("poem", {"type": "seq", "max_tokens": 32}).embedding_options == {"max_length": 32}


def test_an_override_keeps_the_rest_and_recounts_tokens():
    smaller = resolve_modalities(["rgb@224"], {"rgb@224": {"input_size": 112}})["rgb@224"]
    assert smaller.max_tokens == 49 and smaller.num_channels == 3 and MODALITY_INFO["rgb@224"].max_tokens == 196


def test_registering_makes_it_known(monkeypatch):
    monkeypatch.setattr("fourm.data.modality_info.MODALITY_INFO", dict(MODALITY_INFO))
    register_modality("weather", type="seq_token", vocab_size=10, max_tokens=3)
    assert resolve_modalities(["weather"])["weather"].vocab_size == 10


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "tok_x@64",
            {"type": "img", "vocab_size": 8, "inputsize": 64},
            r"unknown key 'inputsize' \(did you mean 'input_size'",
        ),
        ("tok_x@64", {"type": "img", "vocab_size": 8, "input_size": 64}, "'patch_size' is required"),
        ("tok_x@64", {"vocab_size": 8}, "'type' is required"),
        ("x", {"type": "image"}, "'type' must be one of 'img', 'seq'"),
        ("x", {"type": "img", "input_size": 64, "patch_size": 16}, "needs 'num_channels'"),
        ("x", {"type": "img", "input_size": 65, "patch_size": 16, "num_channels": 1}, "not a multiple"),
        ("x", {"type": "seq_token", "max_tokens": 3}, "'vocab_size' is required"),
        ("x", {"type": "seq", "max_tokens": -5}, "modality x: 'max_tokens' must be at least 1 .*, not -5"),
        ("x", {"type": "seq", "max_tokens": 4, "min_tokens": 5}, "'min_tokens' 5 is more than its 4 tokens"),
        ("x", {"type": "seq_token", "max_tokens": 3, "vocab_size": 0}, "'vocab_size' must be at least 1"),
        (
            "x",
            {"type": "seq_token", "max_tokens": 3, "vocab_size": 9, "vocab_offset": -1},
            "'vocab_offset' must be at least 0",
        ),
        (
            "x",
            {"type": "seq_token", "max_tokens": 3, "vocab_size": 9, "vocab_offset": 9},
            "'vocab_offset' 9 leaves no ids",
        ),
        ("x", {"type": "img", "vocab_size": 8, "input_size": 64, "patch_size": 0}, "'patch_size' must be at least 1"),
        (
            "x",
            {"type": "img", "vocab_size": 8, "input_size": 10**9, "patch_size": 16},
            "'input_size' must be .* at most 100000",
        ),
        (
            "x",
            {"type": "img", "vocab_size": 8, "input_size": 65536, "patch_size": 1},
            "'max_tokens' must be .* at most 1000000",
        ),
        (
            "x",
            {"type": "img", "num_channels": 0, "input_size": 64, "patch_size": 16},
            "'num_channels' must be at least 1",
        ),
        (
            "x",
            {"type": "img", "num_channels": 99999, "input_size": 9600, "patch_size": 96},
            "exceed the maximum size",
        ),
        ("x", {"type": "seq_emb", "max_tokens": 3}, "'embedding_options' must have 'orig_emb_dim'"),
    ],
)
def test_a_bad_declaration_names_the_mend(name, fields, message):
    with pytest.raises(UserError, match=message):
        declare(name, fields, "data.yaml")


def test_an_unknown_modality_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown modality 'tok_rbg@224' \(did you mean 'tok_rgb@224'\?\)"):
        resolve_modalities(["tok_rbg@224"])
