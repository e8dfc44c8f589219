"""Metrics of generated scenes, compared with values computed by hand."""

import numpy as np
import pytest

from fourm.demo import scores


def test_depth_error_does_not_depend_on_scale_and_shift():
    true = np.array([[1.0, 2.0], [4.0, 8.0]])
    assert scores.abs_rel(3 * true - 7, true) == pytest.approx(0, abs=1e-9)
    # The best constant c minimizes Σ (c/t − 1)²: c = Σ 1/t / Σ 1/t² = 1.875 / 1.328125.
    c = 1.875 / 1.328125
    assert scores.abs_rel(np.ones((2, 2)), true) == pytest.approx(np.abs(c / true - 1).mean())
    # A prediction that confuses far and near is worth no more than a constant.
    assert scores.abs_rel(-true, true) == pytest.approx(scores.abs_rel(np.ones((2, 2)), true))


def test_unknown_depth_does_not_count():
    true = np.array([[1.0, 2.0, np.nan]])
    assert scores.abs_rel(np.array([[1.0, 2.0, 50.0]]), true) == pytest.approx(0, abs=1e-9)
    assert scores.abs_rel(np.array([[1.0, 2.0, np.nan]]), np.array([[1.0, 2.0, 9.0]])) == pytest.approx(0, abs=1e-9)


def test_angle_between_normals():
    true = np.array([[[0, 0, 1.0], [0, 0, 1.0], [1.0, 0, 0]]])
    predicted = np.array([[[0, 0, 2.0], [1.0, 0, 1.0], [0, 0, 0]]])  # the last one is unknown
    assert scores.normal_angle(predicted, true) == pytest.approx(22.5)


def test_mean_iou_counts_over_all_pictures_and_classes_of_the_truth():
    true = [np.array([[0, 0, 1]]), np.array([[0, 2, 2]])]
    predicted = [np.array([[0, 1, 1]]), np.array([[0, 2, 5]])]
    # 0: 2 of 3, 1: 1 of 2, 2: 1 of 2; class 5 is no class of the truth.
    assert scores.mean_iou(predicted, true) == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)


def test_boxes_match_each_object_of_their_class_once():
    cup, duck = {"boxes": [0, 0, 1, 1], "class_name": "cup"}, {"boxes": [0, 0, 0.5, 0.5], "class_name": "duck"}
    near, far = {"boxes": [0, 0, 1, 0.6], "class_name": "cup"}, {"boxes": [0, 0, 1, 0.4], "class_name": "cup"}
    assert scores.box_precision_recall([[near, cup]], [[cup, duck]]) == (0.5, 0.5)  # the second cup matches none
    assert scores.box_precision_recall([[far]], [[cup]]) == (0, 0)
    assert scores.box_precision_recall([[{**cup, "class_name": "duck"}], []], [[cup], [duck]]) == (0, 0)
    assert scores.box_precision_recall([[]], [[]]) == (0, 0)
    assert scores.box_iou([0, 0, 1, 1], [0.5, 0, 1.5, 1]) == pytest.approx(1 / 3)


def test_object_names_are_whole_words_and_the_longest_match():
    names = ["robot", "robot arm", "cup"]
    true = ["a red robot arm and a cup", "a robot"]
    said = ["a robot arm on cups", "a robot, robot and a cup"]
    precision, recall, exact = scores.word_precision_recall(said, true, names)
    assert (precision, recall, exact) == (2 / 3, 2 / 3, 0)
    assert scores.word_precision_recall(true, true, names) == (1, 1, 1)
