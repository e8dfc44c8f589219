"""A pinhole camera with a square picture, which maps between pixels, depths and points in space.

In the camera frame, x points right, y up and z towards the viewer. Pixel i covers [i, i + 1), so that its centre is
i + 0.5. Depth is the distance along the optical axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Camera:
    """A camera at ``eye`` that looks at ``target`` and sees depths between ``near`` and ``far``."""

    eye: tuple[float, float, float]
    target: tuple[float, float, float]
    field_of_view: float
    near: float
    far: float

    @classmethod
    def orbit(cls, target: tuple, yaw: float, pitch: float, distance: float, **optics: float) -> Camera:
        """Place a camera around ``target``; ``pitch`` is its elevation above the horizon in degrees, below 90."""
        yaw, pitch = math.radians(yaw), math.radians(pitch)
        direction = (math.cos(pitch) * math.sin(yaw), -math.cos(pitch) * math.cos(yaw), math.sin(pitch))
        eye = tuple(t + distance * d for t, d in zip(target, direction, strict=True))
        return cls(eye, target, **optics)

    @property
    def matrix(self) -> np.ndarray:
        """The transformation (4, 4) from the world to the camera frame."""
        back = np.subtract(self.eye, self.target)
        back = back / np.linalg.norm(back)
        right = np.cross((0.0, 0.0, 1.0), back)
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(back, right), back])
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = rotation, -rotation @ self.eye
        return matrix

    def focal(self, size: int) -> float:
        """Return the focal length in pixels for a picture of ``size`` × ``size`` pixels."""
        return size / 2 / math.tan(math.radians(self.field_of_view / 2))

    def points(self, depth: np.ndarray) -> np.ndarray:
        """Back-project a depth map (S, S) to points (S, S, 3) in the camera frame."""
        size = len(depth)
        rows, columns = np.mgrid[:size, :size] + 0.5
        scale = depth / self.focal(size)
        return np.stack([(columns - size / 2) * scale, (size / 2 - rows) * scale, -depth], axis=-1)

    def world_points(self, depth: np.ndarray) -> np.ndarray:
        """Back-project a depth map (S, S) to points (S, S, 3) in the world frame."""
        matrix = self.matrix
        return (self.points(depth) - matrix[:3, 3]) @ matrix[:3, :3]  # the inverse of a rotation is its transpose

    def project(self, points: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Project world points (..., 3) to rows and columns in (fractional) pixels and depths, each of shape (...)."""
        matrix = self.matrix
        x, y, z = np.moveaxis(points @ matrix[:3, :3].T + matrix[:3, 3], -1, 0)
        scale = self.focal(size) / -z
        return size / 2 - y * scale, size / 2 + x * scale, -z
