"""Model cards: what they say, and that the facts about a training stay with the weights, as far as the hub."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from fourm.models import FM
from fourm.models.model_card import read_facts
from fourm.train.export import main as export
from fourm.vq import load_tokenizer
from fourm.vq.vqvae import VQ, VQVAE
from tests.models.toy_models import toy_model
from tests.train.toy_run import log_lines, run_in_process, write_run
from tests.vq.test_vqvae import toy

FACTS = {"Results": [{"data set": "a|b<i>", "evaluation": "fixed", "loss": 1.23456, "samples": 12345, "missing": None}]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run folder, whose checkpoints are kept."""
    folder = tmp_path_factory.mktemp("run")
    run_in_process(write_run(folder, epochs=1, model_ema=True, save_every_minutes=1e-9, keep_last=0))
    return folder / "out"


def rows(card, title):
    """The cells of a table."""
    (table,) = [part for part in card.content.split("\n## ") if part.startswith(f"{title}\n")]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")] for line in lines]


def test_the_card_of_a_run_has_its_modalities_budgets_data_and_figures(run):
    card = FM.from_pretrained(run).generate_model_card(repo_id="me/toys")
    assert card.data.library_name == "fourm" and {"any-to-any", "4m"} <= {*card.data.tags}
    assert card.data.pipeline_tag == "any-to-any"
    modalities = {row[0]: row[1:] for row in rows(card, "Modalities")[2:]}
    assert modalities["rgb@32"][:3] == ["img", "yes", "no"] and modalities["caption"][1:3] == ["yes", "yes"]
    assert "4,500" in modalities["caption"]
    assert ["toys", "16", "12"] in rows(card, "Token budgets")
    names, _, data = rows(card, "Data")
    assert dict(zip(names, data, strict=True))["targets"] == "caption, det, tok_rgb@32"
    names, _, training = rows(card, "Training")
    training = dict(zip(names, training, strict=True))
    assert (training["task"], training["steps"], training["samples"]) == ("pretrain", "12", "48")
    fixed = log_lines(run)[-1]["eval"]["toys"]["fixed"]
    names, _, *results = rows(card, "Results")
    (result,) = [dict(zip(names, row, strict=True)) for row in results if row[1] == "fixed"]
    assert result["loss"] == f"{fixed['loss']:.4g}"
    assert result["loss of caption"] == f"{fixed['per_modality']['caption']:.4g}"
    assert 'FM.from_pretrained("me/toys")' in card.content
    assert str(run.parent) not in card.content


def test_exports_have_the_figures_of_their_weights_only(run, tmp_path):
    ema = FM.from_pretrained(run / "ema").training_facts
    assert {row["evaluation"] for row in ema["Results"]} == {"train", "fixed"}
    evaluated = log_lines(run)[-1]["eval"]["toys"]
    assert {row["loss"] for row in ema["Results"]} == {evaluated[f"{kind}_ema"]["loss"] for kind in ("train", "fixed")}
    export([str(run / "checkpoints" / "step-00000005"), str(tmp_path / "early")])
    early = read_facts(tmp_path / "early" / "model.safetensors")
    assert early["Training"][0]["steps"] == 5 and early["Results"] == []
    export([str(run), str(tmp_path / "last")])
    assert read_facts(tmp_path / "last" / "model.safetensors") == FM.from_pretrained(run).training_facts


def test_a_tokenizer_has_a_card_too(tmp_path):
    model = toy(modality="depth", n_channels=1)
    model.training_facts = FACTS
    model.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), VQVAE.from_pretrained(tmp_path), VQ.from_pretrained(str(tmp_path))):
        assert loaded.training_facts == FACTS
    card = ModelCard.load(tmp_path / "README.md")
    assert {"4m", "tokenizer"} <= {*card.data.tags} and "any-to-any" not in card.data.tags
    names, _, row = rows(card, "Tokenizer")
    assert (dict(zip(names, row, strict=True))["modality"], row[1]) == ("depth", str(model.config["codebook_size"]))
    assert rows(card, "Results")[2] == ["a¦b&lt;i>", "fixed", "1.235", "12,345"]  # without the column of nothing


def test_a_card_that_somebody_has_edited_is_kept(tmp_path):
    toy_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    toy_model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "[1]", '{"Data": 1}', '{"Data": [{"a": {}}]}', "{}" + " " * 2**20]
)
def test_facts_that_are_none_are_left_out(tmp_path, text):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt", "training": text})
    assert read_facts(tmp_path / "model.safetensors") == {}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a push asks for; ``server.files`` are those of the last commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://127.0.0.1:{self.server.server_port}/me/toys"
        answer = {}
        if self.path == "/api/repos/create":
            answer = {"url": address, "name": json.loads(body)["name"], "id": "me/toys"}
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif self.path.endswith("/commit/main"):
            files = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            self.server.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
            answer = {"commitUrl": f"{address}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        pass


def test_a_push_uploads_model_and_card(run, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    model = FM.from_pretrained(run)
    try:
        model.push_to_hub("me/toys", token="hf_x", model_card_kwargs={"model_name": "Toys"})
    finally:
        server.shutdown()
        server.server_close()
    assert server.files.keys() == {"README.md", "config.json", "model.safetensors"}
    card = ModelCard(server.files["README.md"].decode())
    assert "# Toys" in card.content and 'FM.from_pretrained("me/toys")' in card.content
    assert rows(card, "Results") == rows(model.generate_model_card(), "Results")
