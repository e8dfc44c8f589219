"""The sampler loads models from disk and generates results in one call."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fourm.data.modality_info import MODALITY_INFO, resolve_modalities
from fourm.generation import Sampler
from fourm.generation.inputs import find_modality, make_batch
from fourm.generation.settings import chained_schedule, per_target
from fourm.models import FM
from fourm.utils.errors import DataError, UserError
from tests.generation.test_sequences import TOKENIZER
from tests.generation.toy_tokenizers import CHANNELS, CLASSES, MODALITIES, SIZE, VOCAB, toy_model, toy_tokenizer
from tests.train.checkpoint_files import write_checkpoint

INFO = resolve_modalities(MODALITIES, MODALITIES)
RGB = f"rgb@{SIZE}"


def write_run(folder):
    """Write a model, its vocabulary and tokenizers, and a picture."""
    toy_model().save_pretrained(folder / "run")
    TOKENIZER.save(str(folder / "words.json"))
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"text_tokenizer_path": str(folder / "words.json")}))
    for name in CHANNELS:
        toy_tokenizer(name).save(folder / "tokenizers" / name)
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def sampler(folder):
    return Sampler.load(folder / "run", folder / "tokenizers", class_names=CLASSES, device="cpu")


def same(first, second):
    assert first.keys() == second.keys()
    return all(np.array_equal(first[name].value, second[name].value, equal_nan=name != "caption") for name in first)


def test_a_picture_becomes_everything(sampler, folder):
    targets = ["depth", "normal", "semseg", "canny_edge", "clip", "tok_rgb@32", "caption", "metadata"]
    (result,) = sampler({"rgb": folder / "photo.png"}, targets, seed=0)
    assert [result[name].kind for name in result] == [
        "rgb",
        "depth",
        "normal",
        "semseg",
        "canny_edge",
        "tokens",
        "rgb",
        "caption",
        "metadata",
    ]
    assert result[RGB].value.shape == (SIZE, SIZE, 3)
    assert result[f"tok_semseg@{SIZE}"].names == CLASSES
    assert result[f"tok_clip@{SIZE}"].value.shape == (4, 4)
    assert isinstance(result["caption"].value, str)
    assert all(result[f"tok_{name}@{SIZE}"].dropped == 0 for name in CHANNELS)


def test_a_sample_of_a_batch_depends_on_its_seed_alone(sampler):
    prompts = [{"caption": "a red cup"}, {"caption": "duck"}, {"caption": "a red cup"}]
    results = sampler(prompts, ["rgb", "det"], seed=[4, 5, 6])
    assert same(results[1], sampler(prompts[1], ["rgb", "det"], seed=5)[0])
    assert same(results[0], sampler(prompts[0], ["rgb", "det"], seed=4)[0])
    assert not same(results[0], results[2])


def test_steps_show_what_is_known_and_decode_only_what_has_changed(sampler, folder):
    missing, results = [], []
    steps = sampler.generate_iter({"rgb": folder / "photo.png"}, ["depth", "normal", "caption"], seed=0)
    for number, step in enumerate(steps, 1):
        assert (step.number, step.total) == (number, 9)
        (result,) = step.results()
        results.append(result)
        missing.append(result[step.target].dropped)
    assert missing[:8] == [12, 8, 4, 0] * 2 and step.target == "caption"
    assert same(result, sampler({"rgb": folder / "photo.png"}, ["depth", "normal", "caption"], seed=0)[0])
    assert all(later["tok_depth@32"] is results[3]["tok_depth@32"] for later in results[4:])
    assert results[0]["tok_depth@32"] is not results[1]["tok_depth@32"]


def test_settings_reach_the_model(sampler):
    greedy = {"temps": {"rgb": 0}, "cfg_scales": 1.0, "decoding_steps": 1, "autoregression_schemes": "maskgit"}
    first, second = (sampler({"caption": "a cup"}, ["rgb"], seed=seed, **greedy)[0] for seed in (0, 1))
    assert same(first, second)
    assert not same(first, sampler({"caption": "a cup"}, ["rgb"], seed=1)[0])


def test_a_run_that_goes_on_gives_its_newest_checkpoint(folder, tmp_path):
    model = FM.from_pretrained(str(folder / "run"))
    for step in (3, 12):
        write_checkpoint(tmp_path / "checkpoints", step, model)
        torch.nn.init.zeros_(model.mask_token)
    loaded = Sampler.load(tmp_path, device="cpu").generation.model
    assert not loaded.mask_token.any() and not loaded.training
    (shard,) = (tmp_path / "checkpoints" / "step-00000012").glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert Sampler.load(tmp_path, device="cpu").generation.model.mask_token.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere/at/all"}, "neither a folder with a model nor a model on the hub"),
        ({"tokenizers": "{}/run"}, "has no folder with a config.json"),
        ({"text_tokenizer": "{}/photo.png"}, "not a text vocabulary"),
        ({"model": "{}/tokenizers"}, "no complete checkpoint"),
    ],
)
def test_what_cannot_be_loaded_is_named(folder, options, message):
    options = {key: value.format(folder) for key, value in options.items()}
    with pytest.raises(UserError, match=message):
        Sampler.load(**{"model": folder / "run", "device": "cpu", **options})


@pytest.mark.parametrize(
    ("inputs", "targets", "settings", "message"),
    [
        ({"caption": "cup"}, ["nromal"], {}, "'nromal' is not a target of this model .did you mean 'normal'"),
        ({"depht": "cup"}, ["rgb"], {}, "'depht' is not an input of this model"),
        ({}, ["rgb"], {}, "at least one input"),
        ({"caption": "cup"}, ["caption"], {}, "caption is to be generated, but it is given"),
        ([{"caption": "cup"}, {"det": "cup"}], ["rgb"], {}, "all samples need the same inputs"),
        ({"rgb": "nothing.png"}, ["depth"], {}, "rgb@32: there is no file nothing.png"),
        ({"clip": Image.new("RGB", (9, 9))}, ["depth"], {}, "a picture needs the tokenizer of clip"),
        ({"tok_rgb@32": np.full(16, VOCAB)}, ["depth"], {}, "ids must be below 20"),
        ({"det": [{"boxes": [0, 1]}]}, ["depth"], {}, "det: an instance has no 'class_name' .there are boxes"),
        ({"caption": "cup"}, ["rgb"], {"temp": 1}, "unknown key 'temp' .did you mean 'temps'"),
        ({"caption": "cup"}, ["rgb", "depth"], {"temps": "1-2-3"}, "3 values for 2 targets"),
        ({"caption": "cup"}, ["rgb"], {"temps": "warm"}, "must be a number"),
        ({"caption": "cup"}, ["rgb"], {"autoregression_schemes": "autoregressive"}, "maskgit or roar"),
    ],
)
def test_what_does_not_suit_the_model_is_one_clear_sentence(sampler, inputs, targets, settings, message):
    with pytest.raises(UserError, match=message):
        sampler(inputs, targets, **settings)


def test_inputs_of_every_kind_are_the_ids_that_training_sees(folder):
    tokenizers = {name: toy_tokenizer(name) for name in CHANNELS}
    ids = np.stack([np.arange(16), np.zeros(16)]).astype(np.int16)
    depth = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (32, 32), dtype=np.uint16))
    sample = {
        "tok_normal@32": ids,
        "tok_depth@32": depth,
        "tok_rgb@32": folder / "photo.png",
        "caption": "a red cup",
        "det": [{"boxes": [0, 0, 0.5, 1], "class_name": "cup"}],
        "color_palette": [[1, 2, 3]],
        "metadata": {"n_humans": 2},
    }
    batch = make_batch([sample], INFO, tokenizers, TOKENIZER)
    assert batch["tok_normal@32"]["tensor"].tolist() == [[*range(16)]]
    assert batch["tok_depth@32"]["tensor"].shape == batch["tok_rgb@32"]["tensor"].shape == (1, 16)
    texts = {name: TOKENIZER.decode(batch[name]["tensor"][0].tolist(), False) for name in [*sample][3:]}
    assert texts == {
        "caption": "a red cup [EOS]",
        "det": "v0=0 v1=0 v2=500 v3=999 cup [EOS]",
        "color_palette": "v1=1 v0=1 v0=2 v0=3 [EOS]",
        "metadata": "v1=5 v0=2 [EOS]",
    }
    long = make_batch([{"caption": "a " * 100}, {"caption": "a"}], INFO, {}, TOKENIZER)["caption"]
    assert (~long["input_mask"]).sum(1).tolist() == [24, 2]


def test_boxes_follow_the_centre_square_of_their_picture():
    wide = Image.new("RGB", (80, 40))  # its square lies between 0.25 and 0.75
    boxes = [
        {"boxes": [0.25, 0.0, 0.5, 1.0], "class_name": "cup"},
        {"boxes": [0.0, 0.0, 0.2, 1.0], "class_name": "duck"},
    ]
    for sample, expected in (
        ({"det": boxes, RGB: wide}, "v0=0 v1=0 v2=500 v3=999 cup [EOS]"),
        ({"det": boxes[:1]}, "v0=250 v1=0 v2=500 v3=999 cup [EOS]"),
    ):
        ids = make_batch([sample], INFO, {}, TOKENIZER)["det"]["tensor"][0].tolist()
        assert TOKENIZER.decode(ids, False) == expected


def test_of_captions_for_stored_crops_the_first_is_taken():
    ids = make_batch([{"caption": ["a cup", "a duck"]}], INFO, {}, TOKENIZER)["caption"]["tensor"][0].tolist()
    assert TOKENIZER.decode(ids, False) == "a cup [EOS]"


def test_short_names_find_the_smallest_resolution_and_pixels_first():
    assert find_modality("rgb", MODALITY_INFO, "an input") == "rgb"
    table = {name: MODALITY_INFO[name] for name in MODALITY_INFO if name != "rgb"}
    assert find_modality("rgb", table, "an input") == "rgb@224"
    assert find_modality("depth", {k: v for k, v in table.items() if "@" in k}, "a target") == "tok_depth@224"
    assert find_modality("tok_depth@448", table, "a target") == "tok_depth@448"


def test_values_per_target():
    targets = ["a", "b"]
    for value in ("1-2", [1, 2], {"a": 1, "b": "2"}):
        assert per_target(value, float, targets, "temps") == [1.0, 2.0]
    assert per_target(3, int, targets, "steps") == [3, 3]
    assert per_target({"b": 1}, int, targets, "steps") == [None, 1]
    assert per_target("onex:0.5:0.5-constant", str, targets, "") == ["onex:0.5:0.5", "constant"]


def test_defaults_can_be_followed_for_every_modality_of_the_table():
    targets = [name for name, modality in MODALITY_INFO.items() if modality.decoder_embedding]
    schedule = chained_schedule(["rgb@224"], targets, MODALITY_INFO, {})
    assert {step["target_domain"] for step in schedule} == set(targets)
    totals = {name: sum(s["num_tokens"] for s in schedule if s["target_domain"] == name) for name in targets}
    assert totals == {name: MODALITY_INFO[name].max_tokens for name in targets}
    assert {step["cfg_scale"] for step in chained_schedule([], targets, MODALITY_INFO, {})} == {1.0}


def test_nothing_of_the_callers_is_changed(sampler):
    inputs, settings = {"caption": "a cup"}, {"temps": {"rgb": 1.0}}
    sampler(inputs, ["rgb"], seed=0, **settings)
    assert (inputs, settings) == ({"caption": "a cup"}, {"temps": {"rgb": 1.0}})
    assert not sampler.generation.model.training
    assert isinstance(sampler.generation.model.mask_token, torch.nn.Parameter)


def test_a_damaged_picture_is_an_error_of_one_sentence(sampler, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(DataError, match="rgb@32: .*broken.png"):
        sampler({"rgb": tmp_path / "broken.png"}, ["depth"])


def test_pixels_may_be_a_tensor_and_a_single_target_a_string(sampler):
    modality = next(m for m in sampler.inputs.values() if m.is_pixels)
    size, target = modality.input_size, next(name for name, m in sampler.targets.items() if m.type == "img")
    pixels = torch.randn(modality.num_channels, size, size, generator=torch.Generator().manual_seed(0))
    (alone,), (batched,) = (sampler({modality.name: x}, target, seed=0) for x in (pixels, pixels[None].double()))
    assert torch.equal(alone[target].tensor, batched[target].tensor)
    torch.testing.assert_close(alone[modality.name].tensor, pixels)
    eight_bits = torch.randint(0, 256, pixels.shape, dtype=torch.uint8)
    mine, theirs = (
        sampler({modality.name: x}, target, seed=0)[0] for x in (eight_bits, eight_bits.permute(1, 2, 0).numpy())
    )
    assert torch.equal(mine[target].tensor, theirs[target].tensor)
    with pytest.raises(UserError, match="a tensor must be 3 x .* normalised numbers or a picture in 8 bits"):
        sampler({modality.name: pixels[:, 1:]}, target)


def test_one_weighted_condition_is_guidance(sampler, folder):
    inputs = [{"rgb": folder / "photo.png", "caption": "a red cup"}, {"rgb": folder / "photo.png", "caption": "duck"}]
    plain = sampler(inputs, ["depth", "semseg"], seed=3, cfg_scales=2.5)
    weighted = sampler.multi_guided([inputs], [2.5], ["depth", "semseg"], seed=3)
    assert [[*sample] for sample in weighted] == [["tok_depth@32", "tok_semseg@32"]] * 2
    for one, other in zip(plain, weighted, strict=True):
        assert all(one[name].tensor.equal(other[name].tensor) for name in other)
    assert weighted[0]["tok_semseg@32"].names == CLASSES


def test_conditions_may_be_of_different_modalities_and_lead_away(sampler, folder):
    photo, words = {"rgb": folder / "photo.png"}, {"caption": "a red cup"}
    settings = {"targets": "normal", "seed": 0, "temps": 1.0}
    results = [
        sampler.multi_guided([photo, words], weights, **settings)[0]["tok_normal@32"].tensor
        for weights in ([4, 0], [0, 4], [4, 4], [4, -4])
    ]
    assert not any(results[i].equal(results[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize(
    ("weights", "settings", "message"),
    [
        ([1.0], {}, "every condition needs a weight, but there are 2 and 1"),
        ([1.0, 1.0], {"cfg_scales": 2}, "weights take the place of cfg_scales"),
    ],
)
def test_conditions_that_do_not_fit_are_named(sampler, weights, settings, message):
    with pytest.raises(UserError, match=message):
        sampler.multi_guided([{"caption": "cup"}, {"caption": "duck"}], weights, "depth", **settings)


def test_features_are_the_mean_over_the_inputs_of_a_sample_alone(sampler, folder):
    texts = ["a red cup and a yellow duck", "duck"]  # of different lengths, so that one is padded
    both = sampler.features([{"caption": text} for text in texts])
    assert both.shape == (2, 32) and both.dtype == torch.float32
    alone = torch.cat([sampler.features({"caption": text}) for text in texts])
    torch.testing.assert_close(both, alone)
    assert not torch.allclose(both[0], both[1], atol=1e-3)
    model, batch = sampler.generation.model, sampler._batch({"caption": texts[0]})
    x, emb, padding = model.embed_encoder(
        batch, model.select_tokens(batch, batch["caption"]["tensor"].shape[1], 1).encoder
    )
    torch.testing.assert_close(alone[:1], model.encode(x + emb, padding).mean(1).detach())


def test_what_is_read_is_what_the_model_gets(sampler, folder):
    inputs = {"depth": torch.arange(16), "tok_rgb": folder / "photo.png", "caption": "a red cup"}
    (read,) = sampler.read(inputs)
    assert [read[name].kind for name in read] == ["depth", "rgb", "caption"]
    assert read["tok_depth@32"].tensor.flatten().equal(inputs["depth"])
    torch.testing.assert_close(sampler.features(read), sampler.features(inputs))
