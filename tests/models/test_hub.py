"""Models on disk: round trips and the published layout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourm.models import FM, FMViT
from fourm.utils import load_safetensors
from fourm.utils.errors import UserError
from tests.models.toy_models import DECLARATIONS, SWIGLU, randomise_, toy_batch, toy_config, toy_model

RGB = DECLARATIONS | {"rgb@16": DECLARATIONS["pixels"]}


def rgb_config(**overrides):
    return toy_config(domains_in=["rgb@16", "grid"], domains_out=["grid"], modalities=RGB, **overrides)


def test_a_tied_model_is_written_in_the_published_untied_layout(tmp_path):
    model = toy_model(share_embedding=True, share_modality_embeddings=True, num_register_tokens=2, **SWIGLU).eval()
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == model.state_dict().keys()
    assert {"decoder_embeddings.text.to_logits.weight", "decoder_embeddings.text.token_emb.weight"} <= written.keys()
    assert {"decoder_embeddings.text.mod_emb", "encoder_embeddings.text.mod_emb"} <= written.keys()
    assert "share_embedding" not in json.loads((tmp_path / "config.json").read_text())

    loaded = FM.from_pretrained(tmp_path)
    embedding = loaded.decoder_embeddings["text"]
    assert embedding.to_logits.weight is not embedding.token_emb.weight
    batch = toy_batch(model)
    selection = model.select_tokens(batch, 10, 9)
    assert torch.equal(loaded(batch, 10, 9, selection=selection)[0], model(batch, 10, 9, selection=selection)[0])
    assert not loaded.training


def test_a_file_in_the_published_layout_loads_strictly(tmp_path):
    """Nothing but names, shapes and a config.json: what other code wrote."""
    config = toy_config(share_modality_embeddings=False, **SWIGLU)
    tensors = {name: torch.randn(tensor.shape) for name, tensor in FM(config).state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    torch.testing.assert_close(dict(FM.from_pretrained(tmp_path).state_dict()), tensors, rtol=0, atol=0)

    tied = FM(config | {"share_embedding": True})
    tied.load_state_dict(tensors)
    name = "decoder_embeddings.text.to_logits.weight"
    assert torch.equal(tied.state_dict()[name], tensors[name])

    for change in (lambda t: t.pop("mask_token"), lambda t: t.update(extra=torch.ones(1))):
        broken = dict(tensors)
        change(broken)
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="does not hold the weights of its config.json: .*(mask_token|extra)"):
            FM.from_pretrained(tmp_path)


def test_a_vit_takes_its_part_of_a_full_checkpoint(tmp_path):
    model = FM(rgb_config(num_register_tokens=2))
    randomise_(model)
    model.save_pretrained(tmp_path)
    head = torch.nn.Linear(32, 5)
    weights = head.weight.clone()
    vit = FMViT.from_pretrained(tmp_path, output_head=head)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(vit.output_head.weight, weights)
    assert vit(pixels).shape == (2, 16, 5)

    batch = {"rgb@16": {"tensor": pixels, "input_mask": torch.zeros(2, 16, dtype=torch.bool)}}
    batch["rgb@16"] |= {
        "target_mask": ~batch["rgb@16"]["input_mask"],
        "decoder_attention_mask": torch.zeros(2, 16).int(),
    }
    x, emb, padding = model.embed_encoder(batch, model.select_tokens(batch, 16, 1).encoder)
    expected = head(model.encode(x + emb, padding)[:, 2:])
    torch.testing.assert_close(vit(pixels), expected)

    vit.save_pretrained(tmp_path / "vit")
    again = FMViT.from_pretrained(tmp_path / "vit", output_head=torch.nn.Linear(32, 5))
    assert torch.equal(again.encoder_norm.weight, model.encoder_norm.weight)


def test_a_vit_needs_pixels():
    with pytest.raises(UserError, match="rgb@"):
        FMViT(toy_config(domains_in=["grid"]))


def test_saving_leaves_the_callers_config_alone(tmp_path):
    config = toy_config(share_embedding=True)
    FM(config).save_pretrained(tmp_path)
    assert config == toy_config(share_embedding=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = toy_model()
    model.encoder[1].mlp.fc1.weight.data[3, 2] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"model.safetensors: encoder.1.mlp.fc1.weight holds values that are not finite"
    ):
        FM.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "config", ["{", "[" * 100_000, "[1]", '{"dim": "wide"}', "null", '{"domains_in": 3, "domains_out": 4}']
)
def test_a_malformed_configuration_is_one_sentence(tmp_path, config):
    toy_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=str(tmp_path)):
        FM.from_pretrained(str(tmp_path))


def test_weights_that_are_cut_off_or_missing_are_one_sentence(tmp_path):
    toy_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="no model could be loaded"):
        FM.from_pretrained(str(tmp_path))


def test_a_file_with_its_configuration_in_the_header(tmp_path):
    model = toy_model()
    metadata = {key: str(value) for key, value in model.config.items()} | {"format": "pt", "comment": "made elsewhere"}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # some share memory
    save_file(weights, tmp_path / "toy.safetensors", metadata)
    state_dict, config = load_safetensors(str(tmp_path / "toy.safetensors"))
    assert config == model.config | {"comment": "made elsewhere"} and state_dict.keys() == model.state_dict().keys()
    assert load_safetensors(tmp_path / "toy.safetensors", return_config=False).keys() == state_dict.keys()
    torch.testing.assert_close(
        dict(FM.from_pretrained(str(tmp_path / "toy.safetensors")).state_dict()), dict(model.state_dict())
    )
    save_file(weights, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="bare.safetensors: model config: the key 'domains_in' is required"):
        FM.from_pretrained(tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="nothing.safetensors does not exist"):
        FM.from_pretrained(tmp_path / "nothing.safetensors")


def test_unknown_keys_are_tolerated_in_the_files_of_others(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_model().save_pretrained("EPFL-VILAB/4M-7_B")
    config = Path("EPFL-VILAB/4M-7_B/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cls_token": False, "emb_drop": 0.0}))
    FM.from_pretrained("EPFL-VILAB/4M-7_B")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "EPFL-VILAB/4M-7_B" in warnings[0] and "cls_token, emb_drop" in warnings[0]
    Path("EPFL-VILAB/4M-7_B/config.yaml").write_text("epochs: 3\n")  # a run of ours
    with pytest.raises(UserError, match="unknown key 'cls_token'"):
        FM.from_pretrained("EPFL-VILAB/4M-7_B")
    with pytest.raises(UserError, match="unknown key 'emb_drop'"):
        FM(config=toy_config(emb_drop=0.0))
