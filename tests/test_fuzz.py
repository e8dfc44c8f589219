"""Randomly changed configurations and files are either read or refused with one of our errors.

Each :class:`Entry` is a valid input and its reader; add a line to the table for every new reader of untrusted files.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import json
import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.data_config import load_data_config
from fourm.data.modality_info import MODALITY_INFO
from fourm.data.modality_transforms import CaptionEmbTransform, UnreadableValue
from fourm.data.presence import Presence
from fourm.data.raw_sample import BadSample, Member, OpenFiles, RawSample
from fourm.data.record_files import local_files
from fourm.data.records import Records
from fourm.data.shards import Shards
from fourm.generation.options import parse
from fourm.generation.results import origin_of, read_result
from fourm.generation.settings import chained_schedule
from fourm.models import FM
from fourm.tools.check import main as check
from fourm.train.checkpoint import read_state
from fourm.train.config import load_config, parse_args
from fourm.train.journal import read_lines
from fourm.train.tasks.pretrain import PretrainConfig
from fourm.utils.config import load_yaml, parse_value
from fourm.utils.errors import UserError
from fourm.utils.tokenizer.text_tokenizer import load_text_tokenizer
from fourm.utils.transfer import check_url
from fourm.utils.urls import redact_url
from fourm.vq import load_tokenizer
from fourm.vq.vqvae import VQVAE
from tests.data.dataset_files import jpeg, npy, text_tokenizer

EXAMPLES = 25
ALLOWED = (UserError, BadSample, UnreadableValue)

ODD_TEXT = st.sampled_from(
    ["", " ", "~", "null", "NaN", "-.inf", "1e999", "auto", "{", "[", "]", "a{1..2", "{a,b}", "[a][b]", "[rgb", "s3:/x", "s3://", "%", "\\",
     "http://h:99999999/", "https://[::1", "\x1b[2J", "\ud83d\ude00", "\ufeff", "\0", "é" * 300, "/dev/null", ".", "..", "a-b-", "-", "rgb@", "2024-02-30"]
)  # fmt: skip
ODD = st.one_of(
    ODD_TEXT, st.text(max_size=8), st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none(),
    st.sampled_from([[], {}, [None], [[]], {"": None}, {1: 2}, ["a", "a"], [[[[[[1]]]]]], {"a": {"b": []}}]),
)  # fmt: skip


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Truncate, overwrite, duplicate or insert bytes."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        end = min(start + draw(st.sampled_from([1, 4, 50, 512])), len(content))
        new = draw(
            st.sampled_from([b"", b"\0" * (end - start), b"\xff" * (end - start), content[start:end] * 2, b"[" * 400])
            | st.binary(max_size=16)
        )
        content = draw(st.sampled_from([content[:start], content[:start] + new + content[end:]]))
    return content


@st.composite
def changed_tree(draw: st.DrawFn, tree: Any) -> Any:
    """Change or remove one to three values or keys of nested lists and mappings."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], (dict, list)) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
            if action == "remove":
                del node[key]
            elif action == "replace" or isinstance(node, list):
                node[key] = draw(ODD)
            else:
                node[draw(st.one_of(ODD_TEXT, st.integers(-2, 9), st.none()))] = draw(ODD)
            break
    return tree


MAIN = yaml.safe_load(Path("cfgs/default/4m/models/main/4m-xl_mod7_500b.yaml").read_text())
DATA = {
    "train": {
        "datasets": {
            "a": {
                "type": "multimodal", "in_domains": "caption-rgb@224-tok_rgb@224", "out_domains": "caption-tok_rgb@224",
                "data_path": "root/[rgb,caption,tok_rgb,crop_settings]/shard-{00000..00003}.tar", "use_wds": True, "hflip": 0.5,
                "wds_n_repeats": 4, "main_augment_domain": "rgb@224", "input_alphas": "0.5-0.5-0.5", "target_alphas": 0.5,
                "crop_scale": [0.2, 1.0], "modality_name_map": {"tok_rgb": "tok_rgb@224"}, "max_bad_fraction": 0.1,
            },
            "b": {"type": "huggingface", "in_domains": "caption", "out_domains": "caption", "data_path": "x.json", "alphas_config": "alphas.yaml"},
        },
        "weights": [0.5, 0.5],
    },
    "val": {"datasets": {"a": {"data_path": "val", "wds_n_repeats": 1}}},
    "modalities": {"caption": {"max_tokens": 12}, "mine": {"type": "img", "vocab_size": 16, "input_size": 32, "patch_size": 16}},
}  # fmt: skip
ALPHAS = {
    "alphas_mixture": {"caption": {"input_alphas": [0.5, 0], "target_alphas": [1, 1.0], "keep": ["random", "all"]}},
    "sampling_weights": [1, 2],
}
ARGUMENTS = [
    "--batch_size",
    "4",
    "--opt_betas",
    "0.9",
    "0.95",
    "--model_kwargs",
    "{dim: 24}",
    "--s3_endpoint",
    "http://127.0.0.1:9",
    "--seed",
    "0",
]


class Entry(NamedTuple):
    """A valid input and its reader.

    Attributes:
        valid: Bytes, or values that ``dump`` converts to bytes.
        name: Name of the file.
        read: Reads the file.
        dump: Converts ``valid`` to bytes; None if it is bytes already.
    """

    valid: Any
    name: str
    read: Callable[[Path], Any]
    dump: Callable[[Any], str] | None = None


def read_data(path: Path) -> None:
    alphas = path.with_name("alphas.yaml")
    if path != alphas:
        alphas.write_text(yaml.safe_dump(ALPHAS))
    else:
        path = path.with_name("data.yaml")
        path.write_text(yaml.safe_dump(DATA))
    load_data_config(path, num_input_tokens=128, num_target_tokens=128)


def read_arguments(path: Path) -> None:
    arguments = shlex.split(path.read_text(encoding="utf-8", errors="surrogatepass"))
    for argument in arguments:
        parse_value(argument)
    try:
        parse_args(PretrainConfig, arguments)
    except SystemExit as end:  # of --help
        assert not end.code


def read_member(path: Path) -> None:
    RawSample("k", {"x": Member(str(path), path.name.partition(".")[2])}).values(OpenFiles(), True)


def read_tar(path: Path) -> None:
    wanted = {"rgb@224": "rgb", "caption": "caption", "det": "det"}
    for sample in Shards(str(path), wanted).all(BadSampleLedger("toy", 1.0)):
        sample.values(OpenFiles(), True)


def read_records(path: Path) -> None:
    for record in Records(str(path), ["caption"], {}, Presence()).once():
        try:
            record.values(OpenFiles(), False)
        except BadSample:
            continue


def read_url(path: Path) -> None:
    url = path.read_text(errors="surrogateescape")
    texts = [redact_url(url)]
    try:
        check_url(url)
    except UserError as error:
        texts.append(str(error))
        raise
    finally:  # password and signature can be recognized as long as the text before them is that of a URL
        for text in texts:
            assert not re.match(r"[\w+.-]+:/+[^/]*:secret", url) or ":secret" not in text
            assert not re.match(r"[\w+.-]+:/", url) or "?signature=secret" not in text


def read_place(path: Path) -> None:
    local_files(path.read_text(errors="replace"))


def read_folder(path: Path) -> None:
    """Check a data set of folders with one damaged file, which must be reported without ending the check."""
    root = path.parents[2]
    for name, content in FOLDER.items():
        if not (root / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    names = "rgb@224-caption-det"
    fields = {
        "in_domains": names,
        "out_domains": "caption-det",
        "input_alphas": 1,
        "target_alphas": 1,
        "data_path": str(root),
    }
    config = root.with_name("check.yaml")
    config.write_text(yaml.safe_dump({"train": {"datasets": {"toy": fields}}}))
    text_tokenizer().save(str(root.with_name("words.json")))
    words = ["--text_tokenizer_path", str(root.with_name("words.json"))]
    assert check([str(config), *words, "--num_workers", "0", "--json"]) in (0, 1)


def read_model(path: Path) -> None:
    with torch.device("meta"):
        FM(json.loads(path.read_bytes()))


def read_tokenizer(path: Path) -> None:
    """``config.json`` beside whole weights, or weights with their configuration inside."""
    if path.name == "config.json":
        (path.parent / "model.safetensors").write_bytes(TOKENIZER_WEIGHTS)
    load_tokenizer(path.parent if path.name == "config.json" else path)


def pth() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": VQVAE(TOKENIZER).state_dict(), "args": argparse.Namespace(**TOKENIZER)}, buffer)
    return buffer.getvalue()


def read_schedule(path: Path) -> None:
    targets = ["tok_rgb@224", "caption"]
    chained_schedule(["det"], targets, MODALITY_INFO, load_yaml(path))


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, emb=np.ones((2, 3, 8), np.float16), mask_valid=np.ones((2, 3), bool))
    return buffer.getvalue()


def read_saved_result(path: Path) -> None:
    np.savez(path.with_name("values.npz"))
    origin_of(path.parent)
    read_result(path.parent)


def read_npz(path: Path) -> None:
    member = {"t5": Member(str(path), "npz")}
    value = RawSample("k", member).values(OpenFiles(), True)["t5"]
    CaptionEmbTransform().preprocess(value)


def archive(kind: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for key in ("0", "long" * 40):
            for name, content in {
                "rgb.jpg": JPEG,
                "caption.txt": b"a dog",
                "det.json": json.dumps(BOXES).encode(),
            }.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


JPEG = jpeg(np.random.default_rng(0))
BOXES = {"num_instances": 1, "instances": [{"boxes": [0.1, 0.2, 0.3, 0.4], "score": 0.9, "class_name": "dog"}]}
ROWS = b"".join(json.dumps({"text": f"sample {i}", "url": "x"}).encode() + b"\n" for i in range(4))
STATE = {"step": 3, "positions": [{"stream": 0, "epoch": 0, "draws": 9}], "log": {"loss": [1.0]}, "config": {"seed": 0}}
FOLDER = {f"{name}/0/{key}.{extension}": content for key in (1, 2) for name, extension, content in (
    ("rgb", "jpg", JPEG), ("caption", "txt", b"a dog"), ("det", "json", json.dumps(BOXES).encode())
)}  # fmt: skip
MODEL = {
    "dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "mlp_ratio": 4.0, "act_layer": "SiLU", "gated_mlp": True,
    "domains_in": ["rgb@224", "caption", "mine"], "domains_out": ["caption", "mine"], "image_size": 224, "patch_size": 16, "norm_bias": False,
    "modalities": {"mine": {"type": "seq_token", "vocab_size": 64, "vocab_offset": 8, "max_tokens": 4, "embedding_options": {"max_length": 4}}},
}  # fmt: skip
TOKENIZER = {
    "enc_type": "vit/B_1-Wi_8-H_1", "dec_type": "vit/B_1-Wi_8-H_2", "image_size": 8, "patch_size": 4, "codebook_size": 6, "n_labels": None,
    "latent_dim": 4, "post_mlp": True, "quant_type": "lucid", "n_channels": 3, "transform_options": {"a": 1}, "ema_decay": 0.99,
}  # fmt: skip
TOKENIZER_WEIGHTS = save(VQVAE(TOKENIZER).state_dict(), {name: str(value) for name, value in TOKENIZER.items()})
SETTINGS = {
    "temps": [1.0, 0.3], "cfg_scales": {"caption": 2.0}, "decoding_steps": 4, "tokens_per_target": "196-10", "temp_schedules": "onex:0.5:0.5-constant",
    "token_decoding_schedules": "cosine", "autoregression_schemes": "roar-autoregressive", "cfg_schedules": "constant",
}  # fmt: skip
LINES = b"".join(json.dumps({"step": i, "epoch": 0, "loss": 1.0 / (i + 1)}).encode() + b"\n" for i in range(4))
RESULT = {"caption": {"kind": "caption", "value": "a dog", "dropped": 0, "names": []}}
GENERATION = {
    "model": "m", "tokenizers": {"rgb": "t"}, "cond_domains": "caption", "target_domains": "rgb", "data": ["a dog"], "output_dir": "o", "top_k": 0.9,
    "top_p": 0.5, "temps": 1.0, "seed": 3, "num_samples": 2, "sr_model": "n", "sr_target_domains": "rgb", "class_names": ["a"],
}  # fmt: skip
dump_yaml = functools.partial(yaml.safe_dump, allow_unicode=False)

ENTRIES = {
    "main YAML": Entry(MAIN, "main.yaml", functools.partial(load_config, PretrainConfig), dump_yaml),
    "main YAML, bytes": Entry(dump_yaml(MAIN).encode(), "main.yaml", functools.partial(load_config, PretrainConfig)),
    "data YAML": Entry(DATA, "data.yaml", read_data, dump_yaml),
    "data YAML, bytes": Entry(dump_yaml(DATA).encode(), "data.yaml", read_data),
    "alphas": Entry(ALPHAS, "alphas.yaml", read_data, dump_yaml),
    "command line": Entry(ARGUMENTS, "arguments", read_arguments, lambda words: shlex.join(map(str, words))),
    "tar": Entry(archive(tarfile.GNU_FORMAT), "a.tar", read_tar),
    "pax tar": Entry(archive(tarfile.PAX_FORMAT), "a.tar", read_tar),
    "npy": Entry(npy(np.arange(60).reshape(3, 20)), "k.npy", read_member),
    "image": Entry(JPEG, "k.jpg", read_member),
    "boxes": Entry(BOXES, "k.json", read_member, json.dumps),
    "json, bytes": Entry(json.dumps(BOXES).encode(), "k.json", read_member),
    "text": Entry("zwei Hände".encode(), "k.txt", read_member),
    "records": Entry(ROWS, "rows.jsonl", read_records),
    "vocabulary": Entry(json.loads(text_tokenizer().to_str()), "words.json", load_text_tokenizer, json.dumps),
    "vocabulary, bytes": Entry(text_tokenizer().to_str().encode(), "words.json", load_text_tokenizer),
    "state": Entry(STATE, "state.json", lambda path: read_state(path.parent), json.dumps),
    "state, bytes": Entry(json.dumps(STATE).encode(), "state.json", lambda path: read_state(path.parent)),
    "model": Entry(MODEL, "config.json", read_model, json.dumps),
    "tokenizer": Entry(TOKENIZER, "config.json", read_tokenizer, json.dumps),
    "tokenizer, bytes": Entry(json.dumps(TOKENIZER).encode(), "config.json", read_tokenizer),
    "tokenizer, weights": Entry(TOKENIZER_WEIGHTS, "t.safetensors", read_tokenizer),
    "tokenizer, pth": Entry(pth(), "t.pth", read_tokenizer),
    "model, bytes": Entry(json.dumps(MODEL).encode(), "config.json", lambda path: FM.from_pretrained(str(path.parent))),
    "schedule": Entry(SETTINGS, "settings.yaml", read_schedule, dump_yaml),
    "generation YAML": Entry(GENERATION, "generation.yaml", lambda path: parse(["--config", str(path)]), dump_yaml),
    "result": Entry(RESULT, "result.json", read_saved_result, json.dumps),
    "result, bytes": Entry(json.dumps(RESULT).encode(), "result.json", read_saved_result),
    "log": Entry(LINES, "log.jsonl", lambda path: read_lines(path)),
    "npz": Entry(npz(), "k.npz", read_npz),
    "folder, picture": Entry(JPEG, "d/rgb/0/1.jpg", read_folder),
    "folder, boxes": Entry(BOXES, "d/det/0/1.json", read_folder, json.dumps),
    "URL": Entry(b"https://me:secret@host:80/[rgb]/a.tar?signature=secret", "url", read_url),
    "place of records": Entry(b"./data/{a,b}/c4-train.*.json.gz:validation", "place", read_place),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_randomly_changed_input_is_read_or_refused(name, tmp_path):
    entry = ENTRIES[name]
    strategy = changed_tree(entry.valid) if entry.dump else changed_bytes(entry.valid)

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, phases=(Phase.generate,),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )  # fmt: skip
    @given(strategy)
    def fuzz(content: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.dump(content).encode("utf-8", "surrogatepass") if entry.dump else content)
        try:
            entry.read(path)
        except ALLOWED as error:
            assert str(error), "an error says what is wrong"

    path = tmp_path / entry.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(entry.dump(entry.valid).encode() if entry.dump else entry.valid)
    fuzz()
