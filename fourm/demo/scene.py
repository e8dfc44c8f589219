"""Define scenes, which are toys on a photographed ground, and draw them at random.

The meshes come with the ``pybullet`` package and the grounds are photographs of scikit-image, so that nothing is
downloaded. Lengths are in metres and angles in degrees. The world's z axis points up and the ground is at z = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

ARENA_RADIUS = 0.24  # objects stand within this distance of the centre


@dataclass(frozen=True)
class Toy:
    """A kind of object.

    Attributes:
        file: Path of its mesh in ``pybullet_data``.
        scale: Factor by which the mesh is scaled.
        look: How captions describe its original colours; None to paint it in one of :data:`PAINTS`.
        upright: Euler angles that turn it upright.
        coco: Whether its name is a COCO class.
    """

    file: str
    scale: float
    look: str | None = None
    upright: tuple[float, float, float] = (0.0, 0.0, 0.0)
    coco: bool = False


TOYS: dict[str, Toy] = {
    "teddy bear": Toy("teddy_vhacd.urdf", 1.7, upright=(90, 0, 0), coco=True),
    "sports ball": Toy("soccerball.urdf", 0.12, "black and white", coco=True),
    "cup": Toy("objects/mug.urdf", 1.1, coco=True),
    "car": Toy("racecar/racecar.urdf", 0.5, coco=True),
    "bicycle": Toy("bicycle/bike.urdf", 0.09, upright=(90, 0, 0), coco=True),
    "duck": Toy("duck_vhacd.urdf", 1.6, "yellow", upright=(90, 0, 0)),
    "block": Toy("lego/lego.urdf", 3.2),
    "cube": Toy("cube.urdf", 0.09),
    "beach ball": Toy("sphere2.urdf", 0.12),
    "tray": Toy("tray/traybox.urdf", 0.3, "grey"),
    "table": Toy("table/table.urdf", 0.15, "wooden"),
    "stool": Toy("table_square/table_square.urdf", 0.22, "checkered"),
    "shelf": Toy("kiva_shelf/model.sdf", 0.1),
    "robot": Toy("r2d2.urdf", 0.2, "blue and white"),
    "robot arm": Toy("kuka_iiwa/model.urdf", 0.2),
    "robot dog": Toy("laikago/laikago_toes_zup_lores.urdf", 0.32, "black"),
    "rover": Toy("husky/husky.urdf", 0.2, "yellow and black"),
}
CLASSES = ("ground", *TOYS)  # class ids of the segmentation

PAINTS: dict[str, tuple[float, float, float]] = {
    "red": (0.82, 0.10, 0.10),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (0.95, 0.80, 0.10),
    "green": (0.10, 0.60, 0.15),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.50, 0.15, 0.65),
    "pink": (1.00, 0.55, 0.70),
    "white": (0.95, 0.95, 0.95),
}


@dataclass(frozen=True)
class Ground:
    """A ground: a photograph in ``skimage.data``, its phrase in captions, and a tint for grey photographs."""

    photograph: str
    phrase: str
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)


GROUNDS: dict[str, Ground] = {
    "brick": Ground("brick", "on a brick floor", (0.95, 0.62, 0.50)),
    "grass": Ground("grass", "on the grass", (0.55, 0.85, 0.40)),
    "gravel": Ground("gravel", "on gravel", (0.90, 0.88, 0.85)),
    "cat": Ground("chelsea", "on a picture of a cat"),
    "stars": Ground("hubble_deep_field", "on a carpet of stars"),
    "coffee": Ground("coffee", "on a picture of coffee"),
}


@dataclass(frozen=True)
class Placement:
    """A toy of a scene: its paint (None for its original colours), position and direction."""

    name: str
    paint: str | None
    x: float
    y: float
    yaw: float


@dataclass(frozen=True)
class Scene:
    toys: tuple[Placement, ...]
    ground: str
    ground_pose: tuple[float, float, float]  # x, y, yaw
    camera: tuple[float, float, float]  # yaw, height above the horizon (degrees), distance
    light: tuple[float, float, float]  # direction


def draw_scene(generator: np.random.Generator, footprint: Mapping[str, float]) -> Scene:
    """Draw two to five different toys that do not touch each other, a ground, a camera and a light.

    Args:
        generator: The random generator.
        footprint: Toy → radius of the circle that it covers.
    """
    names = generator.permutation(list(TOYS))[: generator.integers(2, 6)]
    toys: list[Placement] = []
    for name in map(str, names):
        # A toy for which no free position is found is left out; there always is one for the first toy.
        for _ in range(30):
            x, y = generator.uniform(-ARENA_RADIUS, ARENA_RADIUS, 2)
            free = all(math.hypot(x - t.x, y - t.y) > footprint[name] + footprint[t.name] for t in toys)
            if math.hypot(x, y) < ARENA_RADIUS and free:
                paint = str(generator.choice(list(PAINTS))) if TOYS[name].look is None else None
                toys.append(Placement(name, paint, x, y, generator.uniform(0, 360)))
                break
    uniform = generator.uniform
    return Scene(
        tuple(toys),
        str(generator.choice(list(GROUNDS))),
        ground_pose=(uniform(-0.3, 0.3), uniform(-0.3, 0.3), uniform(0, 360)),
        camera=(uniform(0, 360), uniform(34, 58), uniform(0.62, 0.85)),
        light=(uniform(-1, 1), uniform(-1, 1), uniform(0.7, 1.5)),
    )
