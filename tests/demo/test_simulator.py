"""Ground truth is exact: geometry is recovered from the rendered depth, and all outputs agree."""

import re

import numpy as np
import pytest

pytest.importorskip("pybullet")

from fourm.demo import annotations as note
from fourm.demo.camera import Camera
from fourm.demo.scene import TOYS, Placement, Scene, draw_scene
from fourm.demo.simulator import Simulator
from fourm.utils.seeds import generator

SIZE = 64


@pytest.fixture(scope="module")
def simulator():
    with Simulator() as simulator:
        yield simulator


def _scene(*toys, camera=(25.0, 40.0, 0.7)):
    return Scene(toys, "gravel", (0.1, 0.0, 30.0), camera, (-1.0, -0.3, 1.2))


@pytest.fixture(scope="module")
def views(simulator):
    return [simulator.render(draw_scene(generator(3, i), simulator.footprint), SIZE) for i in range(8)]


def test_a_camera_projects_back_to_where_a_pixel_came_from():
    camera = Camera.orbit((0.1, 0.0, 0.05), 70, 35, 0.8, field_of_view=45.0, near=0.1, far=2.0)
    rows, columns, depth = camera.project(camera.world_points(np.full((8, 8), 0.6)), 8)
    centres = np.mgrid[:8, :8] + 0.5
    np.testing.assert_allclose([rows, columns], centres, atol=1e-9)
    np.testing.assert_allclose(depth, 0.6)


@pytest.mark.parametrize("camera", [(0.0, 35.0, 0.65), (140.0, 57.0, 0.85)])
def test_depth_puts_the_ground_at_zero_and_a_ball_on_its_radius(simulator, camera):
    view = simulator.render(_scene(Placement("sports ball", None, 0.05, -0.04, 10.0), camera=camera), SIZE)
    points = view.camera.world_points(view.depth.astype(np.float64))
    ground = view.instances == -1
    assert np.abs(points[ground][:, 2]).max() < 2e-5  # metres
    radius = np.linalg.norm(points[~ground] - (0.05, -0.04, 0.06), axis=1)  # a ball of 12 cm
    assert abs(radius.mean() - 0.06) < 5e-4 and radius.std() < 5e-4


def test_every_toy_stands_on_the_ground_at_its_place(simulator):
    for name in TOYS:
        view = simulator.render(_scene(Placement(name, None, 0.06, -0.03, 200.0), camera=(0.0, 2.0, 0.8)), 2 * SIZE)
        points = view.camera.world_points(view.depth.astype(np.float64))[view.instances == 0]
        assert abs(points[:, 2].min()) < 0.006, name
        assert np.hypot(points[:, 0] - 0.06, points[:, 1] + 0.03).max() < simulator.footprint[name] + 0.01, name


def test_drawn_toys_do_not_touch(simulator):
    for i in range(50):
        toys = draw_scene(generator(i), simulator.footprint).toys
        assert 1 <= len(toys) <= 5 and len({toy.name for toy in toys}) == len(toys)
        for a in toys:
            for b in toys:
                gap = np.hypot(a.x - b.x, a.y - b.y) - simulator.footprint[a.name] - simulator.footprint[b.name]
                assert a is b or gap > 0


def test_normals_agree_with_the_geometry(simulator):
    view = simulator.render(_scene(Placement("sports ball", None, 0.0, 0.0, 0.0)), SIZE)
    normal = note.normals(view.depth.astype(np.float64), view.camera)
    np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1)
    world = normal @ view.camera.matrix[:3, :3]
    assert (world[view.instances == -1] @ (0, 0, 1)).min() > 0.999
    outward = view.camera.world_points(view.depth.astype(np.float64)) - (0, 0, 0.06)
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    ball = view.instances == 0
    assert np.median((world * outward).sum(-1)[ball]) > 0.97
    assert normal[..., 2].mean() > 0  # facing the viewer


def test_boxes_are_tight_around_the_masks(views):
    for view in views:
        for seen in note.visible_toys(view):
            mask = view.instances == view.scene.toys.index(seen.toy)
            xmin, ymin, xmax, ymax = (round(c * SIZE) for c in seen.box)
            inside = np.zeros_like(mask)
            inside[ymin:ymax, xmin:xmax] = True
            assert not mask[~inside].any()
            edges = (mask[ymin], mask[ymax - 1], mask[:, xmin], mask[:, xmax - 1])
            assert all(edge.any() for edge in edges)


def test_segmentation_boxes_and_caption_name_the_same_things(views):
    for i, view in enumerate(views):
        seen = note.visible_toys(view)
        names = {s.toy.name for s in seen}
        ids = np.unique(note.class_ids(view))
        assert {note.CLASSES[i] for i in ids} - {"ground"} == names
        assert {box["class_name"] for box in note.detections(seen)["instances"]} == names
        for variant in range(8):
            words = note.caption(seen, view.scene.ground, generator(i, variant))
            assert all(s.phrase in words for s in seen)
            rest = words
            for name in sorted(names, key=len, reverse=True):  # "robot arm" before "robot"
                rest = rest.replace(name, "")
            assert not any(re.search(rf"\b{name}\b", rest) for name in TOYS)


def test_a_caption_names_toys_from_left_to_right(simulator):
    # Seen from −y, x points right.
    left, right = Placement("cup", "red", -0.15, 0.0, 0.0), Placement("cube", "blue", 0.15, 0.0, 0.0)
    seen = note.visible_toys(simulator.render(_scene(right, left, camera=(0.0, 40.0, 0.8)), SIZE))
    texts = {note.caption(seen, "grass", generator(i)) for i in range(30)}
    assert len(texts) == 4
    assert all(0 <= text.index("a red cup") < text.index("a blue cube") for text in texts)


def test_scenes_with_hidden_or_tiny_toys_are_not_clear(simulator):
    cube, behind = Placement("cube", "red", 0.0, -0.1, 0.0), Placement("cup", "red", 0.0, 0.02, 0.0)
    assert note.is_clear(simulator.render(_scene(cube, camera=(0.0, 35.0, 0.7)), SIZE))
    assert not note.is_clear(simulator.render(_scene(cube, behind, camera=(0.0, 5.0, 0.7)), SIZE))
    assert not note.is_clear(simulator.render(_scene(cube, camera=(0.0, 35.0, 2.5)), SIZE))


def test_rendering_depends_on_nothing_but_the_scene(simulator, views):
    scene = views[2].scene
    with Simulator() as fresh:
        again = fresh.render(scene, SIZE)
    np.testing.assert_array_equal(again.rgb, views[2].rgb)
    np.testing.assert_array_equal(again.depth, views[2].depth)
    np.testing.assert_array_equal(again.instances, views[2].instances)


def test_a_toy_shades_the_ground(simulator):
    empty = simulator.render(_scene(), SIZE)
    toy = simulator.render(_scene(Placement("cube", "red", 0.0, 0.0, 0.0)), SIZE)
    ground = toy.instances == -1
    darker = toy.rgb[ground].mean(-1) < 0.7 * empty.rgb[ground].mean(-1)
    assert 0.005 < darker.mean() < 0.3


def test_metadata_and_palette_describe_the_picture(simulator):
    view = simulator.render(_scene(Placement("cup", "red", 0.0, 0.0, 0.0), Placement("cube", "blue", 0.2, 0, 0)), SIZE)
    seen = note.visible_toys(view)
    facts = note.metadata(view, seen, note.normals(view.depth, view.camera), "a cup. a cube")
    assert (facts["original_width"], facts["caption_n_words"], facts["caption_n_sentences"]) == (SIZE, 4, 2)
    assert (facts["n_coco_instances"], facts["coco_instance_diversity"], facts["semantic_diversity"]) == (1, 1, 3)
    assert facts["walkability"] == pytest.approx((view.instances < 0).mean(), abs=1e-4)
    half = np.zeros((SIZE, SIZE, 3), np.uint8)
    half[: SIZE // 4] = (250, 10, 10)
    (palettes,) = note.color_palette(half)
    assert palettes["2"] == [[0, 0, 0], [250, 10, 10]]
    assert [len(palettes[str(n)]) for n in range(1, 8)] == list(range(1, 8))
