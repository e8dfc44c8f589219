"""When a run continues, its data may have moved, but must not have changed."""

import json
import shutil

import pytest
import yaml

from fourm.data.data_config import load_data_config
from fourm.data.identity import identity_of
from fourm.train.options import saved_options
from fourm.train.same_run import check_same_run
from fourm.train.tasks.pretrain import PretrainConfig
from fourm.utils.errors import UserError
from tests.data.dataset_files import text_tokenizer

FIELDS = {"in_domains": "caption", "out_domains": "caption", "input_alphas": 1, "target_alphas": 1}


def identity(tmp_path, **fields):
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"train": {"datasets": {"a": FIELDS | fields}}}))
    data = load_data_config(tmp_path / "data.yaml", num_input_tokens=8, num_target_tokens=8)
    return json.loads(json.dumps(identity_of(data, text_tokenizer())))


def write(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"caption": "a dog"}) + "\n")


KINDS = {
    "shards": ({"use_wds": True, "data_path": "[caption]/a-{0..1}.tar"}, ["caption/a-0.tar", "caption/a-1.tar"]),
    "folders": ({"data_path": "."}, ["caption/0/1.json", "caption/1/1.json"]),
    "records": ({"type": "huggingface", "data_path": "a-*.jsonl"}, ["a-0.jsonl", "a-1.jsonl"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_data_may_move_but_not_change(tmp_path, kind):
    fields, names = KINDS[kind]
    write(tmp_path / "here", names)
    place = fields["data_path"]
    before = identity(tmp_path, **fields | {"data_path": f"{tmp_path}/here/{place}"})
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = fields | {"data_path": f"{tmp_path}/there/{place}"}
    config = PretrainConfig(epochs=1)
    saved = {"config": saved_options(config), "identity": before}
    check_same_run(config, saved, identity(tmp_path, **moved), tmp_path)

    write(tmp_path / "there" / "caption" / "2", ["1.json"])  # one more folder,
    write(tmp_path / "there", ["a-2.jsonl"])  # file of records,
    if kind == "shards":
        (tmp_path / "there" / names[0]).write_text("another")
    with pytest.raises(
        UserError, match=rf"\(then → now\): data set a: files 2 {kind if kind != 'records' else 'files'}"
    ):
        check_same_run(config, saved, identity(tmp_path, **moved), tmp_path)
    check_same_run(PretrainConfig(epochs=1, allow_changes=True), saved, identity(tmp_path, **moved), tmp_path)


@pytest.mark.parametrize("name", ["1.json", "deep/2.json"])
def test_a_file_of_a_folder_that_is_replaced_or_added_at_any_depth_is_noticed(tmp_path, name):
    write(tmp_path / "d", ["caption/0/1.json", "caption/0/deep/1.json"])
    before = identity(tmp_path, data_path=f"{tmp_path}/d")
    saved = {"config": saved_options(PretrainConfig(epochs=1)), "identity": before}
    (tmp_path / "d/caption/0/.DS_Store").write_text("clutter")
    check_same_run(PretrainConfig(epochs=1), saved, identity(tmp_path, data_path=f"{tmp_path}/d"), tmp_path)
    (tmp_path / "d/caption/0" / name).write_text('["another caption"]')
    with pytest.raises(UserError, match="data set a: files 2 folders with 2 files .* → 2 folders with [23] files"):
        check_same_run(PretrainConfig(epochs=1), saved, identity(tmp_path, data_path=f"{tmp_path}/d"), tmp_path)


def test_another_learning_rate_is_listed_old_and_new_and_a_longer_run_is_the_same(tmp_path):
    write(tmp_path / "d", ["caption/0/1.json"])
    same = identity(tmp_path, data_path=f"{tmp_path}/d")
    saved = {"config": saved_options(PretrainConfig(epochs=1, blr=1e-4)), "identity": same}
    longer = PretrainConfig(
        epochs=9, blr=1e-4, output_dir="elsewhere", num_workers=3, log_interval=1, max_skipped_steps=3
    )
    check_same_run(longer, saved, same, tmp_path)
    with pytest.raises(UserError, match="blr 0.0001 → 0.0002"):
        check_same_run(PretrainConfig(epochs=1, blr=2e-4), saved, same, tmp_path)
