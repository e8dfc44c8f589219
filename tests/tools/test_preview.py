"""The preview shows what masking does, in one file that needs nothing else."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fourm.data.data_config import load_data_config
from fourm.data.modality_info import MODALITY_INFO, Modality
from fourm.data.sample_dataset import build_masking
from fourm.generation.plotting import pca_picture
from fourm.generation.sampler import load_tokenizers
from fourm.tools.preview.command import _painter, _reader, main
from fourm.tools.preview.page import bins, page
from fourm.tools.preview.samples import preview
from fourm.tools.preview.sequences import INPUT, TARGET, PositionMasking, roles_of
from fourm.utils.errors import UserError
from fourm.utils.tokenizer import load_text_tokenizer
from fourm.vq import PatchCodebook, PatchCodebookConfig
from tests.data.dataset_files import MODALITIES, text_tokenizer, write_folders, write_shards
from tests.generation.test_learned_tokenizers import GLOBAL
from tests.train.test_mod21 import write_folders as write_files
from tests.vq.test_vqvae import FEATURES, toy
from tests.warm_python import warm_python

REPOSITORY = Path(__file__).parents[2]
ALPHAS = {
    "rgb@32": {"input_alphas": [1000.0, 1.0, 1.0]},
    "tok_rgb@32": {"input_alphas": [0.0, 1.0, 1.0], "target_alphas": [1.0, 1.0, 1.0]},
    "caption": {"input_alphas": [0.0, 1.0, 1.0], "target_alphas": [1.0, 1.0, 1.0], "keep": ["random", "random", "all"]},
    "det": {"input_alphas": [0.0, 1.0, 1.0], "target_alphas": [1.0, 1.0, 1.0]},
    "station": {"input_alphas": [0.0, 1.0, 1.0], "target_alphas": [1.0, 1.0, 1.0]},
}


STATION = {"type": "seq_token", "vocab_size": 40, "vocab_offset": 12, "max_tokens": 5}


@pytest.fixture
def config(tmp_path):
    """Path of a data YAML of six samples with sequences of all kinds, three components, one of which never comes up."""
    path = Path(write_folders(tmp_path / "f", 6))
    for index in range(6):
        target = path / "station" / f"part{index % 2}" / f"{index:05d}.npy"
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, np.arange(3) + index)
    content = {
        "modalities": {**MODALITIES, "station": STATION},
        "train": {
            "datasets": {
                "toy<&>": {
                    "in_domains": "-".join(ALPHAS),
                    "out_domains": "-".join([*ALPHAS][1:]),
                    "data_path": str(path),
                    "alphas_config": f"{tmp_path}/alphas.yaml",
                    "num_input_tokens": 12,
                    "num_target_tokens": 16,
                },
            },
        },
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    alphas = {"sampling_weights": [3, 1, 0], "alphas_mixture": ALPHAS}
    (tmp_path / "alphas.yaml").write_text(yaml.safe_dump(alphas))
    text_tokenizer().save(str(tmp_path / "words.json"))
    return tmp_path / "data.yaml"


def paint(modality: Modality, tensor: torch.Tensor) -> np.ndarray:
    return np.full((8, 8, 3), 7, np.uint8)


def read(modality: Modality, ids: torch.Tensor) -> list:
    return []


def drawn(config, **options):
    dataset = load_data_config(config, num_input_tokens=12, num_target_tokens=16).train["toy<&>"]
    defaults = {"training": True, "samples": 4, "draws": 300, "seed": 0}
    return preview(dataset, text_tokenizer(), paint, read, **(defaults | options))


def test_every_component_shows_the_same_samples_under_its_own_budgets(config):
    result = drawn(config)
    assert [component.index for component in result.components] == [0, 1], "the third has no weight"
    assert [component.share for component in result.components] == [0.75, 0.25]
    assert len({example.key for example in result.examples}) == 4 == len(result.components[0].masked_samples)
    first, second = result.components
    for shown in first.masked_samples:
        assert shown["rgb@32"].inputs == 4 and sum(entry.inputs for entry in shown.values()) == 4
    assert any(shown["tok_rgb@32"].inputs for shown in second.masked_samples)
    assert (first.input_budgets["rgb@32"] == 4).all() and not first.input_budgets["caption"].any()
    assert len(second.target_budgets["det"]) == 300 and "rgb@32" not in second.target_budgets


def test_what_is_shown_is_what_the_masks_say(config):
    for component in drawn(config, samples=6).components:
        for shown in component.masked_samples:
            for entry in shown.values():
                if entry.grid is not None:
                    assert entry.grid.shape == (2, 2)
                    assert ((entry.grid == 1).sum(), (entry.grid == 2).sum()) == (entry.inputs, entry.targets)
                else:
                    roles = [piece.role for piece in entry.pieces]
                    marks, shared = roles.count("mark"), roles.count("input") + roles.count("target")
                    # A sentinel with its span counts on both sides, but is shown once.
                    assert shared + marks <= entry.inputs + entry.targets <= shared + 2 * marks


def test_a_sequence_is_shown_whole(config):
    for component in (result := drawn(config, samples=6)).components:
        for example, shown in zip(result.examples, component.masked_samples, strict=True):
            index, tokens = (
                int(example.key[-5:]),
                lambda name, shown=shown: [piece.text for piece in shown[name].pieces if piece.role != "mark"],
            )
            caption = tokens("caption")
            assert caption[:3] == ["sample", f"s{index}", "crop"] and caption[4:] == ["[EOS]"]
            assert tokens("station") == [str(index), str(index + 1), str(index + 2), "[EOS]"]
            marks = [piece.text for piece in shown["station"].pieces if piece.role == "mark"]
            assert marks == [f"[S_{number}]" for number in range(1, len(marks) + 1)]


def test_places_are_masked_as_the_ids_would_be(config):
    dataset = load_data_config(config, num_input_tokens=12, num_target_tokens=16).train["toy<&>"]
    masking = build_masking(dataset, text_tokenizer())
    sample = {
        "rgb@32": np.zeros((3, 32, 32), np.float32),
        "tok_rgb@32": np.arange(4),
        "station": np.array([7, 7, 5]),
        "caption": "crop crop dog crop dog",
        "det": "v0=1 v1=1 v2=5 v3=5 dog",
    }
    seen = set()
    for seed in range(200):
        budgets = masking.draw_budgets(np.random.default_rng(seed), sample)
        expected = masking.apply(sample, budgets, np.random.default_rng(seed))
        entries = PositionMasking(masking).apply(sample, budgets, np.random.default_rng(seed))
        for name in ("caption", "det", "station"):
            ids = np.array(masking.encode(dataset.modalities[name], sample[name])[0])
            roles, marks = roles_of(entries[name], len(ids))
            for role, mask in ((INPUT, "input_mask"), (TARGET, "target_mask")):
                row = expected[name]["tensor"][~expected[name][mask]]
                assert (row[~np.isin(row, list(marks))] == ids[roles == role]).all()
                np.testing.assert_array_equal(expected[name][mask], entries[name][mask])
            for mark, place in marks.items():
                closes = place == len(ids) and mark == max(marks)
                assert closes or (roles[place] != INPUT and (place == 0 or roles[place - 1] == INPUT))
            assert roles.any() or {*marks.values()} <= {0}
            seen.add(tuple(roles))
        np.testing.assert_array_equal(expected["tok_rgb@32"]["tensor"], entries["tok_rgb@32"]["tensor"])
    assert len(seen) > 20


EVERYTHING = (
    "rgb@224 caption det metadata color_palette human_poses sam_instance t5_caption tok_rgb@224 tok_clip@224 "
    "tok_dinov2_global temperature"
)


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory):
    """Path of a data YAML with modalities of every kind, in the published vocabulary."""
    root = tmp_path_factory.mktemp("all")
    names = EVERYTHING.split()
    write_files(root, ["crop_settings", *("rgb" if name == "rgb@224" else name for name in names[:-1])], 3)
    for index in range(3):
        path = root / "temperature" / "part" / f"{index:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("21.47")
    toy = {
        "in_domains": "-".join(names),
        "out_domains": "-".join(sorted({*names} - {"rgb@224", "t5_caption"})),
        "data_path": str(root),
        "input_alphas": 0.5,
        "target_alphas": 0.5,
        "num_input_tokens": 200,
        "num_target_tokens": 300,
    }
    scalar = {"type": "scalar", "transform_options": {"low": -40, "high": 60}}
    (root / "data.yaml").write_text(
        yaml.safe_dump({"modalities": {"temperature": scalar}, "train": {"datasets": {"toy": toy}}})
    )
    return root / "data.yaml"


def test_what_tokens_say_has_the_roles_that_they_have(all_kinds):
    dataset = load_data_config(all_kinds, num_input_tokens=1, num_target_tokens=1).train["toy"]
    words = load_text_tokenizer("fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json")
    result = preview(dataset, words, paint, _reader(words), training=True, samples=3, draws=1, seed=1)
    several = set()
    for shown in result.components[0].masked_samples:
        roles = {
            name: [(piece.text, piece.role) for piece in entry.pieces if piece.role != "mark"]
            for name, entry in shown.items()
        }

        def of(name, first, last, roles=roles):
            found = {role for _, role in roles[name][first:last]}
            return tuple(role for role in ("input", "target") if role in found)

        for number, annotation in enumerate(shown["det"].annotations):
            assert annotation.label == "dog" and annotation.roles == of("det", 5 * number, 5 * number + 5)
            assert [round(999 * c) for c in annotation.boxes[0]] == [
                int(text[3:]) for text, _ in roles["det"][5 * number : 5 * number + 4]
            ]
        colors = [annotation.color for annotation in shown["color_palette"].annotations]
        assert roles["color_palette"][0][0] == f"v1={len(colors)}"
        for number, annotation in enumerate(shown["color_palette"].annotations):
            channels = roles["color_palette"][3 * number + 1 : 3 * number + 4]
            assert [f"v0={channel}" for channel in annotation.color] == [text for text, _ in channels]
            assert annotation.roles == of("color_palette", 3 * number + 1, 3 * number + 4)
        values = {annotation.label: annotation.value for annotation in shown["metadata"].annotations}
        assert {"original width": "288", "n humans": "1", "aesthetic score": "5"}.items() < values.items()
        for number, annotation in enumerate(shown["metadata"].annotations):
            assert annotation.roles == of("metadata", 2 * number, 2 * number + 2)
        assert (
            len(shown["sam_instance"].annotations)
            == 7
            == sum(annotation.point is not None for annotation in shown["sam_instance"].annotations)
        )
        assert [annotation.label for annotation in shown["human_poses"].annotations] == ["human"] * (
            (len(roles["human_poses"]) - 1) // 39
        )
        assert len(roles["t5_caption"]) == 9, "its valid vectors"
        assert shown["t5_caption"].inputs >= [role for _, role in roles["t5_caption"]].count("input")
        assert [float(annotation.value) for annotation in shown["temperature"].annotations] == [
            pytest.approx(21.47, abs=0.1)
        ]
        several |= {annotation.roles for entry in shown.values() for annotation in entry.annotations}
    assert {(), ("input",), ("target",)} <= several


def test_every_kind_is_drawn(all_kinds, tmp_path):
    assert main([str(all_kinds), "--out", f"{tmp_path}/page.html", "--draws", "5", "--seed", "1"]) == 0
    cards = Path(f"{tmp_path}/page.html").read_text().split('<section class="card">')[1:]
    for card in cards:
        tiles = {re.search('title="([^"]*)"', tile)[1]: tile for tile in card.split("<figure")[1:]}
        assert list(tiles) and {*tiles} == {*EVERYTHING.split()}
        picture = re.search(r'class="picture (p\d+-\d+-\d+)"', tiles["rgb@224"])[1]
        for name in ("det", "sam_instance"):
            assert f'class="picture {picture}"' in tiles[name], "boxes are in the main picture"
        assert "<rect" in tiles["det"] and ">dog</text>" in tiles["det"] and tiles["sam_instance"].count("<circle") >= 7
        assert "rgb(" in tiles["color_palette"] and "<span>original width</span>" in tiles["metadata"]
        assert "21.4" in tiles["temperature"] and "·" in tiles["t5_caption"]


def test_the_bins_of_a_histogram():
    none, shares = bins(np.array([0, 0, 1, 24, 24, 24]), 24)
    assert none == pytest.approx(1 / 3) and shares.sum() == pytest.approx(2 / 3)
    assert shares[0] == pytest.approx(1 / 6) and shares[-1] == pytest.approx(1 / 2)


def test_the_page_needs_nothing_else(config, tmp_path, capsys):
    out = tmp_path / "out" / "page.html"
    words = ["--text_tokenizer_path", f"{tmp_path}/words.json"]
    assert main([str(config), "--out", str(out), *words, "--samples", "2", "--draws", "50"]) == 0
    page = out.read_text()
    assert not re.search(r"<script|<link|<img|@import|src=|https?://", page)
    assert set(re.findall(r"url\((.{10})", page)) == {"data:image"}
    assert "toy&lt;&amp;&gt;" in page and "toy<&>" not in page
    assert page.count('class="card"') == 2 * 2 and "Component 2" in page and "Component 3" not in page
    for name in ("rgb@32", "tok_rgb@32", "caption", "det", "station"):
        assert page.count(f'title="{name}"') == 2 * 2
    assert page.count("background-image") == 2 * 2, "every picture once"
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    again = tmp_path / "again.html"
    main([str(config), "--out", str(again), *words, "--samples", "2", "--draws", "50"])
    assert again.read_text() == page, "a function of its seed"


def test_tokens_with_a_tokenizer_are_pictures(config, tmp_path):
    codebook = PatchCodebook(PatchCodebookConfig("rgb", 256, 16, 3, 32))
    codebook.codebook.normal_(generator=torch.Generator().manual_seed(0))
    codebook.save(tmp_path / "codebooks" / "rgb")
    words = ["--text_tokenizer_path", f"{tmp_path}/words.json", "--samples", "1", "--draws", "10"]
    pages = []
    for number, more in enumerate(([], ["--tokenizers", f"{tmp_path}/codebooks"])):
        main([str(config), "--out", f"{tmp_path}/{number}.html", *words, *more])
        pages.append(Path(f"{tmp_path}/{number}.html").read_text())
    uris = [re.findall(r"url\((data:[^)]*)\)", page) for page in pages]
    assert len(uris[0]) == len(uris[1]) == 2 and len(set(uris[0]) & set(uris[1])) == 1, "rgb itself is the same"


def test_features_are_decoded_as_in_generation_and_vectors_are_shown_by_their_ids(all_kinds, tmp_path):
    toy(**FEATURES | {"codebook_size": 8192}, modality="CLIP-B16").save(tmp_path / "learned/clip")
    toy(**GLOBAL | {"codebook_size": 8192}, modality="DINOv2-B14-global").save(tmp_path / "learned/dinov2_global")
    tokenizers = load_tokenizers(tmp_path / "learned")
    paint, paint_ids = _painter(tokenizers), _painter({})
    ids = torch.arange(196) * 40
    clip, vector = (MODALITY_INFO[name] for name in ("tok_clip@224", "tok_dinov2_global"))
    features = tokenizers["clip"].decode_pictures(ids.view(1, 14, 14))[0].permute(1, 2, 0).numpy()
    expected = (pca_picture(features).clip(0, 1) * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(paint(clip, ids), expected)
    np.testing.assert_array_equal(paint(vector, ids[:16]), paint_ids(vector, ids[:16]))
    out = tmp_path / "page.html"
    assert main([str(all_kinds), "--out", str(out), "--draws", "5", "--tokenizers", f"{tmp_path}/learned"]) == 0
    assert out.read_text().count("background-image") == 3 * 4


def test_shards_and_validation(config, tmp_path):
    content = yaml.safe_load(config.read_text())
    toy = content["train"]["datasets"].pop("toy<&>")
    names = "rgb@32-tok_rgb@32-caption-det"
    shards = write_shards(tmp_path / "s", 2, 3)
    content["train"]["datasets"]["toy"] = toy | {
        "in_domains": names,
        "out_domains": names[7:],
        "data_path": shards,
        "use_wds": True,
        "wds_n_repeats": 4,
    }
    content["val"] = {"datasets": {"toy": {"data_path": f"{tmp_path}/f", "use_wds": False}}}
    config.write_text(yaml.safe_dump(content))
    for split in ("train", "val"):
        out = tmp_path / f"{split}.html"
        words = ["--text_tokenizer_path", f"{tmp_path}/words.json", "--draws", "10"]
        main([str(config), "--out", str(out), "--split", split, *words, "--samples", "50"])
        assert out.read_text().count('class="card"') == 2 * 6, "a data set may have fewer than asked for"


def test_records_of_all_files_and_all_sources_are_shown(config, tmp_path):
    content = yaml.safe_load(config.read_text())
    for part in range(2):
        (tmp_path / f"{part}.jsonl").write_text(f'{{"text": "crop s{part}"}}\n')
    content["train"]["datasets"]["text"] = {
        "type": "huggingface",
        "data_path": f"{tmp_path}/{{0..1}}.jsonl",
        "in_domains": "caption",
        "out_domains": "caption",
        "input_alphas": 1.0,
        "target_alphas": 1.0,
    }
    config.write_text(yaml.safe_dump(content))
    out = tmp_path / "page.html"
    main([str(config), "--out", str(out), "--text_tokenizer_path", f"{tmp_path}/words.json", "--draws", "10"])
    page = out.read_text()
    assert "<h2>toy&lt;&amp;&gt;</h2>" in page and "<h2>text</h2>" in page
    for part in range(2):
        assert f"<b>{tmp_path}/{part}.jsonl: record 1</b>" in page, "keys may be the same"


def test_a_transfer_is_one_component_with_all_tokens(config, tmp_path):
    content = yaml.safe_load(config.read_text())
    transfer = {"masking": "transfer", "in_domains": "rgb@32", "out_domains": "tok_rgb@32-caption"}
    transfer["num_target_tokens"] = 300
    content["train"]["datasets"]["toy<&>"].update(transfer)
    config.write_text(yaml.safe_dump(content))
    (component,) = drawn(config).components
    assert component.share == 1
    for shown in component.masked_samples:
        assert shown["rgb@32"].inputs == shown["tok_rgb@32"].targets == 4 and not shown["tok_rgb@32"].inputs
        roles = [piece.role for piece in shown["caption"].pieces]
        assert "target" in roles and "input" not in roles
    out = tmp_path / "page.html"
    main([str(config), "--out", str(out), "--text_tokenizer_path", f"{tmp_path}/words.json", "--draws", "10"])
    assert "all of in_domains is input" in out.read_text() and "target mean 4.0, 0% none" in out.read_text()


def test_the_page_does_not_tell_signatures(config):
    result = drawn(config, samples=1, draws=10)
    signed = replace(result.dataset, data_path="https://me:do-not-tell@host/a.tar?token=do-not-tell")
    html = page("toy", [replace(result, dataset=signed)])
    assert "https://host/a.tar<br>" in html and "do-not-tell" not in html


@pytest.mark.parametrize("module", ["fourm.tools.preview", "fourm.data.preview"])
def test_the_command(config, tmp_path, module):
    command = [warm_python(), "-m", module, str(config), "--out", f"{tmp_path}/page.txt"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == f"error: 'out' must end with .html, not {tmp_path}/page.txt\n"


def test_bad_options_are_one_line(config, tmp_path):
    for options, message in (
        (["--datasets", "other"], r"no data set 'other' in train, only toy<&>"),
        (["--tokenizers", f"{tmp_path}/none"], "none has no folder with a config.json"),
        (["--samples", "0"], "'samples' must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(config), "--out", f"{tmp_path}/page.html", *options])


def test_another_file_is_not_overwritten(config, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("<p>mine</p>")
    with pytest.raises(UserError, match=f"{out} exists and is not a preview"):
        main([str(config), "--out", str(out), "--draws", "5"])
    assert out.read_text() == "<p>mine</p>"
