"""A run whose shards are in an S3 store and whose checkpoints go there."""

import pytest
import yaml

from fourm.utils.errors import UserError
from tests.data.object_store import BUCKET, ObjectStore, client, faulty
from tests.train.toy_run import losses, run_here, write_run


@pytest.mark.slow
def test_it_has_the_losses_of_the_local_one_and_its_results_are_in_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "toy-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "toy-secret")
    config = write_run(tmp_path / "toys", epochs=1, warmup_epochs=0, eval_freq=0)
    run_here(config)
    data = tmp_path / "toys" / "data.yaml"
    content = yaml.safe_load(data.read_text())
    toys = content["train"]["datasets"]["toys"]
    root = tmp_path / "toys" / "train"
    toys["data_path"] = toys["data_path"].replace(str(root), f"s3://{BUCKET}")
    data.write_text(yaml.safe_dump(content))
    store = ObjectStore(root)
    try:
        again = tmp_path / "again"
        remote = ["--output_dir", again, "--run_name", "name", "--s3_endpoint", store.endpoint]
        remote += ["--data_cache_dir", tmp_path / "cache", "--s3_save_dir", f"s3://{BUCKET}/results/"]
        with pytest.raises(
            UserError, match="s3://nowhere: there is no such bucket|s3://nowhere/name/config.yaml: there is no"
        ):
            run_here(config, *remote[:-1], "s3://nowhere")
        assert not list(again.glob("checkpoints/*")), "found out before the training"
        run_here(config, *remote)
        assert losses(again) == losses(tmp_path / "toys" / "out")
        stored = client(store.endpoint).list_objects_v2(Bucket=BUCKET, Prefix="results/")["Contents"]
        sizes = {item["Key"].removeprefix("results/name/"): item["Size"] for item in stored}
        expected = ["config.yaml", "config.json", "model.safetensors"]
        expected += [path.relative_to(again).as_posix() for path in again.glob("checkpoints/step-*/*")]
        assert len(expected) > 5 and sizes == {name: (again / name).stat().st_size for name in expected}
        full = lambda method, path, _: "403 AccessDenied" if method == "PUT" and "checkpoints" in path else None  # noqa: E731
        with faulty(store, full) as proxy:
            remote[1], remote[5] = tmp_path / "third", proxy.endpoint
            output = run_here(config, *remote)
        assert "the checkpoint is not copied" in output and losses(tmp_path / "third") == losses(again)
    finally:
        store.kill()
