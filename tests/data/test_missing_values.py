"""Null, empty and absent values of files and records, from the data configuration to the batches."""

import copy
import json

import numpy as np
import pytest
import yaml

from fourm.data.data_config import load_data_config
from fourm.data.unified_datasets import build_eval_loader
from fourm.utils.errors import DataError
from tests.data.dataset_files import MODALITIES, jpeg, text_tokenizer, write_tar

TOKENIZER = text_tokenizer()
COUNT, GAP = 12, (3, 7)  # samples, and those without a caption
NULLS = {
    "null": None,
    "empty": "",
    "blank": " \n",
    "empty list": [],
    "list of null": [None, ""],
    "null in dict": {"caption": None, "url": "u"},
    "text": {"text": None},
    "absent": ...,
}


def caption(index, null):
    value = null if index in GAP else {"text": f"sample s{index}"} if index % 2 else f"sample s{index}"
    return None if value is ... else json.dumps(value).encode()


def write(root, source, null):
    """Pictures and captions, or records of captions and boxes; returns the options of the data set."""
    if source == "records":
        rows = [{"caption": null if i in GAP else f"sample s{i}", "det": {"instances": []}} for i in range(COUNT)]
        lines = [json.dumps({k: v for k, v in row.items() if v is not ...}) for row in rows]
        (root / "rows.jsonl").write_text("\n".join(lines))
        return {"in_domains": "caption-det", "out_domains": "caption-det", "type": "huggingface"} | {
            "data_path": f"{root}/rows.jsonl"
        }
    pictures = [(f"{i:03d}.jpg", jpeg(np.random.default_rng(i))) for i in range(COUNT)]
    captions = [(f"{i:03d}.json", content) for i in range(COUNT) if (content := caption(i, null)) is not None]
    domains = {"in_domains": "rgb@32-caption", "out_domains": "caption", "main_augment_domain": "rgb@32"}
    if source == "shards":
        write_tar(root / "rgb" / "0.tar", pictures)
        write_tar(root / "caption" / "0.tar", captions)
        return domains | {"data_path": f"{root}/[rgb,caption]/0.tar", "use_wds": True}
    for folder, files in (("rgb", pictures), ("caption", captions)):
        (root / folder / "a").mkdir(parents=True)
        for name, content in files:
            (root / folder / "a" / name).write_bytes(content)
    return domains | {"data_path": str(root), "use_wds": False}


def loader(tmp_path, options, **more):
    dataset = {"input_alphas": 1.0, "target_alphas": 1.0, "modality_name_map": {}} | options | more
    content = {"modalities": MODALITIES, "train": {"datasets": {"d": dataset}}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    config = load_data_config(tmp_path / "data.yaml", num_input_tokens=12, num_target_tokens=12).train["d"]
    return build_eval_loader(config, TOKENIZER, batch_size=5, num_workers=0, rank=0, world_size=1, seed=0)


def counted(batches):
    """Samples, how many of them have a caption, and how many were counted as bad."""
    batches = list(batches)
    masks = [b.mod_dict["caption"] for b in batches]
    captions = sum(int((~m["input_mask"].all(1) | ~m["target_mask"].all(1)).sum()) for m in masks)
    skipped = sum(sum(b.position["skipped"].values()) for b in batches)
    return sum(len(m["tensor"]) for m in masks), captions, skipped


@pytest.mark.parametrize("source", ["shards", "folders", "records"])
@pytest.mark.parametrize("null", NULLS)
def test_missing_decides_about_null_and_empty_values(tmp_path, source, null, caplog):
    options = write(tmp_path, source, NULLS[null])
    whole = COUNT - len(GAP)
    strict = {"max_bad_fraction": 0.0}
    assert counted(loader(tmp_path, options, missing="skip", **strict))[::2] == (whole, 0)
    samples, captions, skipped = counted(loader(tmp_path, options, missing="allow", **strict))
    assert samples == COUNT and skipped == 0 and captions <= whole
    assert not caplog.records
    samples, _, skipped = counted(loader(tmp_path, options, max_bad_fraction=0.5))
    # Files of folders are joined, and what they lack is warned about, before there is a batch.
    assert (samples, skipped) == (whole, 0 if (source, null) == ("folders", "absent") else len(GAP))
    with pytest.raises(DataError, match="of 12 samples cannot be"):
        counted(loader(tmp_path, options, **strict))


@pytest.mark.parametrize("source", ["shards", "folders"])
def test_what_nothing_of_can_be_used_is_not_bad_where_gaps_are_allowed(tmp_path, source, caplog):
    options = write(tmp_path, source, "x")
    stray = json.dumps({"instances": []}).encode()  # boxes without their picture
    if source == "shards":
        write_tar(tmp_path / "det" / "0.tar", [("stray.json", stray)])
        options["data_path"] = f"{tmp_path}/[rgb,caption,det]/0.tar"
    else:
        (tmp_path / "det" / "a").mkdir(parents=True)
        (tmp_path / "det" / "a" / "stray.json").write_bytes(stray)
    options["in_domains"] = "rgb@32-caption-det"
    assert counted(loader(tmp_path, options, missing="allow", max_bad_fraction=0.0))[::2] == (COUNT, 0)
    assert not caplog.records


def test_errors_keep_their_attributes_between_processes():
    error = copy.copy(DataError("file: key 'a': modality det: it is wrong", "det", "it is wrong"))
    assert (error.modality, error.detail) == ("det", "it is wrong")
    assert str(error) == "file: key 'a': modality det: it is wrong"
