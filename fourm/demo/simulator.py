"""Render scenes on the CPU: colour with shadows, exact depth, and instance masks.

The renderer is pybullet's TinyRenderer, a rasteriser without antialiasing: depth and mask of a pixel belong to the
surface at its centre.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import reduce
from PIL import Image

from fourm.demo.camera import Camera
from fourm.demo.scene import GROUNDS, PAINTS, TOYS, Placement, Scene
from fourm.utils.dependencies import optional_import

FIELD_OF_VIEW = 45.0
NEAR, FAR = 0.05, 3.0  # metres
LOOK_AT = (0.0, 0.0, 0.04)
SHADOW = 0.5  # fraction of the light that reaches the ground in shadow


@dataclass(frozen=True)
class View:
    """A rendered view of a scene.

    Attributes:
        scene: The scene.
        camera: The camera.
        rgb: Colours (S, S, 3) uint8, antialiased.
        depth: Distances (S, S) float32 along the optical axis in metres.
        instances: Indices (S, S) int16 into ``scene.toys``; −1 is the ground.
    """

    scene: Scene
    camera: Camera
    rgb: np.ndarray
    depth: np.ndarray
    instances: np.ndarray


class Simulator:
    """A physics world that contains every toy once, invisible until a scene uses it. It is a context manager."""

    def __init__(self) -> None:
        with optional_import("pybullet", "rendering the demo's scenes", "'.[demo]'"):
            with _quiet():
                import pybullet
            import pybullet_data
        with optional_import("scikit-image", "rendering the demo's scenes", "'.[demo]'"):
            import skimage.data
        self._p: Any = pybullet
        with _quiet(), tempfile.TemporaryDirectory() as folder:
            self._client = pybullet.connect(pybullet.DIRECT)
            pybullet.setAdditionalSearchPath(pybullet_data.getDataPath(), physicsClientId=self._client)
            self._body = {name: self._load(toy.file, toy.scale) for name, toy in TOYS.items()}
            self._ground = self._load("plane.urdf", 0.4)
            self._texture = {}
            for name, ground in GROUNDS.items():
                path = str(Path(folder) / f"{name}.png")
                photograph = Image.fromarray(getattr(skimage.data, ground.photograph)()).convert("RGB")
                photograph.resize((512, 512)).save(path)
                self._texture[name] = self._call("loadTexture", path)
        # The links of each toy with their original colours.
        self._link_colors = {
            name: [(shape[1], shape[7][:3]) for shape in self._call("getVisualShapeData", body)]
            for name, body in self._body.items()
        }
        self._hide_ground()
        for name in TOYS:
            self._paint(name, 0)
        self.footprint: dict[str, float] = {}  # toy → radius in metres of the circle that it covers
        self._base_point: dict[str, tuple[float, float, float]] = {}  # toy → its point that is placed at (x, y, 0)
        for name in TOYS:
            self.footprint[name], self._base_point[name] = self._measure(name)

    def render(self, scene: Scene, size: int) -> View:
        """Render the scene at ``size`` × ``size`` pixels; the result depends on the arguments only."""
        ground = GROUNDS[scene.ground]
        x, y, yaw = scene.ground_pose
        texture = self._texture[scene.ground]
        self._call("changeVisualShape", self._ground, -1, textureUniqueId=texture, rgbaColor=(*ground.tint, 1))
        self._place(self._ground, (x, y, 0), (0, 0, 0), yaw)
        for toy in scene.toys:
            self._paint(toy.name, 1, toy.paint)
            self._stand(toy)
        yaw, pitch, distance = scene.camera
        camera = Camera.orbit(LOOK_AT, yaw, pitch, distance, field_of_view=FIELD_OF_VIEW, near=NEAR, far=FAR)
        # Depth and masks need one surface per pixel; colour is rendered at twice the resolution and averaged.
        _, depth, bodies = self._shoot(camera, size)
        rgb, *surfaces = self._shoot(camera, 2 * size, scene.light)
        lit = np.where(self._in_shadow(camera, *surfaces, light=scene.light)[..., None], SHADOW, 1) * rgb
        instances = np.full((size, size), -1, np.int16)
        for index, toy in enumerate(scene.toys):
            instances[bodies == self._body[toy.name]] = index
            self._paint(toy.name, 0)
        rgb = reduce(lit, "(h 2) (w 2) c -> h w c", "mean").round().astype(np.uint8)
        return View(scene, camera, rgb, depth, instances)

    def close(self) -> None:
        self._call("disconnect")

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, function: str, *args: Any, **options: Any) -> Any:
        return getattr(self._p, function)(*args, physicsClientId=self._client, **options)

    def _load(self, file: str, scale: float) -> int:
        if file.endswith(".sdf"):
            return self._call("loadSDF", file, globalScaling=scale)[0]
        return self._call("loadURDF", file, globalScaling=scale)

    def _place(self, body: int, position: tuple[float, ...], upright: tuple[float, ...], yaw: float) -> None:
        turn = self._p.getQuaternionFromEuler
        spin, stand = turn((0, 0, math.radians(yaw))), turn(tuple(map(math.radians, upright)))
        _, orientation = self._p.multiplyTransforms((0, 0, 0), spin, (0, 0, 0), stand)
        self._call("resetBasePositionAndOrientation", body, position, orientation)

    def _stand(self, toy: Placement) -> None:
        """Place the middle of the toy over (x, y), and its lowest point on the ground."""
        x, y, z = self._base_point[toy.name]
        cos, sin = math.cos(math.radians(toy.yaw)), math.sin(math.radians(toy.yaw))
        position = (toy.x - cos * x + sin * y, toy.y - sin * x - cos * y, -z)
        self._place(self._body[toy.name], position, TOYS[toy.name].upright, toy.yaw)

    def _paint(self, name: str, alpha: float, paint: str | None = None) -> None:
        """Paint a toy (None for its original colours); the renderer omits toys with ``alpha`` 0."""
        for link, colour in self._link_colors[name]:
            rgb = colour if paint is None else PAINTS[paint]
            self._call("changeVisualShape", self._body[name], link, rgbaColor=(*rgb, alpha))

    def _hide_ground(self) -> None:
        self._call("changeVisualShape", self._ground, -1, rgbaColor=(1, 1, 1, 0))

    def _measure(self, name: str) -> tuple[float, tuple[float, float, float]]:
        """Return a toy's footprint radius, and its point that is placed at (x, y, 0).

        They are measured in two nearly parallel projections, because collision shapes do not cover all parts.
        """
        size, half, distance = 256, 0.35, 50.0
        optics = {"field_of_view": 2 * math.degrees(math.atan(half / distance)), "near": 45.0, "far": 55.0}
        self._paint(name, 1)
        self._place(self._body[name], (0, 0, 0), TOYS[name].upright, 0)

        def silhouette(pitch: float) -> np.ndarray:
            bodies = self._shoot(Camera.orbit((0, 0, 0), 0, pitch, distance, **optics), size)[2]
            rows, columns = np.nonzero(bodies == self._body[name])
            return np.stack([columns + 0.5 - size / 2, size / 2 - rows - 0.5]) * 2 * half / size

        above = silhouette(89.99)  # from above, the axes are the world's x and y
        bottom = silhouette(0)[1].min()
        x, y = (above.min(axis=1) + above.max(axis=1)) / 2
        radius = np.hypot(above[0] - x, above[1] - y).max() + half / size
        self._paint(name, 0)
        return float(radius), (float(x), float(y), float(bottom) - half / size)

    def _shoot(
        self, camera: Camera, size: int, light: tuple | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return colour (S, S, 3), depth (S, S) in metres and body ids (S, S)."""
        near, far = camera.near, camera.far
        projection = list(self._p.computeProjectionMatrixFOV(camera.field_of_view, 1, near, far))
        # The rasteriser samples the lower left corners of pixels: shift the picture so that it samples their centres.
        projection[8] = 1 / size
        projection[9] = 1 / size
        _, _, rgb, buffer, bodies = self._call(
            "getCameraImage",
            size,
            size,
            camera.matrix.T.ravel().tolist(),
            projection,
            lightDirection=light or (0, 0, 1),
            shadow=0,
            renderer=self._p.ER_TINY_RENDERER,
        )
        buffer = np.reshape(buffer, (size, size)).astype(np.float64)
        depth = far * near / (far - (far - near) * buffer)
        rgb = np.reshape(rgb, (size, size, 4))[..., :3].astype(np.uint8)
        return rgb, depth.astype(np.float32), np.reshape(bodies, (size, size))

    def _in_shadow(self, camera: Camera, depth: np.ndarray, bodies: np.ndarray, *, light: tuple) -> np.ndarray:
        """Return which pixels (S, S) show ground in shadow; the renderer's own shadows are barely visible."""
        size, distance = 256, 2.0
        eye = tuple(distance * np.array(light) / np.linalg.norm(light))
        lamp = Camera(eye, (0, 0, 0), field_of_view=24.0, near=1.0, far=4.0)
        self._hide_ground()  # it casts no shadows, and takes time to render
        _, nearest, _ = self._shoot(lamp, size)
        rows, columns, distances = lamp.project(camera.world_points(depth), size)
        inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size) & (bodies == self._ground)
        shadow = np.zeros(depth.shape, bool)
        shadow[inside] = distances[inside] > nearest[rows[inside].astype(int), columns[inside].astype(int)] + 0.01
        return shadow


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages of the C++ library about itself and its meshes."""
    sys.stdout.flush()
    streams = {number: os.dup(number) for number in (1, 2)}
    with open(os.devnull, "w") as null:
        for number in streams:
            os.dup2(null.fileno(), number)
    try:
        yield
    finally:
        for number, saved in streams.items():
            os.dup2(saved, number)
            os.close(saved)
