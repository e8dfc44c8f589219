"""Models out of checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fourm.models import FM
from fourm.models.from_checkpoint import FORMAT, load_model
from fourm.train import export
from fourm.train.ema import EMA
from fourm.utils import checkpoints
from fourm.utils.errors import UserError
from tests.models.toy_models import SWIGLU, toy_config
from tests.train.checkpoint_files import write_checkpoint

CONFIG = toy_config(**SWIGLU, share_embedding=True)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return FM(CONFIG)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    ema = EMA(model, 0.9)
    for average in ema.average.values():
        average += 1
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints", 7, model, ema)


@pytest.mark.parametrize("at_once", [2**30, 2000])
def test_an_exported_model_is_the_saved_one(model, checkpoint, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(checkpoints, "_BATCH_BYTES", at_once)
    export.main([str(checkpoint.parents[1]), str(tmp_path / "exported")])
    model.save_pretrained(tmp_path / "saved")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("exported", "saved")]
    assert files[0].keys() == files[1].keys()  # tied matrices under both names
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("exported", "saved")]
    assert configs[0] == configs[1]
    state = FM.from_pretrained(str(tmp_path / "exported")).state_dict()
    loaded = load_model(checkpoint).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())


def test_the_moving_average_is_exported_on_demand(model, checkpoint, tmp_path):
    export.main([str(checkpoint), str(tmp_path), "--ema"])
    exported = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(exported["mask_token"], model.mask_token.detach() + 1)
    name = "decoder_embeddings.grid.to_logits.weight"
    torch.testing.assert_close(exported[name], model.state_dict()[name] + 1)
    assert torch.equal(exported["encoder.0.norm1.bias"], torch.zeros(32))  # a buffer is no average
    with pytest.raises(UserError, match="no moving average"):
        checkpoints.export_model(write_checkpoint(tmp_path / "without", 1, model), tmp_path, FORMAT, ema=True)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "checksums"])
def test_damage_is_found_and_named(model, tmp_path, damage):
    checkpoint = write_checkpoint(tmp_path / "checkpoints", 3, model)
    name = "checksums.json" if damage == "checksums" else next(checkpoint.glob("shard-*")).name
    content = bytearray((checkpoint / name).read_bytes())
    if damage == "missing":
        (checkpoint / name).unlink()
    elif damage == "truncated":
        (checkpoint / name).write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 4
        (checkpoint / name).write_bytes(content)
    with pytest.raises(UserError, match="step-00000003 is damaged" if damage == "checksums" else f"damaged.*{name}"):
        checkpoints.export_model(checkpoint, tmp_path / "out", FORMAT)
    with pytest.raises(UserError, match="no model .* and no complete checkpoint"):
        checkpoints.newest_checkpoint(tmp_path / "nowhere")


def test_the_newest_checkpoints_are_kept(model, tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, model, keep_last=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
