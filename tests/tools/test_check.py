"""The check of a data set finds everything that a run would skip or stop for, and says what the files hold."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fourm.data.data_config import load_data_config
from fourm.data.raw_sample import Member
from fourm.tools.check import _start_worker, main
from fourm.tools.inspection import DataSlice, Inspector
from fourm.utils.errors import UserError
from tests.data.dataset_files import (
    CROPS,
    MODALITIES,
    jpeg,
    npy,
    sample,
    text_tokenizer,
    write_folders,
    write_shards,
    write_tar,
)
from tests.warm_python import warm_python

REPOSITORY = Path(__file__).parents[2]
ROWS = [[0, 1, 2, 3]] * 3
DAMAGE = {
    ("rgb", 1): b"\xff\xd8 no picture",
    ("rgb", 2): jpeg(np.random.default_rng(0))[:-300],
    ("caption", 3): None,
    ("det", 4): b"{",
    ("tok_rgb", 5): npy([*ROWS[:2], [0, 1, 2, 256]]),
    ("tok_rgb", 6): npy(np.array(ROWS, np.float32)),
    ("tok_rgb", 7): npy(ROWS[:2]),
    ("tok_rgb", 8): npy([[0, 1, 2]] * 3),
    ("crop_settings", 9): npy([[0, 0, 40, 40]] * 3),
    ("crop_settings", 10): npy([[30, 0, 40, 40, 0]] * 3),
    ("caption", 11): b'[{"text": 1}]',
    ("caption", 12): json.dumps(["what is this thing here"] * 3).encode(),
    ("det", 13): b'{"boxes": []}',
    ("caption", 14): json.dumps(["crop"] * 2).encode(),
}
# key → modality, kind and problem of each
EXPECTED = {
    1: ("rgb@32", "corrupt member", ""),
    2: ("rgb@32", "corrupt value", "UnreadableImage: "),
    3: ("caption", "missing", ""),
    4: ("det", "corrupt member", ""),
    5: ("tok_rgb@32", "broken contract", "token id N lies outside the vocabulary of N"),
    6: ("tok_rgb@32", "broken contract", "expected whole numbers of shape (crops, tokens), not floatN of shape (N, N)"),
    7: ("tok_rgb@32", "broken contract", "it has values of N crops, but crop_settings has N"),
    8: ("tok_rgb@32", "broken contract", "expected N tokens, found N"),
    9: ("crop_settings", "broken contract", "tokens need crop_settings of shape (crops, N)"),
    10: ("rgb@32", "broken contract", "crop (top N, left N, NxN) does not lie inside the image of NxN"),
    11: ("caption", "broken contract", "expected a caption"),
    13: ("det", "corrupt value", "no key instances"),
    14: ("caption", "broken contract", "it has values of N crops, but crop_settings has N"),
}


def config(tmp_path, train_path, val=None, modalities=MODALITIES, **train):
    names = "-".join(modalities)
    train = {
        "in_domains": names,
        "out_domains": names.removeprefix("rgb@32-"),
        "input_alphas": 1.0,
        "target_alphas": 1.0,
        "data_path": train_path,
        "use_wds": True,
        **train,
    }
    content = {"modalities": dict(modalities), "train": {"datasets": {"toy": train}}}
    if val:
        content["val"] = {"datasets": {"toy": {"data_path": val, "use_wds": False}}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    text_tokenizer().save(str(tmp_path / "words.json"))
    return [f"{tmp_path}/data.yaml", "--text_tokenizer_path", f"{tmp_path}/words.json", "--num_workers", "0"]


def check(arguments, capsys):
    status = main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_every_kind_of_damage_is_found_and_named(tmp_path, capsys):
    path = write_shards(tmp_path / "s", 2, 10, lambda folder, i, _, content: DAMAGE.get((folder, i), content))
    status, (found,) = check(config(tmp_path, path), capsys)
    assert status == 1 and found["keys"] == 20 and found["complete_keys"] == found["samples_read"] == 19
    assert found["modalities"]["caption"]["missing"] == 1 and found["modalities"]["det"]["missing"] == 0
    for key, (modality, kind, what) in EXPECTED.items():
        (problem,) = [
            p
            for p in found["problems"]
            if p["modality"] == modality
            and p["kind"] == kind
            and p["problem"].startswith(what)
            and any(f"'{key:05d}'" in example for example in p["examples"])
        ]
        assert problem["examples"][0].startswith(f"{tmp_path}/s/") or kind == "missing"
    unknown = [p for p in found["problems"] if p["kind"] == "unknown words"]
    assert [p["modality"] for p in unknown] == ["caption"] and unknown[0]["problem"].endswith("not in the vocabulary")
    assert len(found["problems"]) == len(EXPECTED) + 1, "nothing follows from another problem"
    assert found["bad_samples"] == len(EXPECTED) - 1  # one is missing


@pytest.mark.parametrize(("missing", "used", "status"), [("error", 8, 1), ("skip", 8, 0), ("allow", 10, 0)])
def test_what_a_data_set_says_of_missing_values_holds(tmp_path, capsys, missing, used, status):
    lacking = {("caption", 3), ("det", 6)}
    path = write_shards(tmp_path / "s", 2, 5, lambda folder, i, _, content: None if (folder, i) in lacking else content)
    code, (found,) = check(config(tmp_path, path, missing=missing), capsys)
    assert (code, found["complete_keys"], found["samples_read"]) == (status, used, used)
    assert found["modalities"]["caption"]["missing"] == 1 and found["modalities"]["det"]["missing"] == 1
    assert bool(found["problems"]) == (missing == "error")


def test_a_sample_with_several_problems_shows_them_all(tmp_path, capsys):
    bad = {"rgb": b"x", "tok_rgb": npy([[0, 1, 2, 256]] * 3), "det": b"{"}
    path = write_shards(tmp_path / "s", 1, 2, lambda folder, i, _, content: bad.get(folder, content) if i else content)
    _, (found,) = check(config(tmp_path, path), capsys)
    assert {p["modality"] for p in found["problems"]} == {"rgb@32", "tok_rgb@32", "det"} and found["bad_samples"] == 1


def test_shards_that_are_damaged_or_not_there(tmp_path, capsys):
    path = write_shards(tmp_path / "s", 4, 4)
    tars = [tmp_path / "s" / "rgb" / f"shard-0000{i}.tar" for i in range(4)]
    tars[0].write_bytes(tars[0].read_bytes()[:4000])
    tars[1].write_bytes(b"no tar at all" * 100)
    tars[2].unlink()
    status, (found,) = check(config(tmp_path, path), capsys)
    troubles = [p for p in found["problems"] if p["kind"] == "unreadable shard"]
    assert status == 1 and sum(p["count"] for p in troubles) == 3
    said = "\n".join(example for p in troubles for example in p["examples"])
    assert "cut off" in said and "not a tar file" in said and f"there is no {tars[2]}" in said
    assert found["keys"] == 16 and 8 <= found["modalities"]["rgb@32"]["missing"] <= 12 and found["samples_read"] >= 4


def test_all_entries_of_an_object_array_are_read(tmp_path, capsys):
    path = write_folders(tmp_path / "f", 4)
    for index in range(4):
        crops = np.empty(CROPS, object)
        crops[:] = [[], [], [np.dtype("f4")] if index == 3 else []]
        target = tmp_path / "f" / "sam_instance" / f"part{index % 2}" / f"{index:05d}.npy"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(npy(crops))
    arguments = config(tmp_path, path, modalities={**MODALITIES, "sam_instance": {}}, use_wds=False)
    _, (found,) = check(arguments, capsys)
    (problem,) = [p for p in found["problems"] if p["kind"] == "corrupt member"]
    assert "00003" in problem["examples"][0] and "is not a plain value" in problem["examples"][0]
    assert found["modalities"]["sam_instance"]["dtypes"] == {"object": 3}


def test_pictures_that_show_another_frame(tmp_path, capsys):
    modalities = {**MODALITIES, "normal@32": {**MODALITIES["rgb@32"], "path": "normal"}}
    path = write_folders(tmp_path / "f", 4)
    for index in range(4):
        target = tmp_path / "f" / "normal" / f"part{index % 2}" / f"{index:05d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shape = {0: (24, 20, 3), 1: (40, 48, 3)}.get(index, (48, 40, 3))  # 0: half the size, the same frame
        buffer = io.BytesIO()
        Image.fromarray(np.zeros(shape, np.uint8)).save(buffer, "PNG")
        target.write_bytes(buffer.getvalue())
    arguments = config(tmp_path, path, modalities=modalities, use_wds=False, out_domains="caption-det-tok_rgb@32")
    status, (found,) = check(arguments, capsys)
    assert status == 1 and [(p["modality"], p["kind"], p["count"]) for p in found["problems"]] == [
        ("normal@32", "different shapes", 1)
    ]
    assert (
        "00001" in found["problems"][0]["examples"][0]
        and found["modalities"]["normal@32"]["smaller_than_input"] == 0.25
    )


def test_what_good_files_hold(tmp_path, capsys):
    status, (train, val) = check(
        config(tmp_path, write_shards(tmp_path / "s", 2, 5), write_folders(tmp_path / "f", 5)), capsys
    )
    assert status == 0 and not train["problems"] and (train["split"], val["split"]) == ("train", "val")
    assert train["modalities"]["tok_rgb@32"] == {
        "keys": 10,
        "missing": 0,
        "files": {"npy": 10},
        "dtypes": {"int16": 10},
        "crops": {"min": 3, "median": 3, "max": 3},
        "ids": {"min": 0, "max": 29, "vocabulary": 256, "used": round(30 / 256, 4)},
    }
    assert train["modalities"]["caption"]["tokens"] == {"min": 4, "median": 4, "max": 4, "limit": 12}
    assert train["modalities"]["rgb@32"]["height"] == {"min": 48, "median": 48, "max": 48}
    epoch = train["epoch"]
    per_sample = epoch["input_tokens_per_sample"] + epoch["target_tokens_per_sample"]
    assert epoch["samples"] == 10 and 0 < per_sample <= 256 and abs(epoch["tokens"] - 10 * per_sample) <= 1
    assert val["samples_read"] == 5


def test_a_sample_of_a_data_set_and_all_of_it(tmp_path, capsys):
    path = write_shards(
        tmp_path / "s", 4, 5, lambda folder, i, _, content: b"x" if (folder, i) == ("rgb", 19) else content
    )
    arguments = config(tmp_path, path)
    status, (found,) = check([*arguments, "--max_samples", "2"], capsys)
    assert status == 0 and found["samples_read"] == 2 and found["shards"] == {"looked_at": 2, "all": 4}
    assert found["epoch"]["estimated"] and found["epoch"]["samples"] == 20
    status, (found,) = check([*arguments, "--full"], capsys)
    assert status == 1 and found["samples_read"] == 20 and found["bad_samples"] == 1


@pytest.mark.slow
def test_worker_processes_find_the_same(tmp_path, capsys):
    path = write_shards(tmp_path / "s", 4, 5, lambda folder, i, _, content: DAMAGE.get((folder, i), content))
    arguments = config(tmp_path, path)
    alone = check([*arguments, "--full"], capsys)
    together = check([*arguments, "--full", "--num_workers", "2"], capsys)
    for _, (found,) in (alone, together):
        for problem in found["problems"]:
            problem["examples"].sort()
    assert alone == together


def test_the_table_and_the_exit_status_of_the_commands(tmp_path):
    arguments = config(tmp_path, write_shards(tmp_path / "s", 2, 5))
    commands = [
        [warm_python(), "-m", *module] for module in (["fourm.tools.check"], ["fourm", "check"], ["fourm.data.check"])
    ]
    runs = [subprocess.run([*c, *arguments], capture_output=True, text=True, cwd=REPOSITORY) for c in commands]
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout and [run.returncode for run in runs] == [0, 0, 0]
    lines = runs[0].stdout.splitlines()
    assert lines[0] == "train toy: 10 samples read; all good"
    assert (
        lines[1].split() == ["modality", "keys", "missing", "files", "content"] and "an epoch: 10 samples" in lines[-1]
    )
    write_tar(tmp_path / "s" / "det" / "shard-00000.tar", [("00001.json", b"{"), ("00002.json", sample(2)["det"][1])])
    run = subprocess.run([*commands[0], *arguments], capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 1 and "3 missing: det" in run.stdout and "1 corrupt member: det" in run.stdout
    (tmp_path / "s" / "rgb").rename(tmp_path / "s" / "gone")
    run = subprocess.run([*commands[1], *arguments], capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 2
    assert run.stderr.startswith("error: data_path ") and run.stderr.endswith("s/rgb/shard-00000.tar\n")


def test_a_transfer_is_checked_as_one(tmp_path, capsys):
    path = write_shards(tmp_path / "s", 1, 3)
    arguments = config(tmp_path, path, out_domains="tok_rgb@32", in_domains="rgb@32", masking="transfer")
    with pytest.raises(UserError, match="up to 4 as input .*set num_input_tokens to 4"):
        check([*arguments, "--num_input_tokens", "3"], capsys)
    status, (found,) = check([*arguments, "--num_input_tokens", "4", "--num_target_tokens", "5"], capsys)
    assert status == 0
    assert (found["epoch"]["input_tokens_per_sample"], found["epoch"]["target_tokens_per_sample"]) == (4, 4)


def write_records(tmp_path, **options):
    """Write 300 lines, of which one cannot be parsed and one has no text, and name a truncated and a missing file."""
    lines = [json.dumps({"text": "sample crop dog" + " crop" * (i % 3)}) for i in range(300)]
    lines[5], lines[7] = "{broken", '{"words": "sample"}'
    (tmp_path / "part-0.jsonl").write_text("\n".join(lines))
    (tmp_path / "part-1.txt.gz").write_bytes(gzip.compress(b"sample unseen\n" * 50)[:-4])
    text = {
        "type": "huggingface",
        "data_path": f"{tmp_path}/part-{{0.jsonl,1.txt.gz,2.jsonl}}",
        "use_wds": False,
        "in_domains": "caption",
        "out_domains": "caption",
        **options,
    }
    return config(tmp_path, text.pop("data_path"), modalities={"caption": {"max_tokens": 4}}, **text)


def test_records_are_counted_and_the_bad_ones_named(tmp_path, capsys):
    status, (found,) = check([*write_records(tmp_path), "--full"], capsys)
    assert status == 1 and found["shards"] == {"looked_at": 3, "all": 3}
    assert (found["samples_read"], found["bad_samples"], found["complete_keys"]) == (350, 2, 348)
    caption = found["modalities"]["caption"]
    assert (caption["keys"], caption["missing"], caption["files"]) == (348, 2, {"jsonl": 298, "txt.gz": 50})
    assert caption["tokens"] == {"min": 2, "median": 4, "max": 5, "limit": 4}
    assert caption["cut"] == pytest.approx(200 / 348, abs=0.01) and caption["unknown"] > 0
    kinds = {p["kind"]: (p["modality"], p["count"], " ".join(p["examples"])) for p in found["problems"]}
    assert {kind: entry[:2] for kind, entry in kinds.items()} == {
        "corrupt record": ("caption", 1),
        "missing": ("caption", 1),
        "unreadable file": ("caption", 2),
    }
    assert "part-0.jsonl: record 6: " in kinds["corrupt record"][2]
    assert "part-0.jsonl: record 8: no column caption or text" in kinds["missing"][2]
    assert "part-1.txt.gz: cannot be read to its end" in kinds["unreadable file"][2]
    assert "part-2.jsonl: there is no such file" in kinds["unreadable file"][2]


def test_some_records_stand_for_all(tmp_path, capsys):
    arguments = write_records(tmp_path)
    Path(f"{tmp_path}/part-0.jsonl").write_text("\n".join([*["sample"] * 3, *['{"text": "dog"}'] * 297]))
    status, (found,) = check([*arguments, "--max_samples", "60"], capsys)
    assert found["samples_read"] == 40 and 300 < found["epoch"]["samples"] <= 350, "20 of each file that is there"
    assert check([*arguments, "--max_samples", "60"], capsys) == (status, [found]), "always the same ones"


@pytest.mark.parametrize("missing", ["skip", "allow"])
def test_records_may_lack_something(tmp_path, capsys, missing):
    (tmp_path / "a.jsonl").write_text('{"caption": "dog"}\n{"caption": "dog", "report": "crop"}\n{"other": "dog"}\n')
    modalities = {"caption": {"max_tokens": 4}, "report": {"type": "seq", "max_tokens": 4}}
    arguments = config(
        tmp_path, f"{tmp_path}/a.jsonl", modalities=modalities, type="huggingface", use_wds=False, missing=missing
    )
    status, (found,) = check([*arguments, "--full"], capsys)
    assert status == 0 and found["samples_read"] == 3 and found["complete_keys"] == {"skip": 1, "allow": 2}[missing]
    assert {name: entry["missing"] for name, entry in found["modalities"].items()} == {"caption": 1, "report": 2}


def test_what_is_on_the_hub_is_said_to_be_unchecked(tmp_path, capsys):
    arguments = write_records(tmp_path, data_path="allenai/c4/en")
    assert main(arguments) == 0
    line = "train toy: not checked: allenai/c4/en is a data set on the hub; none of its records were read\n"
    assert capsys.readouterr().out == line
    status, (found,) = check(arguments, capsys)
    assert status == 0 and found["not_checked"] in line
    with pytest.raises(UserError, match="there is no .*none.jsonl"):
        main(write_records(tmp_path, data_path=f"{tmp_path}/none.jsonl"))


def test_problems_do_not_tell_signatures(tmp_path, monkeypatch):
    write_shards(tmp_path / "s", 1, 3)
    url = f"https://host/{tmp_path}/s/[rgb]/shard-00000.tar?token=do-not-tell"
    arguments = config(tmp_path, url)
    dataset = load_data_config(arguments[0], num_input_tokens=8, num_target_tokens=8).train["toy"]
    inspector = Inspector(dataset, text_tokenizer())
    member = Member(url, "json", 0, 9)
    monkeypatch.setattr(inspector, "_join", lambda _: ({"rgb@32": {"0": member}, "caption": {}}, []))
    report = inspector.inspect(DataSlice(url))
    (problem,) = report.problems.values()
    assert problem.examples[0].startswith("https://host/") and "do-not-tell" not in str(problem)


def test_worker_processes_load_the_plugin(tmp_path, monkeypatch):
    (tmp_path / "own_plugin_of_check.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr("fourm.tools.check._inspector", None, raising=False)
    _start_worker(lambda: sys.modules.pop("own_plugin_of_check").LOADED, "own_plugin_of_check")


def test_bad_options_are_one_line(tmp_path):
    with pytest.raises(UserError, match="'max_samples' must be at least 1"):
        main(["data.yaml", "--max_samples", "0"])
    with pytest.raises(UserError, match="there is no key before 'more'"):
        main(["data.yaml", "more"])
    arguments = config(tmp_path, write_folders(tmp_path / "f", 2), use_wds=False)
    with pytest.raises(UserError, match="the text vocabulary has 30000 ids, but vocab_size is 4608"):
        content = yaml.safe_load(Path(arguments[0]).read_text())
        content["modalities"]["caption"]["vocab_size"] = 4608
        Path(arguments[0]).write_text(yaml.safe_dump(content))
        main(arguments[:1])
