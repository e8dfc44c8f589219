"""Commands that look at data take the keys of training, with the same meaning, those of remote data too."""

import json
from pathlib import Path

import pytest
import yaml

from fourm.data.options import DataOptions
from fourm.data.shard_cache import RemoteOptions
from fourm.tools.check import CheckOptions
from fourm.tools.check import main as check
from fourm.tools.preview.command import PreviewOptions
from fourm.tools.preview.command import main as preview
from fourm.train.config import load_config
from fourm.train.tasks.pretrain import PretrainConfig
from fourm.utils.errors import UserError
from tests.data.dataset_files import MODALITIES, text_tokenizer, write_shards
from tests.data.object_store import BUCKET, ObjectStore, faulty


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "toy-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "toy-secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def remote(tmp_path):
    """A proxy of a store with shards, and the arguments of a command that reads them."""
    local = write_shards(tmp_path / "s", 2, 4)
    names = "-".join(MODALITIES)
    toy = {
        "in_domains": names,
        "out_domains": names.removeprefix("rgb@32-"),
        "input_alphas": 1.0,
        "target_alphas": 1.0,
        "data_path": f"s3://{BUCKET}/[{local.partition('[')[2]}",
        "use_wds": True,
    }
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({"modalities": MODALITIES, "train": {"datasets": {"toy": toy}}}, sort_keys=False)
    )
    text_tokenizer().save(f"{tmp_path}/words.json")
    store = ObjectStore(tmp_path / "s")
    with faulty(store) as proxy:
        yield proxy, [f"{tmp_path}/data.yaml", "--text_tokenizer_path", f"{tmp_path}/words.json"]
    store.kill()


def test_names_and_defaults_are_those_of_training():
    assert all(issubclass(options, DataOptions) for options in (CheckOptions, PreviewOptions, PretrainConfig))
    keys = {"s3_endpoint": "http://a", "s3_data_endpoint": "https://b", "data_cache_dir": "c", "data_cache_gb": 1.5}
    keys |= {"s3_multipart_chunksize_mb": 2, "s3_multipart_threshold_mb": 3, "s3_max_io_queue": 4}
    expected = RemoteOptions("https://b", "c", 1_500_000_000, 2 * 2**20, 3 * 2**20, 4)
    for options in (CheckOptions, PreviewOptions):
        assert options(data_config="x", **keys).remote() == expected
    assert load_config(PretrainConfig, None, {**keys, "epochs": 1}).remote() == expected


def test_the_check_reads_a_store_through_the_cache_of_the_run(remote, tmp_path, capsys):
    proxy, arguments = remote
    cache = tmp_path / "cache"
    arguments += ["--num_workers", "0", "--json", "--data_cache_dir", str(cache), "--s3_data_endpoint", proxy.endpoint]
    for _ in range(2):
        assert check(arguments) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert found["samples_read"] == found["complete_keys"] == 8 and not found["problems"]
        fetched = sum(count for (method, _), count in proxy.counts.items() if method == "GET")
        assert fetched == 10 == len(list(cache.glob("*.tar"))), "each tar once, and what is there is used"
    assert not (Path.home() / ".cache").exists()


def test_the_preview_reads_a_store(remote, tmp_path):
    proxy, arguments = remote
    arguments += ["--data_cache_dir", f"{tmp_path}/cache", "--s3_endpoint", proxy.endpoint, "--draws", "5"]
    assert preview([*arguments, "--out", f"{tmp_path}/page.html"]) == 0
    with pytest.raises(UserError, match="more than data_cache_gb=1e-06"):
        preview(
            [
                *arguments,
                "--out",
                f"{tmp_path}/page.html",
                "--data_cache_gb",
                "1e-6",
                "--data_cache_dir",
                f"{tmp_path}/c",
            ]
        )
    page = Path(f"{tmp_path}/page.html").read_text()
    assert page.count('<section class="card">') == 3 and list((tmp_path / "cache").glob("*.tar"))


@pytest.mark.parametrize("command", [check, preview])
def test_what_cannot_work_is_one_line(command):
    for options, message in (
        (["--data_cache_gb", "0"], "'data_cache_gb' must be above 0"),
        (["--s3_max_io_queue", "0"], "'s3_max_io_queue' must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            command(["data.yaml", *options])


def test_an_endpoint_is_judged_once_something_in_a_store_is_read(remote, tmp_path):
    _, arguments = remote
    arguments += ["--s3_data_endpoint", "store:9000", "--num_workers", "0"]
    with pytest.raises(UserError, match="'s3_data_endpoint' must be a URL such as https://HOST, not 'store:9000'"):
        check(arguments)
    local = yaml.safe_load((tmp_path / "data.yaml").read_text())
    path = local["train"]["datasets"]["toy"]["data_path"].removeprefix(f"s3://{BUCKET}")
    local["train"]["datasets"]["toy"]["data_path"] = f"{tmp_path}/s{path}"
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(local))
    assert check(arguments) == 0  # a placeholder is in the way of nothing
