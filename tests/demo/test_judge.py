"""The judge learns to see toys, and counts those that captions name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import demo_model
from fourm.demo.judge import (
    SIZE,
    Judge,
    JudgeOptions,
    augment,
    objects_in_segmentation,
    score_scenes,
    train_judge,
)
from fourm.demo.scene import CLASSES
from fourm.generation import Decoded
from fourm.utils.errors import UserError

COLORS = {"cup": (200, 30, 30), "duck": (230, 210, 40)}


def draw(names, rng):
    """Draw squares of 12 pixels, whose colours tell the toys, on noise."""
    picture = rng.integers(60, 120, (SIZE, SIZE, 3)).astype(np.uint8)
    classes = np.zeros((SIZE, SIZE), np.uint8)
    for index, name in enumerate(names):
        top, left = rng.integers(0, SIZE - 12), 32 * index + rng.integers(0, 20)
        picture[top : top + 12, left : left + 12] = COLORS[name]
        classes[top : top + 12, left : left + 12] = CLASSES.index(name)
    return picture, classes


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    named = [["cup"], ["duck"], ["cup", "duck"], []] * 11
    drawn = [draw(names, rng) for names in named]
    return np.stack([d[0] for d in drawn]), np.stack([d[1] for d in drawn]), [set(names) for names in named]


@pytest.fixture(scope="module")
def judge(pictures):
    losses = []
    options = JudgeOptions(epochs=6, batch_size=8, lr=5e-3)
    judge = train_judge(pictures[0][:36], pictures[1][:36], options, lambda epoch, loss: losses.append(loss))
    assert len(losses) == 6 and losses[-1] < losses[0] / 3
    return judge


def test_the_judge_learns_from_true_pictures_and_is_saved(judge, pictures, tmp_path):
    seen = judge.objects(pictures[0][36:], batch_size=3)
    assert sum(a == b for a, b in zip(seen, pictures[2][36:], strict=True)) >= 7, seen
    judge.save(tmp_path / "new" / "judge.safetensors")
    assert Judge.load(tmp_path / "new" / "judge.safetensors").objects(pictures[0]) == judge.objects(pictures[0])
    (tmp_path / "text").write_text("no judge")
    for name in ("text", "nothing"):
        with pytest.raises(UserError, match=f"{name} does not hold the weights of a judge"):
            Judge.load(tmp_path / name)


def test_pictures_and_classes_are_augmented_alike(pictures):
    rng = np.random.default_rng(1)
    marked = torch.zeros(2, 3, SIZE, SIZE) - 1
    classes = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    marked[:, :, 20:32, 8:24], classes[:, 20:32, 8:24] = 1, 3
    moved = set()
    for _ in range(8):
        picture, ids = augment(marked, classes, rng)
        assert picture.shape == marked.shape and ids.dtype == torch.uint8 and picture.min() >= -1 and picture.max() <= 1
        inside = picture.mean(1)[ids == 3]
        assert (ids == 3).sum() == 2 * 12 * 16 and inside.mean() > 0.2 > picture.mean(1)[ids == 0].mean() + 1
        moved.add(tuple(torch.nonzero(ids[0] == 3)[0].tolist()))
    assert len(moved) > 4


def test_objects_are_counted_in_rgb_segmentation_and_boxes(pictures, judge):
    classes = np.zeros((SIZE, SIZE), int)
    classes[0, :16], classes[1, :17], classes[2, 0] = CLASSES.index("cup"), CLASSES.index("duck"), -1
    assert objects_in_segmentation(classes) == {"duck"}, "16 of 4096 pixels are less than 0.4 %"
    boxes = [{"boxes": [0, 0, 1, 1], "class_name": name} for name in ("cup", "cup", "robot")]
    scenes = [
        {"semseg": Decoded("semseg", classes), "det": Decoded("det", boxes)},
        {"semseg": Decoded("semseg", classes * 0), "det": Decoded("det", [])},
    ]
    segmentation, of_boxes = score_scenes(scenes, [{"duck", "cup"}, {"car"}], "generated", judge)
    assert (segmentation.modality, segmentation.precision, segmentation.recall) == ("segmentation", 1, 1 / 3)
    assert (of_boxes.modality, of_boxes.precision, of_boxes.recall) == ("boxes", 1 / 2, 1 / 3)


def test_the_benchmark_trains_the_judge_and_measures_the_shipped_model(tmp_path, pictures, capsys):
    texts = {"det": {"instances": []}, "color_palette": [{"7": [[1, 2, 3]]}], "metadata": {"brightness": 1}}
    for index in range(3):
        grey = pictures[0][index, ..., 0]
        files = {"rgb": pictures[0][index], "depth": grey.astype(np.uint16), "normal": pictures[0][index]}
        files |= {"semseg": pictures[1][index], "canny_edge": (grey > 100) * np.uint8(255)}
        for name, value in files.items():
            (tmp_path / "val" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(value).save(tmp_path / "val" / name / f"{index}.png")
        for name, value in {**texts, "caption": None}.items():
            (tmp_path / "val" / name).mkdir(parents=True, exist_ok=True)
            if value is None:
                (tmp_path / "val" / name / f"{index}.txt").write_text(
                    f"a yellow duck and a {('red', 'blue')[index % 2]} cup"
                )
            else:
                (tmp_path / "val" / name / f"{index}.json").write_text(json.dumps(value))
    common = ["--judge", str(tmp_path / "judge.safetensors"), "--data", str(tmp_path / "val")]
    demo_model.main([*common, "--train_judge", str(tmp_path / "val"), "--epochs", "1"])
    *_, line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["source"] == "true renders"
    demo_model.main([*common, "--out", str(tmp_path / "out"), "--captions", "2", "--batch_size", "2", "--sheet", "1"])
    content = json.loads((tmp_path / "out" / "scores.json").read_text())
    rows = [(score["modality"], score["source"]) for score in content["scores"]]
    sources = {modality: [source for name, source in rows if name == modality] for modality, _ in rows}
    assert sources == {
        "RGB": ["generated", "true renders", "tokens of the truth"],
        "segmentation": ["generated", "tokens of the truth"],
        "boxes": ["generated"],
        "guess": ["another caption"],
    }
    assert content["captions"] == 2 and all(0 <= score["precision"] <= 1 for score in content["scores"])
    assert content["scores"][-1]["recall"] == 1, "both captions name the same objects"
    assert Image.open(tmp_path / "out" / "sheet.png").width > 1000
