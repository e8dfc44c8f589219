"""Data sets of records: text files, and mixtures of them with shards."""

import gzip
import json
import re
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace

import pytest

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.record_files import MAX_RECORD_BYTES, local_files, open_rows
from fourm.data.sample_dataset import build_dataset
from fourm.data.unified_datasets import build_eval_loader, draws_in_epoch
from fourm.utils.errors import DataError, MissingDependency, UserError
from tests.data.dataset_files import write_shards
from tests.data.toy_batches import TOKENIZER, config, same, train

TEXT = {"type": "huggingface", "in_domains": "caption", "out_domains": "caption", "modality_name_map": {}}


def write(path, rows, kind="json"):
    lines = "".join((row if kind == "txt" else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def rows(start, count):
    return [{"text": f"sample s{i}", "url": "x"} for i in range(start, start + count)]


def numbers(batches):
    """Which records are in the batches: every caption is all target or has its words."""
    words = [
        TOKENIZER.decode([i for i in row if i > 203])
        for b in batches
        for row in b.mod_dict["caption"]["tensor"].tolist()
    ]
    return [int(word[1:]) for text in words for word in text.split() if word[0] == "s" and word[1:].isdigit()]


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "a-0.json", rows(0, 10))
    write(tmp_path / "a-1.json.gz", rows(10, 10))
    return tmp_path


def keys(files, pattern, streams=1, draws=20, repeats=1):
    data = config(files, files / pattern, **TEXT | {"wds_n_repeats": repeats, "wds_shuffle_buffer_tar": 0})
    dataset = build_dataset(data.train["d0"], TOKENIZER, training=True)
    found = []
    for stream in range(streams):
        ledger = BadSampleLedger("d0", 0.0)
        samples = dataset.source.draw((0, "order", 0, "d0"), stream, streams, ledger)
        found.append([next(samples).where("") for _ in range(draws // streams)])
    return found


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_a_pass_of_all_streams_has_each_record_once(files, streams):
    write(files / "a-1.json", rows(10, 10))
    found = keys(files, "a-{0..1}.json", streams)
    assert len({key for stream in found for key in stream}) == 20


def test_lines_of_text_and_compressed_files_are_read(files):
    write(files / "lines.txt", ["sample s1", "", "sample s2"], "txt")
    assert set(numbers(train(config(files, files / "lines.txt", **TEXT), 8))) == {1, 2}
    assert set(numbers(train(config(files, files / "a-1.json.gz", **TEXT), 40))) == set(range(10, 20))
    named = TEXT | {"modality_name_map": {"url": "caption"}}
    assert numbers(train(config(files, files / "a-0.json", **named), 2)) == []


def test_the_extension_alone_says_what_a_file_is(files):
    write(files / "of.txt.files.json", rows(0, 3))
    write(files / "lines.txt.gz", [f"sample s{i}" for i in (7, 8)], "txt")
    data = config(files, files / "{of.txt.files.json,lines.txt.gz}", **TEXT)
    assert set(numbers(train(data, 20))) == {0, 1, 2, 7, 8}


def test_a_damaged_file_is_named(files):
    path = write(files / "many.json.gz", [{"text": f"sample s{i} {i**9}"} for i in range(2000)])
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + b"\xff" * 99 + whole[middle + 99 :], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="many.json.gz: cannot be read to its end"):
            keys(files, "many.json.gz", draws=2000)


def test_a_run_goes_on_within_the_records(files):
    data = config(files, files / "a-0.json", **TEXT)
    for workers in (0, 2):
        whole = train(data, 8, workers=workers)
        position = draws_in_epoch([b.position for b in whole[: 2 + bool(workers)]], 0)
        start = 2 + bool(workers)
        rest = train(data, 8 - start, workers=workers, start=start, positions=position)
        assert all(same(a.mod_dict, b.mod_dict) for a, b in zip(whole[start:], rest, strict=True))


def test_mixture_of_shards_and_text_follows_its_weights(files):
    shards = write_shards(files / "s", 2, 5)
    text = config(files, files / "a-0.json", **TEXT).train["d0"]
    data = config(files, shards, files / "a-0.json", weights={"d0": 1, "d1": 3})
    data.train["d1"] = replace(text, name="d1")
    batches = train(data, 10, batch_size=40)
    counts = Counter()
    for batch in batches:
        entry = batch.mod_dict["tok_rgb@32"]
        images = ~entry["input_mask"].all(1) | ~entry["target_mask"].all(1)
        counts.update(images.tolist())
        assert not batch.position["missing"]  # what a source does not have is not missing in its samples
    assert 0.15 < counts[True] / 400 < 0.3


def test_every_record_is_evaluated_once(files):
    data = config(files, files / "a-0.json", **TEXT)
    loader = build_eval_loader(data.train["d0"], TOKENIZER, batch_size=4, num_workers=0, rank=0, world_size=1, seed=0)
    assert sum(len(b.mod_dict["caption"]["tensor"]) for b in loader) == 10


def test_bad_records_are_counted_or_left_out(files, caplog):
    path = files / "bad.json"
    path.write_text('{"text": "sample s1"}\n{"text": \n{"words": "sample s2"}\n')
    batches = train(config(files, path, **TEXT), 5)
    skipped = sum((Counter(b.position["skipped"]) for b in batches), Counter())
    assert set(skipped) == {"d0: corrupt record", "d0: missing column"} and set(numbers(batches)) <= {1}
    messages = " ".join(r.getMessage() for r in caplog.records)
    assert (
        f"{path}: record 2" in messages
        and "no column caption or text for modality caption (there are words)" in messages
    )
    path.write_text('{"text": "sample s1"}\n{"words": "sample s2"}\n')
    batches = train(config(files, path, **TEXT, missing="skip", max_bad_fraction=0.0), 5)
    assert not any(b.position["skipped"] for b in batches)
    path.write_text('{"words": "sample s2"}\n')
    with pytest.raises(DataError, match="100 of 100 samples cannot be read"):
        train(config(files, path, **TEXT, missing="skip"), 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'\xef\xbb\xbf{"text": "sample s2"}\r', None),
        (b'{"text": "sample s3", "text": "sample s2"}', None),  # the last one counts, as in all of JSON's readers
        (b'{"text": "sample s2", "score": NaN}', None),
        (b'{"text": NaN}', "missing value"),
        (b'{"text": null}', "missing column"),
        (b'["sample s2"]', None),  # a list of captions
        (b"[1, 2]", "modality caption"),
        (b'{"text": "' + b"a" * 20_000_000 + b'"}', "record too large"),
        (b'{"text": "a dog \\ud83d"}', "corrupt record"),
        (b"[" * 100_000, "corrupt record"),
    ],
    ids=["BOM", "twice", "NaN elsewhere", "NaN", "null", "list", "numbers", "20 MB", "half an emoji", "deep"],
)
def test_lines_of_many_kinds(files, line, reason):
    path = files / "kinds.jsonl"
    path.write_bytes(
        (b"" if line[:1] == b"\xef" else b'{"text": "sample s1"}\r\n') + line + b'\n{"text": "sample s1"}\n'
    )
    if reason and reason.startswith("modality"):
        with pytest.raises(DataError, match=reason):
            train(config(files, path, **TEXT), 5)
        return
    batches = train(config(files, path, **TEXT, max_bad_fraction=0.9), 5)
    skipped = sum((Counter(b.position["skipped"]) for b in batches), Counter())
    assert set(skipped) == ({f"d0: {reason}"} if reason else set())
    assert set(numbers(batches)) <= ({1} if reason else {1, 2}) and (reason or 2 in numbers(batches))


def test_what_is_not_there_is_named(files):
    with pytest.raises(UserError, match="nothing.json: there is no such file"):
        train(config(files, files / "nothing.json", **TEXT), 1)
    (files / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="there are no records for stream 0 of 1"):
        train(config(files, files / "empty.txt", **TEXT), 1)


@pytest.fixture
def published(tmp_path):
    """A folder as the C4 of the hub is downloaded, in part."""
    folder = tmp_path / "c4" / "en"
    folder.mkdir(parents=True)
    for part in range(2):
        write(folder / f"c4-train.{part:05d}-of-01024.json.gz", rows(10 * part, 10))
    write(folder / "c4-validation.00000-of-00008.json.gz", rows(100, 5))
    (folder / "README.txt").write_text("not a record")
    (folder / "._c4-train.00000-of-01024.json.gz").write_bytes(b"what another system leaves")
    return tmp_path / "c4"


@pytest.mark.parametrize(
    "place, expected",
    [
        ("en", range(20)),
        ("", range(20)),
        ("en/", range(20)),
        ("en:train", range(20)),
        ("en:validation", range(100, 105)),
        ("en:val", range(100, 105)),
        ("en/*.json.gz", [*range(20), *range(100, 105)]),
        ("en/c4-train.{00000..00001}-of-*.json.gz", range(20)),
        ("{en,nothing}", None),
        ("*", range(20)),
    ],
)
def test_a_folder_or_a_pattern_names_the_files_of_a_split(published, place, expected, monkeypatch):
    monkeypatch.setenv("HOME", str(published.parent))
    for root in (f"{published}", "~/c4"):
        if expected is None:
            with pytest.raises(UserError, match="nothing"):
                open_rows(f"{root}/{place}")
            continue
        found = open_rows(f"{root}/{place}".rstrip("/") if not place else f"{root}/{place}").share((0,), 0, 1)
        assert sorted(int(json.loads(line)["text"][8:]) for _, _, line in found) == list(expected)


def test_a_folder_of_one_split_or_of_none_is_read_whole(tmp_path):
    for folder, names in {"one": ["val-0.jsonl", "val-1.jsonl"], "none": ["a.json", "b.jsonl"]}.items():
        (tmp_path / folder).mkdir()
        for start, name in enumerate(names):
            write(tmp_path / folder / name, rows(start, 1))
        assert len(local_files(str(tmp_path / folder))) == 2
    (tmp_path / "nested" / "train").mkdir(parents=True)
    write(tmp_path / "nested" / "train" / "test-of-time.jsonl", rows(0, 1))
    (tmp_path / "nested" / "dev").mkdir()
    write(tmp_path / "nested" / "dev" / "a.jsonl", rows(0, 1))
    assert local_files(f"{tmp_path}/nested:validation") == [f"{tmp_path}/nested/dev/a.jsonl"]
    with pytest.raises(UserError, match="has files of test and validation; write .*nested:test"):
        local_files(f"{tmp_path}/nested")


@pytest.mark.parametrize(
    "data_path, message",
    [
        ("{tmp}/nowhere", "{tmp}/nowhere: there is no such file or folder"),
        ("./nowhere/at/all", "there is no such file or folder"),
        ("../nowhere", "there is no such file or folder"),
        ("~/nowhere", "there is no such file or folder"),
        ("nowhere/*.json", "no file matches it"),
        ("{tmp}/empty", "contains no record files (.json, .jsonl, .txt"),
        ("{tmp}/strange", "contains no record files"),
        ("{tmp}/strange/a.csv", "a.csv has no readable extension"),
        ("{tmp}/mixed", "found both text files and tables; choose one of them"),
        ("{tmp}/one:validation", "there are no files of validation; the splits are: train"),
        ("s3://me:secret@bucket/a.json?sig=secret", "s3://bucket/a.json: records are read only from local files"),
        ("a/b/c/d", "data sets on the hub are named NAMESPACE/NAME"),
        ("name with spaces/x", "data sets on the hub are named NAMESPACE/NAME"),
    ],
)
def test_what_cannot_be_on_the_hub_is_not_asked_for_there(tmp_path, data_path, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # asking for it would be another error
    for folder, names in {
        "empty": [],
        "strange": ["a.csv"],
        "mixed": ["a.json", "b.parquet"],
        "one": ["train.txt"],
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text("x\n")
    with pytest.raises(UserError, match=re.escape(message.replace("{tmp}", str(tmp_path)))) as failure:
        open_rows(data_path.replace("{tmp}", str(tmp_path)))
    assert "secret" not in str(failure.value) and "pip install" not in str(failure.value)


def test_a_line_without_end_is_a_bad_record_of_bounded_memory(files, monkeypatch, caplog):
    path = files / "bomb.json.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "sample s1"}\n{"text": "')
        for _ in range(64):
            file.write(b"a" * 2**20)
        file.write(b'"}\n{"text": "sample s3"}\n')
    tracemalloc.start()
    try:
        found = [(key, line) for key, _, line in open_rows(str(path)).share((0,), 0, 1)]
        assert tracemalloc.get_traced_memory()[1] < 5 * MAX_RECORD_BYTES
    finally:
        tracemalloc.stop()
    assert found == [("1", b'{"text": "sample s1"}'), ("2", None), ("3", b'{"text": "sample s3"}')]
    batches = train(config(files, path, **TEXT, max_bad_fraction=0.5), 6)
    assert set(numbers(batches)) == {1, 3}
    assert set().union(*(batch.position["skipped"] for batch in batches)) == {"d0: record too large"}
    monkeypatch.setattr("fourm.data.record_files._MAX_SKIPPED_BYTES", 2**23)
    with pytest.raises(UserError, match="bomb.json.gz: cannot be read to its end: a line has more than"):
        list(open_rows(str(path)).share((0,), 0, 1))


def test_a_file_that_is_no_lines_is_named(files):
    for value in (rows(0, 3), {"images": rows(0, 3)}):
        (files / "whole.json").write_text(json.dumps(value, indent=1))
        with pytest.raises(UserError, match="whole.json: has one JSON value over several lines"):
            keys(files, "whole.json")


def test_what_is_compressed_or_marked_is_read_whatever_it_is_called(files):
    (files / "a.json").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "sample s1"}\r\n'))
    assert [line for _, _, line in open_rows(str(files / "a.json")).share((0,), 0, 1)] == [b'{"text": "sample s1"}']


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_folder_of_tables_is_read(tmp_path, kind):
    import datasets
    import pyarrow.parquet

    if kind == "arrow":
        datasets.Dataset.from_list(rows(0, 8)).save_to_disk(str(tmp_path / "d"), num_shards=2)
    else:
        (tmp_path / "d").mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(0, 8)), tmp_path / "d" / "0.parquet")
    found = open_rows(str(tmp_path / "d")).share((0,), 0, 1)
    assert sorted(row["text"] for _, _, row in found) == [f"sample s{i}" for i in range(8)]
    for file in (tmp_path / "d").glob(f"*.{kind}"):
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="d(/0.parquet)?: cannot be read"):
        list(open_rows(str(tmp_path / "d")).share((0,), 0, 1))


def test_the_hub_needs_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match="data_path allenai/c4/en: .*pip install datasets"):
        train(config(tmp_path, "allenai/c4/en", **TEXT), 1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``space/texts``, which the datasets package takes for what it says, local or not; its files are Parquet."""
    import datasets
    import pyarrow.parquet

    # It waits so many seconds after each pass over Parquet for the threads of pyarrow to end; these passes are short.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    (tmp_path / "space" / "texts").mkdir(parents=True)
    for part in range(2):
        table = pyarrow.Table.from_pylist(rows(4 * part, 4))
        pyarrow.parquet.write_table(table, tmp_path / "space" / "texts" / f"train-{part:05d}.parquet")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_streams_divide_what_the_datasets_package_reads(hub, tmp_path, streams):
    data = config(tmp_path, "space/texts:train", **TEXT | {"wds_shuffle_buffer_tar": 0})
    source = build_dataset(data.train["d0"], TOKENIZER, training=True).source
    ledger, found = BadSampleLedger("d0", 0.0), []
    for stream in range(streams):
        samples = source.draw((0, "order", 0, "d0"), stream, streams, ledger)
        found += [next(samples).row()["text"] for _ in range(8 // streams)]
    assert sorted(found) == [f"sample s{i}" for i in range(8)]


def test_training_on_what_the_datasets_package_reads(hub, tmp_path):
    data = config(tmp_path, "space/texts", **TEXT)
    assert set(numbers(train(data, 20))) == set(range(8))
    whole = train(data, 6)
    rest = train(data, 3, start=3, positions=draws_in_epoch([whole[2].position], 0))
    assert all(same(a.mod_dict, b.mod_dict) for a, b in zip(whole[3:], rest, strict=True))
    assert set(numbers(train(data, 40, workers=2))) == set(range(8)), "workers leave nothing out"
