"""Every kind of result can be drawn, and contact sheets share colours and legends where they should."""

import subprocess

import numpy as np
import pytest
from PIL import Image

from fourm.generation import Decoded, as_image, plot
from fourm.generation.decoding import DECODERS
from fourm.generation.plotting import IMAGES, PLOTTERS
from fourm.generation.sequences import SEQUENCES
from fourm.utils.errors import UserError
from tests.warm_python import warm_python

RNG = np.random.default_rng(0)
VALUES = {
    "rgb": RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8),
    "depth": RNG.normal(size=(16, 16)),
    "normal": RNG.uniform(-1, 1, (16, 16, 3)),
    "semseg": RNG.integers(-1, 3, (16, 16)),
    "semseg_coco": RNG.integers(-1, 3, (16, 16)),
    "canny_edge": RNG.random((16, 16)),
    "sam_edge": RNG.random((16, 16)),
    "tokens": RNG.integers(-1, 50, (4, 4)),
    "feature": RNG.normal(size=(4, 4, 9)),
    "caption": "a cup " * 200,
    "det": [{"boxes": [0.1, 0.2, 0.5, 0.9], "class_name": "cup"}, {"boxes": [0, 0, 1, 1], "class_name": "duck"}],
    "sam_instance": [{"point": [3, 200], "polygons": [{"box": [0.1, 0.2, 0.5, 0.9], "codes": [1] * 16}]}],
    "color_palette": [[255, 0, 0], [1, 2, 3]],
    "metadata": {"brightness": 17.5, "n_humans": 2},
    "human_poses": [{"box": [0, 0, 1, 1], "pose": [1] * 8}],
    "scalar": 12.5,
    "vectors": np.zeros((3, 9)),
    "vector": RNG.normal(size=9),
}
NOTHING = {
    "caption": "",
    "det": [],
    "sam_instance": [],
    "color_palette": [],
    "metadata": {},
    "human_poses": [],
    "scalar": None,
}
NOTHING |= {"vector": np.full(9, np.nan)}
NOTHING |= {"depth": np.full((4, 4), np.nan), "semseg": np.full((4, 4), -1), "tokens": np.full((1, 1), -1)}


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_everything_that_can_be_decoded_can_be_plotted():
    assert {*DECODERS, *SEQUENCES, "scalar", "tokens", "vectors"} == {*IMAGES, *PLOTTERS} == set(VALUES)


@pytest.mark.parametrize("values", [VALUES, NOTHING])
def test_a_sheet_of_everything_is_drawn(values, tmp_path):
    figure = plot({name: Decoded(name, value, 3) for name, value in values.items()}, "all of it")
    figure.savefig(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert len(figure.axes) == len(values)


@pytest.mark.parametrize("kind", IMAGES)
def test_pictures_have_three_channels_of_eight_bits(kind):
    image = as_image(Decoded(kind, VALUES[kind]))
    assert image.dtype == np.uint8
    assert image.shape == (*VALUES[kind].shape[:2], 3)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 1
    assert as_image(Decoded("caption", "a cup")) is None


def test_near_and_far_differ_in_colour_and_unknown_depth_is_grey():
    depth = np.linspace(0, 1, 16).reshape(4, 4)
    depth[0, 0] = np.nan
    image = as_image(Decoded("depth", depth)).astype(int)
    assert abs(image[0, 1] - image[3, 3]).sum() > 150
    assert image[0, 0].tolist() == [128, 128, 128]


def test_features_that_are_alike_look_alike():
    values = np.zeros((2, 4, 6))
    values[:, 2:] = RNG.normal(size=6)
    image = as_image(Decoded("feature", values)).astype(int)
    assert (image[:, :2] == image[0, 0]).all() and (image[:, 2:] == image[0, 2]).all()
    assert abs(image[0, 0] - image[0, 2]).sum() > 100


def test_the_features_of_a_column_share_their_colours():
    a, b, c = RNG.normal(size=(3, 6))
    maps = [np.stack([[x, y]]) for x, y in ((a, b), (b, a), (c, a))]
    figure = plot([{"tok_net@32": Decoded("feature", values)} for values in maps])
    first, second, third = (axes.images[0].get_array() for axes in figure.axes)
    np.testing.assert_allclose(first[0, 0], second[0, 1])
    np.testing.assert_allclose(first[0, 0], third[0, 1])
    assert np.abs(first[0, 0] - third[0, 0]).sum() > 0.2
    ids = Decoded("tokens", np.array([[1, 2]]))  # of a sampler without the tokenizer
    tokens = plot([{"tok_net@32": Decoded("feature", maps[0])}, {"tok_net@32": ids}]).axes[1].images[0].get_array()
    np.testing.assert_array_equal(tokens, as_image(ids))


def test_a_sheet_names_its_columns_classes_and_what_is_missing():
    rows = [
        {
            "rgb@32": Decoded("rgb", VALUES["rgb"]),
            "tok_semseg@32": Decoded("semseg", np.array([[0, 1], [1, 5]]), names=("ground", "cup")),
            "det": Decoded("det", VALUES["det"], 1),
        },
        {"rgb@32": Decoded("rgb", VALUES["rgb"])},
    ]
    figure = plot(rows)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["rgb", "semseg", "det", "", "", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ground", "cup", "class 5"]
    assert figure.axes[2].get_xlabel() == "1 word left out"
    assert texts(figure) == ["cup", "duck"]
    assert [axes.get_title() for axes in plot({"rgb@32": rows[0]["rgb@32"], "tok_rgb@32": rows[0]["rgb@32"]}).axes] == [
        "rgb@32",
        "tok_rgb@32",
    ]


def test_boxes_are_drawn_where_they_are():
    figure = plot({"rgb": Decoded("rgb", VALUES["rgb"]), "det": Decoded("det", VALUES["det"][:1])})
    (box,) = figure.axes[1].patches
    np.testing.assert_allclose([*box.get_xy(), box.get_width(), box.get_height()], [1.1, 2.7, 6.4, 11.2])


def test_boxes_have_the_colours_of_the_segmentation():
    segmentation = Decoded("semseg", np.array([[0, 1, 2]]), names=("ground", "duck", "cup"))
    figure = plot({"semseg": segmentation, "det": Decoded("det", VALUES["det"][:1])})
    (box,) = figure.axes[1].patches
    np.testing.assert_allclose(np.array(box.get_edgecolor())[:3] * 255, as_image(segmentation)[0, 2])


def test_nothing_to_plot_is_an_error():
    with pytest.raises(UserError, match="no sample"):
        plot([])


def test_without_matplotlib_only_plotting_fails_and_says_what_to_install(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np\n"
        "from fourm.generation import Decoded, as_image, plot\n"
        "from fourm.utils.errors import MissingDependency\n"
        "assert as_image(Decoded('rgb', np.zeros((2, 2, 3), np.uint8))) is not None\n"
        "caption, depth = Decoded('caption', 'a cup'), Decoded('depth', np.eye(3))\n"
        "for draw in (lambda: plot({'caption': caption}), lambda: as_image(depth)):\n"
        "    try:\n        draw()\n"
        "    except MissingDependency as error:\n        print(error)"
    )
    result = subprocess.run([warm_python(), "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.stdout.count("pip install matplotlib") == 2, result.stderr


def test_the_titles_of_columns_are_not_cut_off(tmp_path):
    row = {
        "caption": Decoded("caption", "a red cup and a yellow duck on the grass"),
        "tok_rgb@32": Decoded("rgb", VALUES["rgb"]),
        "tok_depth@32": Decoded("depth", VALUES["depth"]),
        "tok_semseg@32": Decoded("semseg", np.zeros((32, 32), int), names=("ground",)),
    }
    plot([row] * 4).savefig(tmp_path / "sheet.png")
    picture = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert (picture[:2] == 255).all() and (picture[2:25] < 128).any()
