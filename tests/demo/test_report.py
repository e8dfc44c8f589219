"""The report compares a loss with the entropy of exactly the tokens that it was computed on."""

import json
import math

import numpy as np
import pytest

from fourm.data.modality_info import Modality
from fourm.demo import report
from fourm.demo.report import ModalityResult


def test_entropy_of_tokens():
    assert report.token_entropy(np.repeat(np.arange(8), 5)) == pytest.approx(math.log(8))
    assert report.token_entropy(np.full(9, 3)) == 0


def test_targets_of_a_grid_are_its_unmasked_tokens():
    grid = Modality("tok_x@16", "img", vocab_size=9, input_size=16, patch_size=8)
    entry = {"tensor": np.arange(8).reshape(2, 2, 2), "target_mask": np.array([[1, 0, 1, 0], [1, 1, 1, 0]])}
    assert report.target_tokens(entry, grid).tolist() == [1, 3, 7]


def test_targets_of_a_sequence_are_predicted_by_the_previous_token():
    text = Modality("caption", "seq", vocab_size=99, max_tokens=2)
    entry = {
        "tensor": np.array([[5, 10, 11, 12, 0, 0], [5, 6, 20, 0, 0, 0]]),
        "target_mask": np.array([[1, 0, 0, 0, 1, 1], [1, 1, 0, 1, 1, 1]]),  # a lone token predicts nothing
    }
    assert report.target_tokens(entry, text).tolist() == [11, 12]


def test_only_modalities_that_must_be_learned_decide():
    good = [ModalityResult(f"{name}@64" if "tok" in name else name, 10, 2.0, 1.0) for name in report.MUST_LEARN]
    assert report.passed([*good, ModalityResult("tok_canny_edge@64", 10, 2.0, 5.0)])
    for i in range(len(good)):
        bad = ModalityResult(good[i].modality, 10, 2.0, 1.75)
        assert bad.verdict == "below" and not report.passed([*good[:i], bad, *good[i + 1 :]])
    assert ModalityResult("caption", 10, 2.0, 2.1).verdict == "NOT below"


def test_table_has_one_aligned_row_per_modality():
    lines = report.table({"tok_rgb@64": 3.0, "det": 1.0}, {"tok_rgb@64": (4.0, 700), "det": (2.0, 90)})
    assert [line.modality for line in lines] == ["det", "tok_rgb@64"]
    rows = report.markdown(lines).splitlines()
    assert len(rows) == 4 and len({len(row) for row in rows}) == 1
    assert [cell.strip() for cell in rows[2].split("|")[1:-1]] == [
        "det",
        "90",
        "2.000",
        "1.000",
        "0.50",
        "clearly below",
    ]


def test_log_is_split_into_training_and_fixed_evaluations(tmp_path):
    lines = [
        {"step": 10, "epoch": 0, "loss": 5.0},
        {
            "step": 12,
            "epoch": 0,
            "eval": {"a": {"train": {"per_modality": {"det": 1}}, "fixed": {"per_modality": {"det": 2}}}},
        },
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    training, evaluations = report.read_log(tmp_path)
    assert [line["loss"] for line in training] == [5.0]
    assert evaluations == [{"step": 12, "per_modality": {"det": 2}}]
