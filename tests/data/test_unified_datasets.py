"""The pipeline: what a batch holds, its exact position, and what happens to samples that are bad."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.collate import as_tensors, single
from fourm.data.raw_sample import RawSample
from fourm.data.sample_dataset import build_dataset
from fourm.data.unified_datasets import Stream, build_eval_loader, draws_in_epoch
from fourm.utils.errors import DataError
from fourm.utils.seeds import generator
from tests.data.dataset_files import MODALITIES, jpeg, npy, write_folders, write_shards
from tests.data.toy_batches import TOKENIZER, config, indices, same, train


def damage(folder, index, content):
    """Replaces a member of one sample."""
    return lambda f, i, _, original: content if (f, i) == (folder, index) else original


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), 4, 5)


@pytest.fixture(scope="module")
def bad_shards(tmp_path_factory):
    """Sample 3 has a broken JPEG, sample 7 no caption."""
    broken = damage("rgb", 3, b"\xff\xd8 not much of a picture")
    return write_shards(
        tmp_path_factory.mktemp("bad"), 4, 5, lambda *a: None if a[:2] == ("caption", 7) else broken(*a)
    )


def test_batch_structure_and_join(tmp_path, shards):
    (batch,) = train(config(tmp_path, shards), 1, batch_size=32)
    assert list(batch.mod_dict) == sorted(MODALITIES)
    lengths = {"rgb@32": 4, "tok_rgb@32": 4, "caption": 26, "det": 42}
    for name, entry in batch.mod_dict.items():
        assert entry["input_mask"].shape == (32, lengths[name]) and entry["input_mask"].dtype == torch.bool
        assert entry["target_mask"].shape == (32, lengths[name]) and entry["target_mask"].dtype == torch.bool
        assert entry["decoder_attention_mask"].dtype == torch.int32
    assert batch.mod_dict["rgb@32"]["tensor"].shape == (32, 3, 32, 32)
    for name in ("tok_rgb@32", "caption", "det"):
        assert batch.mod_dict[name]["tensor"].dtype == torch.int64
    # Caption and tokens are of one sample and one stored crop.
    compared = 0
    tokens = batch.mod_dict["tok_rgb@32"]["tensor"][:, 0].tolist()
    for token, caption in zip(tokens, batch.mod_dict["caption"]["tensor"].tolist(), strict=True):
        words = TOKENIZER.decode([i for i in caption if i > 203], skip_special_tokens=False).split()
        for word, number in (("s", token // 3), ("c", token % 3)):
            for found in (w for w in words if w[0] == word and w[1:].isdigit()):
                assert int(found[1:]) == number
                compared += 1
    assert compared > 20 and len({token % 3 for token in tokens}) == 3


def test_one_rank_with_two_workers_sees_what_two_ranks_see(tmp_path, shards):
    data = config(tmp_path, shards)
    alone = train(data, 8, per_epoch=6, workers=2)
    ranks = [train(data, 4, per_epoch=3, workers=1, rank=rank, ranks=2) for rank in (0, 1)]
    for k, batch in enumerate(alone):
        other = ranks[k % 2][k // 2]
        assert same(batch.mod_dict, other.mod_dict) and batch.position == other.position
    streams = [b.position["stream"] for b in alone]
    assert streams == [0, 1] * 4 and not same(alone[0].mod_dict, alone[1].mod_dict)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (4, 1)])
def test_with_as_many_streams_all_ranks_and_workers_see_the_same(tmp_path, shards, bad_shards, ranks, workers):
    data = config(tmp_path, bad_shards, shards)
    alone = train(data, 32, per_epoch=12, workers=4)
    for start in (0, 20):  # the second goes on within an epoch
        draws = draws_in_epoch({b.position["stream"]: b.position for b in alone[:start]}.values(), start // 12)
        options = {"start": start // ranks, "positions": draws, "per_epoch": 12 // ranks, "streams": 4}
        count = (32 - start) // ranks
        found = [train(data, count, workers=workers, rank=rank, ranks=ranks, **options) for rank in range(ranks)]
        for g, expected in enumerate(alone[start:]):
            batch = found[g % ranks][g // ranks]
            assert same(batch.mod_dict, expected.mod_dict)
            assert {**batch.position, "skipped": 0} == {**expected.position, "skipped": 0}


@pytest.mark.parametrize("kind", ["shards", "bad_shards", "mixture", "folders"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resumed_run_continues_bit_for_bit(tmp_path, request, kind, workers, caplog):
    if kind == "mixture":
        data = config(tmp_path, request.getfixturevalue("bad_shards"), request.getfixturevalue("shards"))
    elif kind == "folders":
        data = config(tmp_path, write_folders(tmp_path / "files", 11), use_wds=False)
    else:
        data = config(tmp_path, request.getfixturevalue(kind))
    whole = train(data, 11, workers=workers)
    assert not same(whole[0].mod_dict, whole[5].mod_dict)  # epochs differ
    if kind == "bad_shards":
        assert sum(n for b in whole for n in b.position["skipped"].values()) > 0
        assert any(b.position["draws"] % 4 for b in whole)
    for start in range(1, 11) if workers == 0 else (3, 5, 9):
        positions = {b.position["stream"]: b.position for b in whole[:start]}
        rest = train(
            data, 11 - start, workers=workers, start=start, positions=draws_in_epoch(positions.values(), start // 5)
        )
        for before, after in zip(whole[start:], rest, strict=True):
            assert same(before.mod_dict, after.mod_dict)
            assert {**before.position, "skipped": 0} == {**after.position, "skipped": 0}


def test_resuming_within_an_epoch_needs_positions(tmp_path, shards):
    with pytest.raises(ValueError, match="draws_by_stream"):
        train(config(tmp_path, shards), 1, start=3)


def test_passing_over_draws_reads_no_content(tmp_path):
    data = config(tmp_path, write_shards(tmp_path / "garbage", 3, 4, lambda *_: b"garbage"))
    dataset = build_dataset(data.train["d0"], TOKENIZER, training=True)
    stream = Stream([dataset], [1], [BadSampleLedger("d0", 0.0)], 0, 0, 0, 1, skip=500)
    assert stream.num_draws == 500


def test_repeats_share_a_sample_with_other_crops_and_masks(tmp_path, shards):
    data = config(tmp_path, shards, wds_n_repeats=4, wds_shuffle_buffer_tar=0, wds_shuffle_buffer_repeat=0)
    (batch,) = train(data, 1, batch_size=40)
    groups = [indices(batch)[i : i + 4] for i in range(0, 40, 4)]
    assert all(len(set(group)) == 1 for group in groups) and len({g[0] for g in groups}) > 4
    tokens = batch.mod_dict["tok_rgb@32"]["tensor"][:, 0]
    masks = batch.mod_dict["tok_rgb@32"]["input_mask"]
    assert any(len(set(tokens[i : i + 4].tolist())) > 1 for i in range(0, 40, 4))
    assert any(not torch.equal(masks[i], masks[i + 1]) for i in range(0, 40, 4))
    dataset = build_dataset(data.train["d0"], TOKENIZER, training=True)
    first, second = itertools.islice(dataset.draw(0, 0, 0, 1, BadSampleLedger("d0", 0.0)), 2)
    assert first is second  # decoded once for all of them


def test_a_repeat_is_preprocessed_once_and_independent_of_the_others(tmp_path, shards):
    once, repeated = (
        build_dataset(config(tmp_path, shards, wds_n_repeats=repeats).train["d0"], TOKENIZER, training=True)
        for repeats in (1, 4)
    )
    kept = next(repeated.draw(0, 0, 0, 1, BadSampleLedger("d0", 0.0)))
    fresh = RawSample(kept.key, kept.members)
    for seed in range(4):
        got, expected = (
            as_tensors(single(dataset.masked(sample, generator(seed)), dataset.modalities))
            for dataset, sample in ((repeated, kept), (once, fresh))
        )
        assert same(got, expected)
        for entry in got.values():
            for tensor in entry.values():
                tensor.zero_()  # as users may do with what they get
    assert repeated.prepared(kept) is repeated.prepared(kept) and once.prepared(fresh) is not once.prepared(fresh)
    assert isinstance(repeated.prepared(kept)["det"], list), "the instances were parsed"


@pytest.mark.parametrize("buffer", ["wds_shuffle_buffer_tar", "wds_shuffle_buffer_repeat"])
def test_each_shuffle_buffer_mixes_shards(tmp_path, shards, buffer):
    none = {"wds_n_repeats": 1, "wds_shuffle_buffer_tar": 0, "wds_shuffle_buffer_repeat": 0}

    def changes_of_shard(options):
        (batch,) = train(config(tmp_path, shards, **none | options), 1, batch_size=60)
        return len(list(itertools.groupby(i // 5 for i in indices(batch)))) - 1

    assert changes_of_shard({}) <= 11 and changes_of_shard({buffer: 40}) > 30


def test_mixture_follows_weights_and_fills_absent_modalities(tmp_path, shards):
    data = config(tmp_path, shards, shards, weights={"d0": 3, "d1": 1})
    batches = train(data, 10, batch_size=40)
    has_image = torch.cat([~b.mod_dict["tok_rgb@32"]["target_mask"].all(1) for b in batches])
    has_image |= torch.cat([~b.mod_dict["tok_rgb@32"]["input_mask"].all(1) for b in batches])
    assert 0.6 < has_image.float().mean() < 0.85
    only_text = config(tmp_path, shards, shards, weights={"d0": 0, "d1": 1})
    (batch,) = train(only_text, 1)
    assert list(batch.mod_dict) == list(batches[0].mod_dict)
    for name in ("rgb@32", "tok_rgb@32"):
        entry, like = batch.mod_dict[name], batches[0].mod_dict[name]
        assert entry["input_mask"].all() and entry["target_mask"].all() and not entry["decoder_attention_mask"].any()
        assert {k: (v.shape[1:], v.dtype) for k, v in entry.items()} == {
            k: (v.shape[1:], v.dtype) for k, v in like.items()
        }


@pytest.mark.parametrize(
    "content, reason",
    [(b"\xff\xd8 no picture", "corrupt"), (b"", "corrupt"), ("cut", "corrupt")],
)
@pytest.mark.parametrize("repeats", [1, 2])
def test_corrupt_image_is_skipped_counted_and_named(tmp_path, caplog, content, reason, repeats):
    def change(folder, index, _, original):
        if (folder, index) != ("rgb", 2):
            return original
        return original[: len(original) // 2] if content == "cut" else content

    path = write_shards(tmp_path / "s", 1, 4, change)
    data = config(tmp_path, path, input_alphas="10-1-1-1", wds_n_repeats=repeats)
    batches = train(data, 5)
    assert {i for b in batches for i in indices(b)} == {0, 1, 3}
    counts = sum((Counter(b.position["skipped"]) for b in batches), Counter())
    assert sum(counts.values()) == batches[-1].position["draws"] - 20
    assert all(key.startswith(f"d0: {reason}") for key in counts)
    messages = [r.getMessage() for r in caplog.records]
    assert any(f"{tmp_path}/s/rgb/shard-00000.tar: key '00002'" in m for m in messages)
    assert len(messages) <= 2  # not once per draw


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run_in_one_line(tmp_path, workers, caplog):
    path = write_shards(tmp_path / "s", 2, 4, damage("caption", 1, b"{not json"))
    data = config(tmp_path, path, max_bad_fraction=0.05)
    with pytest.raises(
        DataError, match=r"^data set d0: \d+ of 1\d\d samples cannot be read.*max_bad_fraction"
    ) as error:
        train(data, 500, workers=workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["caption", "crop_settings"])
def test_data_without_a_single_good_sample_ends_even_if_all_may_be_bad(tmp_path, folder, caplog):
    path = write_shards(tmp_path / "s", 1, 3, lambda f, i, _, content: b"{" if f == folder else content)
    with pytest.raises(DataError, match="d0: 100 of 100 samples cannot be read"):
        train(config(tmp_path, path, max_bad_fraction=1.0), 1)
    (tmp_path / "s" / folder / "shard-00000.tar").write_bytes(b"")
    with pytest.raises(DataError, match="samples cannot be joined by key"):
        train(config(tmp_path, path, max_bad_fraction=1.0), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_for_too_many_bad_samples_of_the_whole_set(tmp_path, workers, caplog):
    path = write_shards(
        tmp_path / "s", 2, 10, lambda f, i, _, content: b"{" if f == "caption" and i in (2, 3) else content
    )

    def evaluate(max_bad_fraction):
        dataset = config(tmp_path, path, max_bad_fraction=max_bad_fraction).train["d0"]
        loader = build_eval_loader(dataset, TOKENIZER, batch_size=5, num_workers=workers, rank=0, world_size=1, seed=0)
        return sum(len(indices(batch)) for batch in loader)

    assert evaluate(0.1) == 18  # although it is more of what one worker read
    with pytest.raises(DataError, match="of 20 samples cannot be read, with max_bad_fraction=0.09"):
        evaluate(0.09)


@pytest.mark.parametrize(
    "folder, content, message",
    [
        ("tok_rgb", [[0, 1, 2, 256]] * 3, "tok_rgb@32: token id 256 lies outside the vocabulary of 256"),
        ("tok_rgb", [[0, 1, 2, 3]] * 2 + [[0, 1, -2, 3]], "tok_rgb@32: token id -2"),  # in a crop that may not be drawn
        ("tok_rgb", [[0, 1, 2]] * 3, "tok_rgb@32: expected 4 tokens, found 3"),
        ("tok_rgb", [[0, 1, 2, 3]] * 2, "values of 2 crops, but crop_settings has 3"),
        ("crop_settings", [[0, 0, 32, 32]] * 3, "crop_settings of shape (crops, 5): top, left, height, width, flip"),
        ("rgb", None, "rgb@32: crop (top 4, left 0, 40x40) does not lie inside the image of 20x20"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_contract_names_file_key_modality_and_value(tmp_path, folder, content, message, workers):
    broken = jpeg(np.random.default_rng(0), (20, 20)) if content is None else npy(np.array(content))
    path = write_shards(tmp_path / "s", 1, 2, damage(folder, 1, broken))
    with pytest.raises(DataError) as error:
        train(config(tmp_path, path, tok_train_aug=False, input_alphas="10-1-1-1"), 5, workers=workers)
    assert str(error.value).startswith(f"{tmp_path}/s/{folder}/shard-00000.tar: key '00001': ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("use_wds", [False, True])
def test_evaluation_covers_every_sample_once_over_all_ranks(tmp_path, shards, use_wds):
    path = shards if use_wds else write_folders(tmp_path / "files", 20)
    dataset = config(tmp_path, path, use_wds=use_wds).train["d0"]

    def evaluate(workers, rank, ranks, **ranges):
        loader = build_eval_loader(
            dataset, TOKENIZER, batch_size=3, num_workers=workers, rank=rank, world_size=ranks, seed=0, **ranges
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        return batches

    alone = evaluate(0, 0, 1)
    assert sorted(i for b in alone for i in indices(b)) == list(range(20))
    assert [len(indices(b)) for b in alone] == [3] * 6 + [2]
    assert all((b.mod_dict["tok_rgb@32"]["tensor"] % 3 == 0).all() for b in alone)  # the centre crop
    for again in (evaluate(0, 0, 1), evaluate(2, 0, 1)):
        assert all(same(a.mod_dict, b.mod_dict) for a, b in zip(alone, again, strict=True))
    parts = [evaluate(0, rank, 3) for rank in range(3)]
    assert sorted(i for part in parts for b in part for i in indices(b)) == list(range(20))

    def rows(batches):
        return {
            i: {m: {k: v[row] for k, v in entry.items()} for m, entry in b.mod_dict.items()}
            for b in batches
            for row, i in enumerate(indices(b))
        }

    together = rows(alone)  # masks do not depend on the number of ranks
    assert all(same(together[i], row) for part in parts for i, row in rows(part).items())
    for b in evaluate(0, 0, 1, input_tokens_range=(5, 5), target_tokens_range=(3, 3)):
        inputs = sum((~entry["input_mask"]).sum(1) for entry in b.mod_dict.values())
        targets = sum((~entry["target_mask"]).sum(1) for entry in b.mod_dict.values())
        assert (inputs <= 5).all() and (targets <= 3 + 2).all()


def test_evaluation_skips_and_counts_bad_samples(tmp_path, bad_shards, caplog):
    dataset = config(tmp_path, bad_shards, input_alphas="10-1-1-1").train["d0"]
    loader = build_eval_loader(dataset, TOKENIZER, batch_size=5, num_workers=0, rank=0, world_size=1, seed=0)
    batches = list(loader)
    assert sorted(i for b in batches for i in indices(b)) == [i for i in range(20) if i not in (3, 7)]
    counts = sum((Counter(b.position["skipped"]) for b in batches), Counter())
    assert counts["d0: missing member"] == 1 and sum(counts.values()) == 2


def test_the_global_random_state_is_not_touched(tmp_path, shards):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(config(tmp_path, shards), 2)
    assert torch.equal(torch.get_rng_state(), before)
