"""Checkpoints in an S3 store."""

import json
import shutil

import pytest
import torch

from fourm.generation import Sampler
from fourm.models import FM
from fourm.models.from_checkpoint import load_model
from fourm.train import export
from fourm.utils.errors import UserError
from fourm.utils.model_store import complete_checkpoints, copy_checkpoint, find_checkpoint, find_model, local_copy
from fourm.utils.s3 import S3Store
from fourm.utils.transfer import DamagedObject, Retries
from tests.data.object_store import BUCKET, RETRIES, ObjectStore, client, faulty
from tests.models.toy_models import SWIGLU, toy_config
from tests.train.checkpoint_files import write_checkpoint

CONFIG = toy_config(**SWIGLU, share_embedding=True)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "toy-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "toy-secret")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return FM(CONFIG)


@pytest.fixture(scope="module")
def checkpoints(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    return [write_checkpoint(folder, step, model) for step in range(1, 6)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "toy-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "toy-secret")
        server = ObjectStore(tmp_path_factory.mktemp("nothing"))
    yield server
    server.kill()


@pytest.fixture
def run(request):
    return f"s3://{BUCKET}/{request.node.name}"


def steps(run: str, store: S3Store) -> list[int]:
    return [int(url[-8:]) for url in complete_checkpoints(run, store)]


def test_checksums_are_uploaded_last_and_removed_first(checkpoints, server, run):
    asked = []

    def listen(method, path, before):
        if method in ("PUT", "DELETE"):
            asked.append((method, *path.split("?")[0].split("/")[-2:]))

    with faulty(server, listen) as proxy:
        store = S3Store(proxy.endpoint)
        for checkpoint in (*checkpoints[:3], checkpoints[2]):
            copy_checkpoint(checkpoint, run, store, keep_last=2)
        assert steps(run, store) == [3, 2]
        assert {name.split("/")[0] for name in store.names(f"{run}/checkpoints")} == {"step-00000002", "step-00000003"}
    for method, end in (("PUT", -1), ("DELETE", 0)):
        for step in ("step-00000001", "step-00000003"):
            files = [file for m, folder, file in asked if (m, folder) == (method, step)]
            assert files[end] == "checksums.json" and (len(files) > 3) == (method == "PUT" or step == "step-00000001")
    copy_checkpoint(checkpoints[3], run, store := S3Store(server.endpoint), keep_last=0)
    assert steps(run, store) == [4, 3, 2]


def test_an_interrupted_upload_is_not_listed_and_removes_nothing(checkpoints, server, run):
    store = S3Store(server.endpoint, retries=RETRIES)
    copy_checkpoint(checkpoints[0], run, store, keep_last=1)
    denied = lambda method, path, _: "403 AccessDenied" if method == "PUT" and path.endswith("state.json") else None  # noqa: E731
    with faulty(server, denied) as proxy, pytest.raises(UserError, match="state.json: access denied"):
        copy_checkpoint(checkpoints[1], run, S3Store(proxy.endpoint), keep_last=1)
    assert any(name.startswith("step-00000002/shard") for name in store.names(f"{run}/checkpoints"))
    assert steps(run, store) == [1] and find_checkpoint(run, store).endswith("step-00000001")
    copy_checkpoint(checkpoints[2], run, store, keep_last=1)
    assert {name.split("/")[0] for name in store.names(f"{run}/checkpoints")} == {"step-00000003"}


def test_checkpoints_are_uploaded_even_without_permission_to_delete(checkpoints, server, run):
    with faulty(server, lambda method, *_: "403 AccessDenied" if method == "DELETE" else None) as proxy:
        store = S3Store(proxy.endpoint)
        copy_checkpoint(checkpoints[0], run, store, keep_last=0)
        with pytest.raises(UserError, match="access denied"):
            copy_checkpoint(checkpoints[1], run, store, keep_last=1)
        assert steps(run, store) == [2, 1]


def test_uploading_a_checkpoint_again_removes_none_of_the_newer_ones(checkpoints, server, run):
    store = S3Store(server.endpoint)
    for index in (0, 3, 4, 1, 2):  # 4 and 5 were damaged, and the run goes on from 1
        copy_checkpoint(checkpoints[index], run, store, keep_last=2)
    assert steps(run, store) == [5, 4, 3, 2]


def test_a_model_from_the_store(model, checkpoints, server, run, tmp_path, monkeypatch):
    store = S3Store(server.endpoint)
    copy_checkpoint(checkpoints[0], run, store, keep_last=0)
    copy_checkpoint(checkpoints[1], run, store, keep_last=0)
    copy = local_copy(find_model(run + "/", store), store)
    assert copy.name.endswith("-step-00000002")
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
        file.name: file.read_bytes() for file in checkpoints[1].iterdir()
    }
    loaded = load_model(copy).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    assert Sampler.load(run, device="cpu").targets.keys() == model.decoder_embeddings.keys()
    export.main([run, str(tmp_path / "exported")])
    assert FM.from_pretrained(str(tmp_path / "exported")).state_dict().keys() == loaded.keys()
    model.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "model.safetensors"):  # as at the end of a run
        store.upload(tmp_path / "saved" / name, f"{run}/{name}")
    assert (local_copy(find_model(run, store), store) / "model.safetensors").is_file()
    assert Sampler.load(run, device="cpu").targets.keys() == model.decoder_embeddings.keys()
    file = find_model(f"{run}/model.safetensors", store)
    assert local_copy(file, store).read_bytes() == (tmp_path / "saved" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="nothing is neither a complete checkpoint nor a run with checkpoints"):
        find_model(f"{run}/nothing", store)


def test_the_endpoint_of_the_environment_may_change(server, run, monkeypatch):
    store = S3Store(retries=Retries(attempts=1))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(UserError, match=r"no complete answer from http://127\.0\.0\.1:9 "):
        store.names(run)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    assert store.names(run) == set()


def test_a_partial_copy_of_a_killed_process_is_removed(checkpoints, server, run):
    store = S3Store(server.endpoint)
    copy_checkpoint(checkpoints[0], run, store, keep_last=0)
    copy = local_copy(find_model(run, store), store)
    left, other = (copy.with_name(name) for name in (f".tmp-1-{copy.name}", ".tmp-1-other-step-00000001"))
    copy.rename(left)
    other.mkdir()  # a download in progress in another process
    assert local_copy(find_model(run, store), store) == copy
    assert copy.is_dir() and other.is_dir() and not left.exists()


@pytest.mark.parametrize("what", ["flipped", "truncated", "missing", "link", "file"])
def test_a_cached_copy_that_was_damaged_is_downloaded_again(checkpoints, server, run, tmp_path, what, caplog):
    store = S3Store(server.endpoint)
    copy_checkpoint(checkpoints[0], run, store, keep_last=0)
    copy = local_copy(find_model(run, store), store)
    shard = next(copy.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    other = tmp_path / "of the user"
    other.write_bytes(content)
    if what == "file":
        shutil.rmtree(copy)
        copy.write_text("no folder")
    else:
        shard.unlink()
    if what == "link":
        shard.symlink_to(other)
    elif what in ("flipped", "truncated"):
        shard.write_bytes(content if what == "flipped" else content[:-1])
    assert local_copy(find_model(run, store), store) == copy
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
        file.name: file.read_bytes() for file in checkpoints[0].iterdir()
    }
    assert not any(file.is_symlink() for file in copy.iterdir()) and other.read_bytes() == content
    assert "this copy of" in caplog.text and "is damaged and will be downloaded again" in caplog.text


@pytest.mark.parametrize("what", ["flipped", "truncated", "missing", "list", "elsewhere"])
def test_damaged_checkpoints_are_detected_and_leave_no_files(checkpoints, server, run, tmp_path, what):
    store = S3Store(server.endpoint, retries=RETRIES)
    copy_checkpoint(checkpoints[0], run, store, keep_last=0)
    url = find_checkpoint(run, store)
    name = next(file.name for file in checkpoints[0].glob("shard-*"))
    content = bytearray((checkpoints[0] / name).read_bytes())
    content[-1] ^= 1
    sums = json.loads((checkpoints[0] / "checksums.json").read_text())
    if what == "missing":
        store.remove(f"{url}/{name}")
    changed = {
        "flipped": (name, content),
        "truncated": (name, content[:-1]),
        "list": ("checksums.json", b"[1]"),
        "elsewhere": ("checksums.json", json.dumps(sums | {"../../stranger": [1, 1]}).encode()),
    }
    if what in changed:
        name, body = changed[what]
        key = f"{url}/{name}".removeprefix(f"s3://{BUCKET}/")
        client(server.endpoint).put_object(Bucket=BUCKET, Key=key, Body=bytes(body))
    with pytest.raises(DamagedObject, match=name):
        local_copy(url, store)
    assert not [path for path in (tmp_path / "cache" / "fourm" / "models").glob("*") if path.is_dir()]
