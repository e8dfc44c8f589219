"""The data YAML and the alphas YAML: what they resolve to, and how their mistakes are answered."""

import dataclasses

import numpy as np
import pytest
import yaml

from fourm.data.data_config import build_sample_transform, load_data_config, split_domains
from fourm.data.image_augmenter import (
    CenterCropImageAugmenter,
    EmptyAugmenter,
    PreTokenizedImageAugmenter,
    RandomCropImageAugmenter,
)
from fourm.data.layout import expand
from fourm.data.modality_info import MODALITY_INFO
from fourm.utils.errors import UserError

TOKENS = {"num_input_tokens": 128, "num_target_tokens": 64}
DATASET = {
    "in_domains": "rgb@224-caption",
    "out_domains": "caption-tok_rgb@224",
    "input_alphas": 1.0,
    "target_alphas": "0.5-1e-3",
    "data_path": "data/[rgb,caption]/shard-{00..09}.tar",
}


@pytest.fixture
def load(tmp_path):
    def write_and_load(content, **tokens):
        path = tmp_path / "data.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return load_data_config(path, **{**TOKENS, **tokens})

    return write_and_load


@pytest.fixture
def dataset(load):
    """The training set that DATASET with ``fields`` gives."""
    return lambda fields=(), tokens=(), **others: load(
        {"train": {"datasets": {"cc": {**DATASET, **dict(fields)}}}, **others}, **dict(tokens)
    ).train["cc"]


def alphas_file(tmp_path, content, name="alphas.yaml"):
    (tmp_path / name).write_text(yaml.safe_dump(content))
    return {"input_alphas": None, "target_alphas": None, "alphas_config": name}


def test_a_data_set_is_resolved(dataset):
    config = dataset({"use_wds": True, "crop_scale": [0.5, 1]})
    assert config.name == "cc" and config.type == "multimodal" and config.use_wds is True
    assert config.in_domains == ("rgb@224", "caption") and config.out_domains == ("caption", "tok_rgb@224")
    assert list(config.modalities) == ["rgb@224", "caption", "tok_rgb@224"]
    assert config.crop_scale == (0.5, 1.0) and config.main_augment_domain == "rgb@224"
    assert config.data_path == DATASET["data_path"] and config.sampling_weights is None
    assert config.input_tokens_range == (128, 128) and config.target_tokens_range == (64, 64)


def test_alphas_are_one_value_or_one_per_modality(dataset):
    modalities = dataset().modalities
    assert [m.input_alphas for m in modalities.values()] == [(1.0,), (1.0,), (0.0,)]
    assert [m.target_alphas for m in modalities.values()] == [(0.0,), (0.5,), (1e-3,)]
    assert [m.keep for m in modalities.values()] == [(), ("random",), ()]
    assert dataset({"input_alphas": [2, 3]}).modalities["caption"].input_alphas == (3.0,)


def test_token_ranges_come_from_the_data_set_else_from_the_main_config(dataset):
    main = {"min_input_tokens": 16, "min_target_tokens": 8}
    assert dataset(tokens=main).input_tokens_range == (16, 128)
    own = dataset({"num_input_tokens": 32, "min_target_tokens": 64}, tokens=main)
    assert own.input_tokens_range == (16, 32) and own.target_tokens_range == (64, 64)
    with pytest.raises(UserError, match=r"cc: input tokens .* from 16 to 8"):
        dataset({"num_input_tokens": 8}, tokens=main)


def test_max_bad_fraction_comes_from_the_main_config_too(dataset):
    assert dataset(tokens={"max_bad_fraction": 0.2}).max_bad_fraction == 0.2
    assert dataset({"max_bad_fraction": 0.3}, tokens={"max_bad_fraction": 0.2}).max_bad_fraction == 0.3


def test_validation_inherits_from_the_training_set_of_its_name(load):
    own = {"data_path": "val", "use_wds": False}
    config = load(
        {"train": {"datasets": {"cc": {**DATASET, "use_wds": True}}}, "val": {"datasets": {"cc": own, "x": DATASET}}}
    )
    assert config.val["cc"] == dataclasses.replace(config.train["cc"], data_path="val", use_wds=False)
    assert config.val["x"].name == "x" and list(config.val) == ["cc", "x"]
    with pytest.raises(UserError, match="val.datasets.new: the key 'in_domains' is required"):
        load({"train": {"datasets": {"cc": DATASET}}, "val": {"datasets": {"new": own}}})


def test_own_alphas_of_validation_replace_the_inherited_ones(load, tmp_path):
    file = alphas_file(tmp_path, {name: {"input_alphas": [1, 1], "target_alphas": [1, 1]} for name in MODALITY_INFO})
    train = {**DATASET, **file}
    config = load(
        {"train": {"datasets": {"cc": train}}, "val": {"datasets": {"cc": {"input_alphas": 3, "target_alphas": 3}}}}
    )
    assert config.train["cc"].modalities["caption"].input_alphas == (1.0, 1.0)
    assert config.val["cc"].modalities["caption"].input_alphas == (3.0,)


def test_the_union_over_training_sets_is_sorted(load):
    text = {**DATASET, "in_domains": "det", "out_domains": "det", "target_alphas": 1.0}
    config = load({"train": {"datasets": {"cc": DATASET, "text": text}, "weights": [0.8, 0.2]}})
    assert config.in_domains == ["caption", "det", "rgb@224"] and config.out_domains == [
        "caption",
        "det",
        "tok_rgb@224",
    ]
    assert list(config.modalities) == ["caption", "det", "rgb@224", "tok_rgb@224"]
    assert config.weights == {"cc": 0.8, "text": 0.2}


def test_weights_may_be_a_mapping_or_left_out(load):
    sets = {"a": DATASET, "b": DATASET}
    assert load({"train": {"datasets": sets}}).weights == {"a": 1.0, "b": 1.0}
    assert load({"train": {"datasets": sets, "weights": {"b": 3, "a": 1}}}).weights == {"a": 1.0, "b": 3.0}
    for weights, message in (
        ([1], "train.weights must be one number of at least 0 for each of a, b, not "),
        ([0, 0], "train.weights must be one number of at least 0 for each of a, b, not "),
        ([1, -1], r"data.yaml: train.weights must be at least 0 and at most 1e\+09, not -1.0"),
        ([1, float("nan")], "data.yaml: 'train': weights must be a finite number, not nan"),
    ):
        with pytest.raises(UserError, match=message):
            load({"train": {"datasets": sets, "weights": weights}})
    with pytest.raises(UserError, match="unknown key 'c'"):
        load({"train": {"datasets": sets, "weights": {"c": 1}}})


def test_declared_modalities_are_used_like_the_others(load):
    block = {
        "tok_depth@64": {"vocab_size": 32, "input_size": 64, "patch_size": 8},
        "rgb@64": {"type": "img", "num_channels": 3, "input_size": 64, "patch_size": 8},
    }
    fields = {**DATASET, "in_domains": "rgb@64", "out_domains": "tok_depth@64", "target_alphas": 1}
    with pytest.raises(UserError, match="tok_depth@64: 'type' is required"):
        load({"train": {"datasets": {"cc": fields}}, "modalities": block})
    block["tok_depth@64"]["type"] = "img"
    config = load({"train": {"datasets": {"cc": fields}}, "modalities": block})
    assert config.train["cc"].modalities["tok_depth@64"].max_tokens == 64
    assert config.declarations == block and config.modalities["rgb@64"].transform == "rgb"
    assert config.train["cc"].main_augment_domain == "rgb@64"


def test_joined_names_are_split_at_the_longest_known_one():
    known = list(MODALITY_INFO)
    assert split_domains("CLIP-B16-caption", known, "x") == ("CLIP-B16", "caption")
    assert split_domains("caption-DINOv2-B14-global-DINOv2-B14-det", known, "x") == (
        "caption",
        "DINOv2-B14-global",
        "DINOv2-B14",
        "det",
    )
    assert split_domains(["det", "CLIP-B16"], known, "x") == ("det", "CLIP-B16")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_domain": "a"}, r"train\.datasets\.cc: unknown key 'in_domain'.*in_domains"),
        ({"in_domains": "rgb@224-captoin"}, "'in_domains': unknown modality 'captoin'.*caption"),
        ({"in_domains": "caption-caption"}, "'caption' is listed twice"),
        ({"out_domains": "rgb@224"}, "rgb@224 cannot be a target"),
        ({"in_domains": []}, "lists no modality"),
        ({"input_alphas": None}, "'input_alphas' is required, or an 'alphas_config'"),
        ({"input_alphas": "1-2-3"}, r"'input_alphas' has 3 values for 2 modalities \(rgb@224, caption\)"),
        ({"target_alphas": -1}, "'target_alphas' must be at least 0"),
        ({"target_alphas": "a-b"}, "'target_alphas' must be a number, not 'a'"),
        ({"alphas_config": "a.yaml"}, "either 'alphas_config' or"),
        ({"alphas_config": "no.yaml", "input_alphas": None, "target_alphas": None}, "there is no file no.yaml"),
        ({"main_augment_domain": "rgb@448"}, "'main_augment_domain' must be.*rgb@224.*did you mean 'rgb@224'"),
        ({"in_domains": "caption-det", "out_domains": "tok_rgb@224", "target_alphas": 1}, "boxes that follow crops"),
        ({"modality_name_map": {"images": "rgb"}}, "'modality_name_map': unknown key 'rgb'.*rgb@224"),
        ({"wds_n_repeats": 0}, "'wds_n_repeats' must be at least 1"),
        ({"hflip": 2}, "data.yaml: train.datasets.cc: 'hflip' must be at least 0 and at most 1, not 2.0"),
        ({"crop_scale": [0.5, 0.2]}, "'crop_scale' must be two numbers"),
        ({"crop_ratio": [1]}, "'crop_ratio' must be two numbers"),
        ({"type": "multimodel"}, "'type'.*multimodal"),
        ({"data_path": None}, "'data_path'"),
    ],
)
def test_mistakes_in_a_data_set_are_named(dataset, fields, message):
    with pytest.raises(UserError, match=message):
        dataset(fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trian": {}}, "unknown key 'trian'.*train"),
        ({}, "'train.datasets' must declare"),
        ({"train": {"dataset": {}}}, "train: unknown key 'dataset'.*datasets"),
        ({"train": {"datasets": {"cc": "x"}}}, "'cc' must be a mapping"),
    ],
)
def test_mistakes_in_the_file_are_named(load, content, message):
    with pytest.raises(UserError, match=message):
        load(content)


def entry(*inputs, targets=None, keep=None):
    return {"input_alphas": list(inputs), "target_alphas": targets or list(inputs), **({"keep": keep} if keep else {})}


@pytest.fixture
def mixture():
    return {
        "rgb@224": {"input_alphas": [1000, 0.5]},
        "caption": entry(0, 0.5, keep=["random", "all"]),
        "tok_rgb@224": {"target_alphas": [0.5, 1]},
        "det": entry(1, 2, 3),  # of no interest here, so its length does not matter
    }


def test_an_alphas_file_gives_one_value_per_component(dataset, tmp_path, mixture):
    config = dataset(alphas_file(tmp_path, mixture))
    rgb, caption, tokens = config.modalities.values()
    assert rgb.input_alphas == (1000.0, 0.5) and rgb.target_alphas == (0.0, 0.0) and rgb.keep == ()
    assert caption.input_alphas == caption.target_alphas == (0.0, 0.5) and caption.keep == ("random", "all")
    assert tokens.input_alphas == (0.0, 0.0) and tokens.target_alphas == (0.5, 1.0)
    assert config.sampling_weights is None


def test_components_may_have_weights(dataset, tmp_path, mixture):
    file = alphas_file(tmp_path, {"sampling_weights": [1, 0.5], "alphas_mixture": mixture})
    assert dataset(file).sampling_weights == (1.0, 0.5)
    assert dataset(file).modalities["caption"].keep == ("random", "all")


def test_an_alphas_file_is_found_beside_above_or_from_the_working_directory(dataset, tmp_path, mixture, monkeypatch):
    (tmp_path / "sub").mkdir()
    file = alphas_file(tmp_path / "sub", mixture)
    assert dataset({**file, "alphas_config": "sub/alphas.yaml"})
    with pytest.raises(UserError, match="there is no file alphas.yaml"):
        dataset(file)
    monkeypatch.chdir(tmp_path / "sub")
    assert dataset(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": None}, "alphas.yaml: caption: 'input_alphas' is required"),
        ({"caption": entry(1, 2, 3)}, "one value per component.*2 of rgb@224.*3 of caption"),
        ({"caption": entry(1, 2, keep=["all"])}, "one value per component.*1 of caption: 'keep'"),
        ({"caption": entry(1, 2, keep=["all", "some"])}, "caption: 'keep'"),
        ({"caption": {"input_alpha": 1}}, "caption: unknown key 'input_alpha'.*input_alphas"),
        ({"caption": entry(1, -2)}, "caption: 'input_alphas' must be at least 0"),
        ({"rgb@224": entry(1, 2, keep=["all", "all"])}, "rgb@224: 'keep' is only for sequences"),
        ({"alphas_mixture": {}, "weights": [1]}, "unknown key 'caption' beside 'alphas_mixture'"),
    ],
)
def test_mistakes_in_an_alphas_file_are_named(dataset, tmp_path, mixture, change, message):
    with pytest.raises(UserError, match=message):
        dataset(alphas_file(tmp_path, {**mixture, **change}))


def test_a_modality_without_alphas_and_wrong_weights_are_named(dataset, tmp_path, mixture):
    with pytest.raises(UserError, match="'sampling_weights' must be 2 numbers"):
        dataset(alphas_file(tmp_path, {"alphas_mixture": mixture, "sampling_weights": [1, 2, 3]}))
    del mixture["tok_rgb@224"]
    with pytest.raises(UserError, match="alphas.yaml: no alphas for modality tok_rgb@224"):
        dataset(alphas_file(tmp_path, mixture))


def augmenter(config, training=True):
    return build_sample_transform(config, training).image_augmenter


def test_the_augmenter_follows_from_the_modalities(dataset):
    assert augmenter(dataset()) == PreTokenizedImageAugmenter(224, False, main_domain="rgb@224")
    assert augmenter(dataset(), training=False) == PreTokenizedImageAugmenter(224, True, main_domain="rgb@224")
    assert augmenter(dataset({"tok_train_aug": False})).no_aug
    pixels = dataset({"in_domains": "rgb@448", "out_domains": "caption", "target_alphas": 1, "hflip": 0.1})
    assert augmenter(pixels) == RandomCropImageAugmenter(448, 0.1, main_domain="rgb@448")
    assert augmenter(pixels, training=False) == CenterCropImageAugmenter(448, main_domain="rgb@448")
    text = dataset({"in_domains": "caption", "out_domains": "caption-det"})
    assert isinstance(augmenter(text), EmptyAugmenter)


def test_captions_are_aligned_unless_the_data_set_says_no(dataset):
    sample = {
        "caption": ["a", "b"],
        "tok_rgb@224": np.ones((2, 196), int),
        "crop_settings": np.array([[0, 0, 9, 9, 0]] * 2),
    }
    for aligned, expected in ((True, {"a"}), (False, {"a", "b"})):
        transform = build_sample_transform(
            dataset({"aligned_captions": aligned, "tok_train_aug": False}), training=True
        )
        assert {transform(sample, np.random.default_rng(seed))["caption"] for seed in range(20)} == expected


def test_kinds_of_data_sets_and_of_masking_have_their_modalities(dataset):
    with pytest.raises(UserError, match="cc: modality rgb@224 cannot be read from records"):
        dataset({"type": "huggingface"})
    with pytest.raises(UserError, match="'masking' transfer: caption cannot be in in_domains and in out_domains"):
        dataset({"masking": "transfer"})
    transfer = {"masking": "transfer", "out_domains": "tok_rgb@224", "input_alphas": None, "target_alphas": None}
    assert dataset(transfer).masking == "transfer"


def test_the_main_domain_is_a_picture(load):
    block = {
        "sound@64": {"type": "img", "num_channels": 1, "input_size": 64, "patch_size": 16, "transform": "features"}
    }
    fields = {**DATASET, "in_domains": "sound@64-rgb@224", "out_domains": "caption", "target_alphas": 1}
    assert (
        load({"train": {"datasets": {"cc": fields}}, "modalities": block}).train["cc"].main_augment_domain == "rgb@224"
    )


def test_a_path_to_a_folder_is_read_as_folders(dataset, tmp_path):
    (tmp_path / "val" / "rgb" / "0").mkdir(parents=True)
    (tmp_path / "tars" / "rgb").mkdir(parents=True)
    (tmp_path / "tars" / "rgb" / "0.tar").touch()
    shards = dataset({"use_wds": True, "data_path": f"{tmp_path}/tars/[rgb]/0.tar"})
    assert shards.use_wds and not dataset({"use_wds": True, "data_path": f"{tmp_path}/val/[rgb]"}).use_wds
    assert not dataset({"use_wds": True, "data_path": str(tmp_path / "val")}).use_wds
    with pytest.raises(UserError, match="is a folder with shards"):
        dataset({"use_wds": True, "data_path": str(tmp_path / "tars")})


@pytest.mark.parametrize("path", ["a-{0..9.tar", "a-{0..999999999}.tar", "{" * 3000 + "a,b" + "}" * 3000])
def test_braces_are_balanced_and_bounded(path):
    with pytest.raises(UserError, match="its braces"):
        expand(path, None)


def test_inputs_that_take_every_token_leave_nothing_to_predict(dataset):
    fields = {"in_domains": "tok_rgb@224", "out_domains": "tok_rgb@224", "input_alphas": 1, "target_alphas": 1}
    with pytest.raises(UserError, match="cc: nothing is left to predict: samples have at most 196 tokens"):
        dataset({**fields, "num_input_tokens": 196})
    assert dataset({**fields, "num_input_tokens": 195}).input_tokens_range == (195, 195)


def test_the_published_name_of_the_buffer_of_records(dataset):
    assert dataset({"shuffle_buffer_load": 7}).wds_shuffle_buffer_tar == 7


@pytest.mark.parametrize(
    "fields", [{"input_alphas": ".nan"}, {"hflip": ".nan"}, {"crop_ratio": [1, ".inf"]}, {"wds_n_repeats": -1}]
)
def test_numbers_of_data_sets_are_finite_and_in_their_range(dataset, fields):
    with pytest.raises(UserError, match=f"cc: '{next(iter(fields))}' must be"):
        dataset(fields)
