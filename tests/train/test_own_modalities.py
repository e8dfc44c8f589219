"""Modalities of one's own work as docs/modalities.md says, from files to a model and to a second one."""

import json
import logging
import os
import re
import subprocess

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from fourm.generation.decoding import decode
from fourm.generation.inputs import read_value
from fourm.models import FM, model_config
from fourm.models.from_checkpoint import FORMAT
from fourm.train.config import load_config
from fourm.train.finetune import load_weights
from fourm.train.tasks.pretrain import PretrainConfig
from fourm.utils.errors import UserError
from fourm.utils.plugin import load_plugin
from tests.data.dataset_files import npy, write_tar
from tests.train.toy_run import ROOT, log_lines, run_in_process, write_run
from tests.warm_python import warm_python

PAGE = (ROOT / "docs" / "modalities.md").read_text()
CODE = {code.split("\n")[0].removeprefix("# "): code for code in re.findall(r"^```\w+\n(.*?)^```", PAGE, re.M | re.S)}
TINY = {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2}


def write_shards(root):
    """Temperature, sound, audio codes and wind of 16 samples; the codes say how warm it is."""
    for shard in range(2):
        members = {name: [] for name in ("temperature", "sound@64", "audio", "wind")}
        for index in range(8 * shard, 8 * shard + 8):
            rng = np.random.default_rng(index)
            members["temperature"].append((f"{index}.json", json.dumps(-30 + 80 * (index % 2) + 0.5).encode()))
            members["sound@64"].append((f"{index}.npy", npy(rng.normal(-4, 2, (64, 64)).astype(np.float32))))
            members["audio"].append((f"{index}.npy", npy(np.full((4, 5), 7 + index % 2, np.int16))))
            members["wind"].append((f"{index}.raw", rng.normal(size=(2, 32, 32)).astype(np.float32).tobytes()))
        for name, files in members.items():
            write_tar(root / "my_shards" / name / f"shard-{shard:05d}.tar", files)


def main_config(root, **changes):
    main = yaml.safe_load(write_run(root / "toys").read_text()) | {"output_dir": "out", "model_kwargs": TINY}
    main |= {"data_config": "my_data.yaml", "num_workers": 0, "epochs": 1} | changes
    (root / "main.yaml").write_text(yaml.safe_dump(main))
    return root / "main.yaml"


def test_the_page_declares_modalities_that_train_and_come_back(tmp_path, monkeypatch):
    write_shards(tmp_path)
    (tmp_path / "my_data.yaml").write_text(CODE["my_data.yaml"])
    config = main_config(tmp_path, epoch_size=160, epochs=1, blr=0.3, warmup_epochs=0, eval_freq=0)
    monkeypatch.chdir(tmp_path)
    run_in_process(config)
    lines = [line for line in log_lines(tmp_path / "out") if "loss" in line]
    assert set().union(*(line["losses"] for line in lines)) == {"audio", "temperature"}
    model = FM.from_pretrained("out")
    assert set(model.encoder_embeddings) == {"audio", "sound@64", "temperature"}
    info = model.modality_info
    assert read_value(10.1, info["temperature"], {}, None).tolist() == [250]
    assert read_value(np.zeros((64, 64)), info["sound@64"], {}, None).shape == (1, 64, 64)
    assert read_value(np.full((4, 2), 7), info["audio"], {}, None)[:3].tolist() == [
        24 + 7,
        24 + 7 + 1024,
        24 + 7 + 2048,
    ]
    one = {"input_mask": torch.zeros(1, 1).bool(), "tensor": torch.tensor([[250]])}
    (sample,) = decode({"temperature": one}, model.modality_info)
    assert sample["temperature"].kind == "scalar" and sample["temperature"].value == pytest.approx(10.1)


def test_the_plugin_of_the_page_is_used_in_training(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_modalities.py").write_text(CODE["my_package/my_modalities.py"])
    data = yaml.safe_load(CODE["my_data.yaml"])
    data["train"]["datasets"]["mine"] |= {
        "in_domains": "temperature-wind",
        "out_domains": "temperature",
        "data_path": "my_shards/[temperature,wind]/shard-{00000..00001}.tar",
    }
    (tmp_path / "my_data.yaml").write_text(yaml.safe_dump(data))
    config = main_config(tmp_path, epoch_size=8, eval_freq=0, warmup_epochs=0, num_workers=1)
    command = [
        warm_python(),
        str(ROOT / "run_training_4m.py"),
        "--config",
        str(config),
        "--plugin",
        "my_package.my_modalities",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    script = """
import torch
from fourm.models import FM
from fourm.utils.plugin import load_plugin
load_plugin("my_package.my_modalities")
from fourm.generation.decoding import decode
model = FM.from_pretrained("out")
pixels = {"tensor": torch.full((1, 1, 32, 32), 0.5), "input_mask": torch.zeros(1, 4).bool()}
from fourm.generation.plotting import as_image
decoded = decode({"wind": pixels}, model.modality_info)[0]["wind"]
print(type(model.encoder_embeddings["wind"]).__name__, decoded.kind, as_image(decoded).shape)
"""
    for code, expected in ((script, ["WindEmbedding wind (32, 32, 3)"]), (script.replace("load_plugin(", "str("), [])):
        done = subprocess.run([warm_python(), "-c", code], cwd=tmp_path, env=_path(), capture_output=True, text=True)
        assert done.stdout.splitlines()[1:] == expected
        assert expected or "no encoder embedding 'WindEmbedding'" in done.stderr and "'plugin' must name" in done.stderr


def _path():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_plugin_that_is_not_there_is_named():
    with pytest.raises(UserError, match="'plugin': cannot import no_such.thing: .*working directory"):
        load_plugin("no_such.thing")
    load_plugin("")
    assert load_config(PretrainConfig, None, {"plugin": "a.b", "epochs": 1}).plugin == "a.b"


DECLARED = {
    "temperature": {"type": "scalar"},
    "tok_rgb@32": {"type": "img", "vocab_size": 16, "input_size": 32, "patch_size": 16},
    "codes": {"type": "seq_token", "vocab_size": 40, "vocab_offset": 20, "max_tokens": 8},
}


def model(*names, seed):
    torch.manual_seed(seed)
    return FM(
        model_config("fm_tiny_6e_6d_swiglu_nobias", names, names, modalities=DECLARED, share_embedding=True, **TINY)
    )


def test_training_goes_on_with_modalities_added_and_dropped(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fourm"), "propagate", True)
    old, new = model("tok_rgb@32", "codes", seed=0), model("tok_rgb@32", "temperature", seed=1)
    untouched = model("tok_rgb@32", "temperature", seed=1).state_dict()
    before = old.state_dict()
    save_file({k: v.clone() for k, v in before.items()}, str(tmp_path / "w.safetensors"))
    caplog.set_level("INFO", logger="fourm")
    load_weights(new, str(tmp_path / "w.safetensors"), FORMAT)
    for name, tensor in new.state_dict().items():
        expected = before if name in before else untouched
        assert torch.equal(tensor, expected[name]) and ("temperature" in name) == (name not in before)
    messages = [record.getMessage() for record in caplog.records]
    assert "finetune: new in the model: decoder_embeddings.temperature, encoder_embeddings.temperature" in messages
    assert "finetune: not in the model: decoder_embeddings.codes, encoder_embeddings.codes" in messages
