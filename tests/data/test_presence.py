"""Samples that lack modalities: what becomes of them, and of the budgets of what they lack."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourm.data.budgets import BudgetSampler
from fourm.data.masking import TransferMasking
from fourm.data.modality_info import declare
from fourm.data.unified_datasets import build_eval_loader
from fourm.utils.errors import DataError, UserError
from tests.data.dataset_files import write_folders, write_shards
from tests.data.test_masking import INFO, SAMPLE, SENTINELS, TOKENIZER, ids, parts
from tests.data.toy_batches import config, indices, same, train

ROLES = ("rgb", "tok", "caption", "det")
INFOS = {
    "rgb": {"type": "img", "num_channels": 3, "input_size": 32, "patch_size": 8},
    "tok": {"type": "img", "vocab_size": 10, "input_size": 32, "patch_size": 8},
    "caption": {"type": "seq", "max_tokens": 12},
    "det": {"type": "seq", "max_tokens": 20},
}
ALPHAS = st.lists(st.sampled_from([0.0, 0.1, 1.0, 1000.0]), min_size=3, max_size=3)


def modalities(alphas):
    return {
        name: declare(name, INFOS[name] | {"input_alphas": alphas[name][0], "target_alphas": alphas[name][1]})
        for name in ROLES
    }


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries({name: st.tuples(ALPHAS, ALPHAS) for name in ROLES}),
    st.sets(st.sampled_from(ROLES), min_size=1),
    st.integers(0, 2**32),
    st.integers(1, 30),
    st.integers(1, 30),
)
def test_budgets_go_to_what_is_there(alphas, present, seed, n_in, n_out):
    info = modalities(alphas)
    sampler = BudgetSampler(info, n_in, n_out)
    budgets = sampler.draw(np.random.default_rng(seed), present)
    assert list(budgets.input) == list(budgets.target) == list(info)
    for side, key, total in ((budgets.input, "input_alphas", n_in), (budgets.target, "target_alphas", n_out)):
        assert all(side[name] == 0 for name in info if name not in present)
        assert sum(side.values()) <= total
        gives = {name for name in present if info[name][key][budgets.component] > 0}
        if len(present) == len(info):
            continue
        if not gives:
            assert not any(side.values())
        elif all(info[name].max_tokens >= total for name in gives) and key == "input_alphas":
            assert sum(side.values()) == total  # nothing is kept for those that are not there
    useful = [
        all(any(info[name][key][c] > 0 for name in present) for key in ("input_alphas", "target_alphas"))
        for c in range(3)
    ]
    if any(useful) and len(present) < len(info):
        assert useful[budgets.component]


def test_with_everything_there_nothing_changes():
    sampler = BudgetSampler(modalities({name: ([0.1, 1, 0], [1, 0, 1]) for name in ROLES}), (2, 9), 7)
    for seed in range(50):
        draws = [sampler.draw(np.random.default_rng(seed), present) for present in (None, ROLES)]
        assert draws[0] == draws[1]


def gaps(folder, index, _, content):
    """Every third sample has no caption, every fourth no image, every fifth no tokens; but never all three."""
    lacks = {"caption": 3, "rgb": 4, "tok_rgb": 5}
    every = lacks.get(folder, 99)
    return None if index % every == every - 1 and index != 59 else content


@pytest.fixture(scope="module")
def gappy(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("gaps"), 4, 15, gaps)


def seen(batches, name):
    return torch.cat(
        [~b.mod_dict[name]["input_mask"].all(1) | ~b.mod_dict[name]["target_mask"].all(1) for b in batches]
    )


def test_allow_uses_what_is_there_and_counts_the_rest(tmp_path, gappy):
    batches = train(config(tmp_path, gappy, missing="allow", max_bad_fraction=0.0), 30, batch_size=20)
    assert sum(len(b.position["skipped"]) for b in batches) == 0
    expected = {"caption": 1 / 3, "rgb@32": 1 / 4, "tok_rgb@32": 1 / 5}
    for name, share in expected.items():
        lacking, total = np.sum([b.position["missing"][name] for b in batches], axis=0)
        assert total == 600 and abs(lacking / total - share) < 0.06
        assert 0 < seen(batches, name).float().mean() <= 1 - lacking / total + 1e-6
    lacking, total = np.sum([b.position["missing"]["det"] for b in batches], axis=0)
    assert abs(lacking / total - 1 / 4) < 0.06  # boxes cannot follow the crop of an image of unknown size
    tokens = torch.stack([sum((~e["input_mask"]).sum(1) for e in b.mod_dict.values()) for b in batches]).flatten()
    assert (tokens <= 12).all() and tokens.float().mean() > 6
    assert same(batches[3].mod_dict, train(config(tmp_path, gappy, missing="allow"), 4, batch_size=20)[3].mod_dict)


def test_skip_leaves_them_out_and_error_counts_them(tmp_path, gappy, caplog):
    batches = train(config(tmp_path, gappy, missing="skip", max_bad_fraction=0.0), 10)
    whole = {i for i in range(60) if i == 59 or all((i + 1) % n for n in (3, 4, 5))}
    assert {i for b in batches for i in indices(b)} <= whole
    assert not caplog.records and not any(b.position["skipped"] or b.position["missing"] for b in batches)
    with pytest.raises(DataError, match="cannot be joined by key, with max_bad_fraction=0.1"):
        train(config(tmp_path, gappy, max_bad_fraction=0.1), 100)
    nothing = write_shards(tmp_path / "n", 1, 4, lambda f, i, _, c: None if (f == "caption") == i % 2 else c)
    with pytest.raises(DataError, match="4 of 4|40 of 40"):
        train(config(tmp_path, nothing, missing="skip"), 1)


@pytest.mark.parametrize("use_wds", [True, False])
def test_validation_of_shards_and_folders_knows_missing_values_too(tmp_path, gappy, use_wds):
    lacks = {
        (folder, i) for folder in ("caption", "rgb", "tok_rgb") for i in range(60) if gaps(folder, i, "", 1) is None
    }
    path = gappy if use_wds else write_folders(tmp_path / "files", 60, lacks)
    counts = {}
    for missing in ("allow", "skip"):
        data = config(tmp_path, path, missing=missing, use_wds=use_wds)
        loader = build_eval_loader(
            data.train["d0"], TOKENIZER, batch_size=7, num_workers=0, rank=0, world_size=1, seed=0
        )
        counts[missing] = sum(len(indices(batch)) for batch in loader)
    assert counts == {"allow": 60, "skip": 25}


def test_missing_has_three_values(tmp_path, gappy):
    with pytest.raises(UserError, match="'missing' must be one of 'error', 'skip', 'allow'"):
        config(tmp_path, gappy, missing="alow")


def test_transfer_gives_all_of_the_inputs_and_asks_for_all_of_the_targets():
    task = TransferMasking(INFO, TOKENIZER, ["rgb@32", "t5_caption"], ["caption", "tok_rgb@32", "codes"])
    masked = task(SAMPLE, np.random.default_rng(0))
    for name in ("rgb@32", "tok_rgb@32"):
        entry, is_input = masked[name], name == "rgb@32"
        assert entry["input_mask"].all() != is_input and entry["target_mask"].all() == is_input
        assert entry["decoder_attention_mask"].tolist() == ([0] * 4 if is_input else [4, 0, 0, 0])
    assert parts(masked["caption"])[1].tolist() == [SENTINELS[0], *ids(SAMPLE["caption"]), SENTINELS[1]]
    assert len(parts(masked["caption"])[0]) == 0 and len(parts(masked["codes"])[1]) == 8
    assert parts(masked["t5_caption"])[0].tolist() == SAMPLE["t5_caption"].tolist()
    text = TransferMasking(INFO, TOKENIZER, ["caption"], ["tok_rgb@32"])(SAMPLE, np.random.default_rng(0))
    assert parts(text["caption"])[0].tolist() == ids(SAMPLE["caption"]) and len(parts(text["caption"])[1]) == 0
    with pytest.raises(UserError, match="modality caption: it is input and target"):
        TransferMasking(INFO, TOKENIZER, ["caption"], ["caption"])


@pytest.mark.parametrize(
    "inputs, targets, role, needed",
    [
        (["rgb@32"], ["tok_rgb@32"], "input", 4),
        (["tok_rgb@32", "caption"], ["codes"], "input", 4 + INFO["caption"]["max_tokens"]),
        (["rgb@32"], ["tok_rgb@32"], "target", 4),
        (["rgb@32"], ["tok_rgb@32", "caption"], "target", 4 + INFO["caption"]["max_tokens"] + 1),
    ],
)
def test_a_transfer_refuses_to_cut_its_samples_and_says_how_many_tokens_it_needs(inputs, targets, role, needed):
    ranges = {f"{role}_tokens_range": (1, needed - 1)}
    with pytest.raises(UserError, match=f"up to {needed} as {role} .*set num_{role}_tokens to {needed}$"):
        TransferMasking(INFO, TOKENIZER, inputs, targets, **ranges)
    TransferMasking(INFO, TOKENIZER, inputs, targets, **{f"{role}_tokens_range": needed})


def test_transfer_is_a_setting_of_a_data_set(tmp_path, gappy):
    options = {
        "in_domains": "rgb@32-caption",
        "out_domains": "tok_rgb@32",
        "missing": "skip",
        "masking": "transfer",
        "num_input_tokens": 16,
    }
    (batch,) = train(config(tmp_path, gappy, **options, input_alphas=None, target_alphas=None), 1)
    assert not batch.mod_dict["rgb@32"]["input_mask"].any() and not batch.mod_dict["tok_rgb@32"]["target_mask"].any()
