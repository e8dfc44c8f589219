"""Learned tokenizers on disk and on the hub."""

import argparse
import json
import os
import pickle
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fourm.utils.errors import UserError
from fourm.vq import get_image_tokenizer, load_tokenizer
from fourm.vq.save_tokens import SaveTokensOptions, save_tokens
from fourm.vq.vqvae import VQ, VQVAE
from tests.vq.image_files import read_files, write_files
from tests.vq.test_vqvae import FEATURES, TOY, VECTORS, toy

KINDS = {
    "plain": {},
    "classes": {"n_labels": 5, "n_channels": 4},
    "features": FEATURES,
    "vectors": VECTORS,
    "conv": {"out_conv": True},
    "fsq": {"quant_type": "fsq", "levels": [8, 5, 5]},
    "no last MLP": {"post_mlp": False},
}


def an_input(model):
    generator = torch.Generator().manual_seed(0)
    if model.n_labels:
        return torch.randint(model.n_labels, (2, 32, 32), generator=generator)
    sides = (1, 1) if "MLP" in model.enc_type else (4, 4) if not model.patch_proj else (32, 32)
    return torch.randn(2, model.n_channels, *sides, generator=generator)


def assert_same(loaded, model):
    assert not loaded.training
    tokens = model.tokenize(an_input(model))
    assert torch.equal(loaded.tokenize(an_input(model)), tokens)
    if type(loaded) is not VQ:
        assert torch.equal(loaded.decode_tokens(tokens), model.decode_tokens(tokens))


def change_config(folder, **changes):
    path = folder / "config.json"
    config = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not ...}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    model = toy(**KINDS[kind])
    model.save_pretrained(tmp_path / "t")
    loaded = VQVAE.from_pretrained(tmp_path / "t")
    assert_same(loaded, model)
    assert loaded.config == model.config
    assert all(p.requires_grad for p in loaded.parameters())
    assert_same(VQ.from_pretrained(str(tmp_path / "t")), model)  # the encoder half
    by_itself = load_tokenizer(tmp_path / "t")
    assert type(by_itself) is VQVAE
    assert_same(by_itself, model)
    loaded.save(tmp_path / "t")  # replaces it
    assert_same(load_tokenizer(tmp_path / "t"), model)


@pytest.mark.parametrize("kind", ["plain", "classes", "features", "vectors", "conv", "no last MLP"])
def test_the_file_decides_over_shapes(kind, tmp_path):
    model = toy(**KINDS[kind])
    model.save_pretrained(tmp_path)
    silent = dict.fromkeys(
        (
            "n_channels",
            "n_labels",
            "codebook_size",
            "num_codebooks",
            "latent_dim",
            "quant_type",
            "post_mlp",
            "out_conv",
        ),
        ...,
    )
    change_config(tmp_path, **silent)
    assert_same(VQVAE.from_pretrained(tmp_path), model)
    wrong = {
        "n_channels": 2,
        "codebook_size": 99,
        "latent_dim": 3,
        "image_size_enc": 128,
        "n_labels": None,
        "post_mlp": False,
    }
    change_config(
        tmp_path, **wrong, quant_type="lucid", num_codebooks=1, sync_codebook=True, ckpt_path="/nowhere", extra=[1]
    )
    assert_same(VQVAE.from_pretrained(tmp_path), model)
    change_config(tmp_path, patch_size=...) if kind == "plain" else None
    assert_same(VQVAE.from_pretrained(tmp_path), model)


def test_a_position_table_of_another_size_is_kept(tmp_path):
    model = toy(image_size=64)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, image_size=32)
    loaded = VQVAE.from_pretrained(tmp_path)
    assert loaded.encoder.pos_emb.shape[2:] == loaded.decoder.pos_emb.shape[2:] == (8, 8)
    assert (loaded.image_size, loaded.image_size_enc) == (32, 64)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded.tokenize(x), model.tokenize(x))


def test_arguments_go_before_the_configuration(tmp_path):
    toy().save_pretrained(tmp_path)
    loaded = VQVAE.from_pretrained(tmp_path, freeze_enc=True, ema_decay=0.5)
    assert loaded.freeze_enc and loaded.ema_decay == 0.5
    assert not any(p.requires_grad for p in loaded.encoder.parameters())


def test_a_file_with_its_configuration_in_the_header_is_enough(tmp_path):
    model = toy(n_labels=5, n_channels=4)
    model.save_pretrained(tmp_path / "t")
    header = {key: str(value) for key, value in model.config.items()} | {"long": "[" * 20_000}
    save_file(load_file(tmp_path / "t" / "model.safetensors"), tmp_path / "alone.safetensors", header)
    assert header["image_size_enc"] == "None"
    assert_same(load_tokenizer(tmp_path / "alone.safetensors"), model)


def test_files_in_half_precision_are_loaded_in_float32(tmp_path):
    toy().save_pretrained(tmp_path)
    halves = {name: tensor.half() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(halves, tmp_path / "model.safetensors")
    loaded = load_tokenizer(tmp_path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}


def published_pth(path, model, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    args = {
        "domain": "rgb",
        "encoder_type": model.enc_type,
        "decoder_type": model.dec_type,
        "input_size_max": 32,
        "quantizer_type": "lucid",
        "patch_size": 8,
        "quantizer_ema_decay": 0.8,
        "opt": "adamw",
    }
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(**args | options)}, path)


def test_published_training_checkpoints(tmp_path):
    model = toy()
    published_pth(tmp_path / "cc12m" / "rgb.pth", model)
    loaded, args = get_image_tokenizer("cc12m/rgb", tmp_path, verbose=False)
    assert_same(loaded, model)
    assert type(loaded) is VQVAE and args.opt == "adamw"
    assert (loaded.modality, loaded.ema_decay, loaded.image_size) == ("rgb", 0.8, 32)
    half, _ = get_image_tokenizer("cc12m/rgb", tmp_path, encoder_only=True)
    assert type(half) is VQ
    assert_same(half, model)
    assert get_image_tokenizer("nothing", tmp_path, return_None_on_fail=True) == (None, None)
    with pytest.raises(UserError, match="nothing is not a tokenizer folder"):
        get_image_tokenizer("nothing", tmp_path)
    model.save(tmp_path / "folder")
    assert_same(get_image_tokenizer(str(tmp_path / "folder"))[0], model)


def test_masks_of_instances_have_the_size_of_the_mask(tmp_path):
    published_pth(tmp_path / "sam.pth", toy(n_channels=1), domain="sam_mask", mask_size=64, input_size_max=224)
    assert get_image_tokenizer("sam", tmp_path)[0].image_size == 64


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["PYTEST_MARK"]),))


def test_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_MARK", str(tmp_path / "executed"))
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    torch.save({"model": {}, "args": Malicious()}, tmp_path / "worse.pth")
    for name in ("bad", "worse"):
        with pytest.raises(UserError, match="cannot be read as weights"):
            get_image_tokenizer(name, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_training_begins_with_the_encoder_of_another(tmp_path):
    model = toy()
    old = {"quant_proj": "quant_conv.0", "post_quant_proj": "post_quant_conv"}
    weights = {}
    for name, tensor in model.state_dict().items():
        root, _, rest = name.partition(".")
        weights[f"{old.get(root, root)}.{rest}"] = tensor
    torch.save({"state_dict": weights}, tmp_path / "old.pth")
    torch.manual_seed(5)
    began = VQVAE(**TOY, ckpt_path=str(tmp_path / "old.pth")).eval()
    x = an_input(model)
    assert torch.equal(began.tokenize(x), model.tokenize(x))
    assert not torch.equal(began.post_quant_proj.weight, model.post_quant_proj.weight)
    began.init_from_ckpt(tmp_path / "old.pth")
    assert torch.equal(began.autoencode(x), model.autoencode(x))
    with pytest.raises(UserError, match="none of the model's weights"):
        began.init_from_ckpt(tmp_path / "old.pth", ["encoder", "quant", "decoder", "post_quant_proj"])
    with pytest.raises(UserError, match=r"encoder.pos_emb has shape \(1, 32, 4, 4\), the model's is \(1, 32, 8, 8\)"):
        toy(image_size=64).init_from_ckpt(tmp_path / "old.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("encoder.blocks.1.attn.qkv.bias"), "there is no encoder.blocks.1.attn.qkv.bias"),
        (
            lambda weights: weights.update({"quant_proj.bias": torch.zeros(3)}),
            r"quant_proj.bias of shape \(3,\), not \(8,\)",
        ),
        (
            lambda weights: weights["quant_proj.bias"].fill_(torch.nan),
            "quant_proj.bias holds values that are not finite",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence(tmp_path, change, message):
    toy().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    for load in (load_tokenizer, VQVAE.from_pretrained):
        with pytest.raises(UserError, match=message):
            load(tmp_path)


def test_a_small_file_does_not_become_a_large_model(tmp_path):
    toy().save_pretrained(tmp_path)
    change_config(tmp_path, enc_type="vit_l_enc", dec_type="vit/B_256-Wi_99996-H_1", image_size=2**16)
    with pytest.raises(UserError, match="not the weights"):
        load_tokenizer(tmp_path)
    change_config(tmp_path, enc_type="BottleneckMLP/B_999999999-Wi_8")
    with pytest.raises(UserError, match="is not an MLP such as|not the weights"):
        load_tokenizer(tmp_path)


def test_damaged_files_are_one_sentence(tmp_path):
    toy().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    for load in (load_tokenizer, VQVAE.from_pretrained):
        with pytest.raises(UserError, match="damaged"):
            load(tmp_path)


def test_a_model_of_4m_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"domains_in": [], "encoder_depth": 1}')
    with pytest.raises(UserError, match="does not belong to a learned tokenizer"):
        toy().save_pretrained(tmp_path)


class Hub(SimpleHTTPRequestHandler):
    """As much of the hub as its client asks for: OWNER/NAME/resolve/REVISION/FILE."""

    def translate_path(self, path):
        owner, name, _, _, file = path.strip("/").split("/")
        return str(Path(self.directory) / owner / name / file)

    def send_head(self):
        if not Path(self.translate_path(self.path)).exists():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return None
        return super().send_head()

    def end_headers(self):
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{abs(hash(self.path)):x}"')
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """A folder that is served as a hub, and the environment of a process that uses it."""
    folder = tmp_path / "hub"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    yield folder, environment
    server.shutdown()
    server.server_close()


def test_tokenizers_come_from_the_hub(hub, tmp_path):
    folder, environment = hub
    model = toy()
    model.save_pretrained(folder / "EPFL-VILAB" / "4M_tokenizers_edge_8k_224-512")
    change_config(folder / "EPFL-VILAB" / "4M_tokenizers_edge_8k_224-512", modality=...)
    (folder / "me" / "header").mkdir(parents=True)
    header = {key: str(value) for key, value in model.config.items()}
    save_file(model.state_dict(), folder / "me" / "header" / "model.safetensors", header)
    torch.save(an_input(model), tmp_path / "x.pt")
    write_files(tmp_path, "rgb", 2)
    code = """
import sys, torch
from fourm.vq import load_tokenizer
from fourm.vq.save_tokens import main
from fourm.vq.vqvae import VQ, VQVAE
x = torch.load(sys.argv[1])
name = "EPFL-VILAB/4M_tokenizers_edge_8k_224-512"
found = [load_tokenizer(name), VQVAE.from_pretrained(name), VQ.from_pretrained(name)]
found += [load_tokenizer("me/header"), VQVAE.from_pretrained("me/header")]
torch.save([model.tokenize(x) for model in found], sys.argv[2])
main("--tokenizer me/header --task rgb --num_crops 1 --num_workers 0 --data_root".split() + [sys.argv[3]])
print(found[0].info.modality)
try:
    load_tokenizer("me/nothing")
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.pt", tmp_path / "ids.pt", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    expected = model.tokenize(an_input(model))
    assert all(torch.equal(ids, expected) for ids in torch.load(tmp_path / "ids.pt"))
    assert len(read_files(tmp_path / "tok_rgb@32")) == 2
    modality, error = done.stdout.strip().splitlines()[-2:]
    assert modality == "canny_edge"
    assert "'me/nothing' is neither a file nor a folder, and could not be loaded from the hub" in error


def test_images_are_tokenized_by_a_learned_tokenizer(tmp_path):
    write_files(tmp_path / "data", "depth", 4)
    model = toy(n_channels=1, modality="depth", transform_options={"standardize_depth": False})
    model.save(tmp_path / "t")
    given = {"data_root": str(tmp_path / "data"), "num_crops": 2, "num_workers": 0, "device": "cpu"}
    assert save_tokens(SaveTokensOptions(tokenizer=str(tmp_path / "t"), **given)) == 4
    tokens = read_files(tmp_path / "data" / "tok_depth@32")
    assert len(tokens) == 4 and all(ids.shape == (2, 16) and ids.dtype == np.int16 for ids in tokens.values())
    assert len(np.unique(np.concatenate([*tokens.values()]))) > 2
    toy(n_channels=1).save(tmp_path / "nameless")
    with pytest.raises(UserError, match="does not name the modality that it tokenizes: set 'modality'"):
        save_tokens(SaveTokensOptions(tokenizer=str(tmp_path / "nameless"), **given))
    again = SaveTokensOptions(tokenizer=str(tmp_path / "nameless"), modality="depth", output_modality="tok", **given)
    assert save_tokens(again) == 4
