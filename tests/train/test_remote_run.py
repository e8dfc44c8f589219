"""A run that reads its shards from an S3 store, copies its checkpoints there, and continues on another machine."""

import re
import shutil
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fourm.train.config import parse_args
from fourm.train.run_copy import RunCopy
from fourm.train.tasks.pretrain import PretrainConfig
from fourm.utils.errors import UserError
from fourm.utils.model_store import copy_checkpoint
from fourm.utils.s3 import S3Store
from tests.data.object_store import BUCKET, ObjectStore, client, faulty
from tests.train.toy_run import (
    kill,
    log_lines,
    losses,
    newest_step,
    run,
    run_in_process,
    run_ranks,
    start_ranks,
    write_run,
)

KEYS = {"AWS_ACCESS_KEY_ID": "toy-key", "AWS_SECRET_ACCESS_KEY": "toy-secret"}
RUNS = f"s3://{BUCKET}/runs"
OPTIONS = {"epoch_size": 80, "warmup_epochs": 0, "fixed_eval": False, "model_ema": True}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run folder of 20 steps of two processes under FSDP, with evaluations after 10 and 20."""
    config = write_run(tmp_path_factory.mktemp("whole") / "toys", **OPTIONS)
    run_ranks(config)
    return config.parent / "out"


@pytest.fixture(scope="module")
def store(undisturbed):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        store = ObjectStore(undisturbed.parent / "train")
    yield store
    store.kill()


def facts(folder) -> list[dict]:
    """Return the lines of the log without the times."""
    kept = ("step", "epoch", "loss", "losses", "grad_norm", "lr", "targets", "skipped_steps", "bad_samples", "eval")
    return [{key: line[key] for key in kept if key in line} for line in log_lines(folder)]


def assert_same_end(one, other) -> None:
    assert facts(one) == facts(other) and any("eval" in line for line in facts(one))
    for file in ("model.safetensors", "ema/model.safetensors"):
        weights = [load_file(folder / file) for folder in (one, other)]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def stored(store, run_name: str) -> dict[str, int]:
    pages = client(store.endpoint).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"runs/{run_name}/")
    return {
        item["Key"].removeprefix(f"runs/{run_name}/"): item["Size"] for p in pages for item in p.get("Contents", ())
    }


def complete(store, run_name: str) -> list[str]:
    return [name.split("/")[1] for name in sorted(stored(store, run_name)) if name.endswith("/checksums.json")]


@pytest.mark.slow
def test_it_has_the_losses_of_the_local_one_and_its_results_are_in_the_store(store, tmp_path):
    config = write_run(tmp_path / "toys", epochs=1, warmup_epochs=0, eval_freq=0, num_workers=1)
    run_in_process(config)
    data = tmp_path / "toys" / "data.yaml"
    content = yaml.safe_load(data.read_text())
    toys = content["train"]["datasets"]["toys"]
    toys["data_path"] = toys["data_path"].replace(str(tmp_path / "toys" / "train"), f"s3://{BUCKET}")
    data.write_text(yaml.safe_dump(content))
    again = tmp_path / "again"
    remote = ["--output_dir", again, "--run_name", "name", "--s3_endpoint", store.endpoint, "--s3_save_dir", RUNS + "/"]
    run_in_process(config, *remote, "--data_cache_dir", tmp_path / "cache")
    assert losses(again) == losses(tmp_path / "toys" / "out")
    expected = ["config.yaml", "config.json", "model.safetensors", "log.jsonl"]
    expected += [path.relative_to(again).as_posix() for path in again.glob("checkpoints/step-*/*")]
    assert len(expected) > 6 and stored(store, "name") == {name: (again / name).stat().st_size for name in expected}
    full = lambda method, path, _: "403 AccessDenied" if method == "PUT" and "checkpoints" in path else None  # noqa: E731
    with faulty(store, full) as proxy:
        remote[1], remote[3], remote[5] = tmp_path / "third", "third", proxy.endpoint
        output = run_in_process(config, *remote)
    assert "the copy of step-00000012 in the store, or the removal of old ones, is not complete" in output
    assert losses(tmp_path / "third") == losses(again) and not complete(store, "third")


def test_a_slow_store_holds_up_no_checkpoint_and_none_is_removed_while_it_is_copied(store, tmp_path):
    config = write_run(
        tmp_path / "toys",
        epochs=1,
        warmup_epochs=0,
        eval_freq=0,
        num_workers=0,
        save_every_minutes=1e-9,
        keep_last=1,
        run_name="slow",
        s3_save_dir=RUNS,
    )
    out = config.parent / "out"
    first = out / "checkpoints" / "step-00000001"
    waits = []

    def wait_for_later_checkpoints(method, path, _):
        if method == "PUT" and first.name in path and not waits:
            files = sorted(path.name for path in first.iterdir())
            deadline = time.monotonic() + 30
            while newest_step(out) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            waits.append((newest_step(out) >= 4, sorted(path.name for path in first.iterdir()) == files))

    with faulty(store, wait_for_later_checkpoints) as proxy:
        run_in_process(config, "--s3_endpoint", proxy.endpoint)
        assert waits and all(wait == (True, True) for wait in waits)
        assert any(method == "PUT" and first.name in path for method, path in proxy.counts), "the first one is copied"
    assert complete(store, "slow") == ["step-00000012"]
    assert not first.exists(), "it is removed once it has been copied"


@pytest.mark.dist
def test_another_machine_continues_where_the_first_was_lost(undisturbed, store, tmp_path):
    options = OPTIONS | {"run_name": "lost", "s3_save_dir": RUNS, "s3_endpoint": store.endpoint}
    config = write_run(tmp_path / "toys", **options)
    out = config.parent / "out"
    ranks = start_ranks(config, "--save_every_minutes", 1e-9, **KEYS)
    deadline = time.monotonic() + 120
    while len(complete(store, "lost")) < 2 or complete(store, "lost")[-1] < "step-00000006":
        assert all(rank.is_alive() for rank in ranks) and time.monotonic() < deadline
        time.sleep(0.01)
    kill(ranks)
    assert newest_step(out) < 20
    shutil.rmtree(out)
    newest = complete(store, "lost")[-1]
    with faulty(store) as proxy:
        run_ranks(config, "--s3_endpoint", proxy.endpoint, **KEYS)
        fetched = {path: n for (method, path), n in proxy.counts.items() if method == "GET" and "shard" in path}
        assert set(fetched.values()) == {1} and all(newest in path for path in fetched)
    log = (out / "log.txt").read_text()
    assert f"fetched {RUNS}/lost/checkpoints/{newest}" in log and f"resumed from {out}/checkpoints/{newest}" in log
    assert_same_end(out, undisturbed)
    assert complete(store, "lost") == sorted(path.name for path in out.glob("checkpoints/step-*"))
    assert {name.split("/")[1] for name in stored(store, "lost") if "step" in name} == {*complete(store, "lost")}
    bucket, last = S3Store(store.endpoint), "checkpoints/step-00000020"
    bucket.remove(f"{RUNS}/lost/{last}/checksums.json")
    run_ranks(config, **KEYS)
    assert (out / "log.txt").read_text().count("fetched ") == 1, "the local checkpoint is newer"
    assert complete(store, "lost")[-1] == "step-00000020", "a copy that was cut off is made again"
    (out / last).rename(out / "gone")  # the local one is older
    run_ranks(config, **KEYS)
    assert (out / "log.txt").read_text().count("fetched ") == 2
    assert_same_end(out, undisturbed)
    run_ranks(config, "--no_auto_resume", "--output_dir", tmp_path / "new", status=2, **KEYS)
    assert not list((tmp_path / "new").glob("*/*"))


@pytest.mark.dist
def test_a_checkpoint_that_is_incomplete_or_damaged_is_not_used(undisturbed, store, tmp_path):
    checkpoints, copy_url = undisturbed / "checkpoints", f"{RUNS}/cut"
    copy_checkpoint(checkpoints / "step-00000010", copy_url, S3Store(store.endpoint), keep_last=0)
    S3Store(store.endpoint).upload(undisturbed / "log.jsonl", f"{copy_url}/log.jsonl")
    shutil.copytree(checkpoints / "step-00000010", tmp_path / "step-00000015")
    next((tmp_path / "step-00000015").glob("shard-*")).write_bytes(b"")
    copy_checkpoint(tmp_path / "step-00000015", copy_url, S3Store(store.endpoint), keep_last=0)
    cut = lambda method, path, _: "403 AccessDenied" if method == "PUT" and path.endswith("20/state.json") else None  # noqa: E731
    with faulty(store, cut) as proxy, pytest.raises(UserError, match="access denied"):
        copy_checkpoint(checkpoints / "step-00000020", copy_url, S3Store(proxy.endpoint), keep_last=0)
    assert any(name.startswith("checkpoints/step-00000020/shard") for name in stored(store, "cut"))
    config = write_run(tmp_path / "toys", **OPTIONS, run_name="cut", s3_save_dir=RUNS, s3_endpoint=store.endpoint)
    S3Store(store.endpoint).upload(config, f"{copy_url}/config.yaml")
    another = parse_args(PretrainConfig, ["--config", str(config), "--output_dir", str(tmp_path / "another")])
    with pytest.raises(
        UserError, match=f"runs/cut is the copy of the run in {config.parent}/out: choose another run_name"
    ):
        RunCopy(another, keep_last=0).fetch([f"{copy_url}/checkpoints/step-00000010"])
    assert not (tmp_path / "another").exists()
    run_ranks(config, **KEYS)
    log = (config.parent / "out" / "log.txt").read_text()
    assert re.search(r"step-00000015/shard\S* has 0 bytes, not \d+; trying the checkpoint before it", log)
    assert "resumed from" in log and "checkpoints/step-00000010" in log
    assert_same_end(config.parent / "out", undisturbed)


@pytest.mark.dist
def test_resume_and_finetune_name_what_is_in_a_store(undisturbed, store, tmp_path):
    for name in ("step-00000010", "step-00000020"):
        copy_checkpoint(undisturbed / "checkpoints" / name, f"{RUNS}/whole", S3Store(store.endpoint), keep_last=0)
    config = write_run(tmp_path / "toys", **OPTIONS, s3_endpoint=store.endpoint)
    with faulty(store) as proxy:
        remote = ["--s3_endpoint", proxy.endpoint, "--resume", f"{RUNS}/whole/checkpoints/step-00000010/"]
        run_ranks(config, *remote, XDG_CACHE_HOME=str(tmp_path / "cache"), **KEYS)
        fetched = {path: n for (method, path), n in proxy.counts.items() if method == "GET" and "shard" in path}
        assert fetched and set(fetched.values()) == {1}, "one process fetches, the other waits"
    expected = [line for line in facts(undisturbed) if line["step"] > 10 or "eval" in line and line["step"] == 10]
    assert facts(config.parent / "out") == expected
    evaluated = {}
    for name, weights in (("local", undisturbed / "checkpoints" / "step-00000020"), ("remote", f"{RUNS}/whole")):
        run_in_process(config, "--finetune", weights, "--eval", "--no_model_ema", "--output_dir", tmp_path / name)
        evaluated[name] = [
            line["eval"] for line in map(yaml.safe_load, (tmp_path / name / "eval.jsonl").read_text().splitlines())
        ]
    assert evaluated["remote"] == evaluated["local"]


@pytest.mark.parametrize(
    ("key", "place", "message"),
    [
        ("resume", f"{RUNS}/none", f"{RUNS}/none is neither a complete checkpoint nor a run with checkpoints"),
        ("finetune", f"{RUNS}/none", f"{RUNS}/none is neither a complete checkpoint nor a run with checkpoints"),
        *(
            (key, "s3://nowhere", "s3://nowhere.*: there is no such bucket")
            for key in ("resume", "finetune", "s3_save_dir")
        ),
    ],
)
def test_a_missing_place_in_the_store_is_one_sentence(store, tmp_path, key, place, message):
    config = write_run(tmp_path / "toys", **OPTIONS, s3_endpoint=store.endpoint)
    with pytest.raises(UserError, match=message):
        run_in_process(config, f"--{key}", place)
    assert not list((tmp_path / "toys" / "out").glob("checkpoints/*")), "the error comes before the training"


def test_without_credentials_it_ends_with_one_sentence_and_status_2(store, tmp_path):
    config = write_run(tmp_path / "toys", **OPTIONS, s3_save_dir=RUNS)
    with faulty(store, lambda *_: "403 AccessDenied") as proxy:
        nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
        output = run(config, "--s3_endpoint", proxy.endpoint, status=2, **nobody)
    errors = [line for line in output.splitlines() if "rror" in line]
    assert len(errors) == 1 and "access denied (403 AccessDenied); check the credentials" in errors[0], output
