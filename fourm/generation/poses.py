"""People: decodes the codes of their poses to rotations of joints, and draws them as stick figures.

The joints and their order are those of SMPL (Loper et al., 2015), whose body pose is what the codes stand for. The
skeleton that the rotations bend has the average proportions of an adult, not those that a person's ``shape`` describes;
for those, and for a body with a surface, pass the rotations to an SMPL model.

Shapes: P people, J = 24 joints, the first of which is the pelvis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import ImageDraw

from fourm.data.transforms.instances import POSE_CODES
from fourm.generation.drawing import SIZE, canvas, color
from fourm.utils.errors import UserError
from fourm.vq import ImageTokenizer

_ROTATIONS = (23, 3, 3)

# Joint: (parent, offset from it). The person stands upright with the arms stretched out, and faces the viewer: x points
# to the person's left, y up and z forwards. The unit is the person's height. Lengths of segments are averages of
# anthropometry (Drillis & Contini, 1966): upper arm 0.186, forearm 0.146, thigh 0.245, shank 0.246, shoulder 0.129 from
# the middle of the body and 0.818 above the ground, eyes at 0.936.
_SKELETON: dict[str, tuple[str | None, tuple[float, float, float]]] = {
    "pelvis": (None, (0.0, 0.575, 0.0)),
    "left_hip": ("pelvis", (0.05, -0.045, 0.0)),
    "right_hip": ("pelvis", (-0.05, -0.045, 0.0)),
    "spine1": ("pelvis", (0.0, 0.06, 0.0)),
    "left_knee": ("left_hip", (0.0, -0.245, 0.0)),
    "right_knee": ("right_hip", (0.0, -0.245, 0.0)),
    "spine2": ("spine1", (0.0, 0.08, 0.0)),
    "left_ankle": ("left_knee", (0.0, -0.246, 0.0)),
    "right_ankle": ("right_knee", (0.0, -0.246, 0.0)),
    "spine3": ("spine2", (0.0, 0.03, 0.0)),
    "left_foot": ("left_ankle", (0.01, -0.035, 0.08)),
    "right_foot": ("right_ankle", (-0.01, -0.035, 0.08)),
    "neck": ("spine3", (0.0, 0.125, 0.0)),
    "left_collar": ("spine3", (0.04, 0.068, 0.0)),
    "right_collar": ("spine3", (-0.04, 0.068, 0.0)),
    "head": ("neck", (0.0, 0.066, 0.02)),
    "left_shoulder": ("left_collar", (0.089, 0.005, 0.0)),
    "right_shoulder": ("right_collar", (-0.089, 0.005, 0.0)),
    "left_elbow": ("left_shoulder", (0.186, 0.0, 0.0)),
    "right_elbow": ("right_shoulder", (-0.186, 0.0, 0.0)),
    "left_wrist": ("left_elbow", (0.146, 0.0, 0.0)),
    "right_wrist": ("right_elbow", (-0.146, 0.0, 0.0)),
    "left_hand": ("left_wrist", (0.05, 0.0, 0.0)),
    "right_hand": ("right_wrist", (-0.05, 0.0, 0.0)),
}
JOINTS = tuple(_SKELETON)
PARENTS = tuple(-1 if parent is None else JOINTS.index(parent) for parent, _ in _SKELETON.values())
_OFFSETS = np.array([offset for _, offset in _SKELETON.values()])
_UPRIGHT = np.diag([1.0, -1.0, -1.0])
"""The orientation of a person who stands and faces the camera, whose y axis points down and z axis away from it."""

_LEFT, _RIGHT = (214, 69, 65), (31, 119, 180)


def decode_poses(people: Sequence[dict[str, Any]], tokenizer: ImageTokenizer) -> tuple[list[dict[str, Any]], int]:
    """Add to each person with a pose its ``rotations``, (23, 3, 3) float32.

    Args:
        people: See :func:`fourm.generation.sequences.human_poses`.
        tokenizer: Tokenizer of poses.

    Returns:
        The people, and the number of dropped words: a pose with a code that the tokenizer does not have is left out.

    Raises:
        UserError: If the tokenizer is not one of poses.
    """
    if (tokenizer.num_channels, tokenizer.num_codebooks) != (207, POSE_CODES):
        raise UserError(
            f"the tokenizer of human_poses must decode {POSE_CODES} codes to 207 numbers, but it has "
            f"{tokenizer.num_codebooks} codebooks and {tokenizer.num_channels} channels"
        )
    people, dropped = [dict(person) for person in people], 0
    for person in people:
        if max(person.get("pose", [0])) >= tokenizer.vocab_size:
            del person["pose"]
            dropped += 1 + POSE_CODES
    posed = [person for person in people if "pose" in person]
    if posed:
        ids = torch.tensor([person["pose"] for person in posed])
        numbers = tokenizer.decode_pictures(tokenizer.to_grid(ids)).reshape(-1, *_ROTATIONS).numpy()
        for person, rotations in zip(posed, nearest_rotations(numbers), strict=True):
            person["rotations"] = rotations.astype(np.float32)
    return people, dropped


def nearest_rotations(matrices: np.ndarray) -> np.ndarray:
    """Return the rotation matrices (..., 3, 3) that are nearest to matrices, such as the inexact ones of a decoder."""
    u, _, vt = np.linalg.svd(np.nan_to_num(matrices))
    sign = np.sign(np.linalg.det(u @ vt))
    u[..., -1] *= sign[..., None]
    return u @ vt


def joint_positions(rotations: Any, orientation: Any = None) -> np.ndarray:
    """Return where the joints of a person are.

    Args:
        rotations: Rotation of each joint but the pelvis relative to its parent, (23, 3, 3).
        orientation: Rotation of the whole person, 9 numbers or (3, 3); None: upright, facing the camera.

    Returns:
        (J, 3) in heights of the person: x to the right of the picture, y down and z away from the camera.
    """
    own = np.asarray(rotations, float).reshape(_ROTATIONS)
    root = _UPRIGHT if orientation is None else nearest_rotations(np.asarray(orientation, float).reshape(3, 3))
    absolute = [root]
    positions = [root @ _OFFSETS[0]]
    for joint, (parent, rotation) in enumerate(zip(PARENTS[1:], own, strict=True), start=1):
        positions.append(positions[parent] + absolute[parent] @ _OFFSETS[joint])
        absolute.append(absolute[parent] @ rotation)
    return np.stack(positions)


def draw_pose(people: Sequence[dict[str, Any]], background: np.ndarray | None = None, size: int = SIZE) -> np.ndarray:
    """Draw people as stick figures that fill their boxes: left limbs red, right limbs blue.

    People without ``rotations`` are only a box.

    Args:
        people: People as of :func:`decode_poses`:
            ``{"box": [xmin, ymin, xmax, ymax] in [0, 1], "rotations", "global"}``.
        background: Picture (H, W, 3) uint8 to draw on; None: white.
        size: Minimum side of the result in pixels.

    Returns:
        (H, W, 3) uint8.
    """
    picture = canvas(background, size)
    draw = ImageDraw.Draw(picture)
    line = max(min(picture.size) // 75, 1)
    for index, person in enumerate(people):
        low, high = np.array(person["box"], float).reshape(2, 2) * picture.size
        shade = color(index)
        draw.rectangle([*low, *np.maximum(high - 1, low)], outline=shade, width=max(line // 2, 1))
        if "rotations" not in person:
            continue
        joints = _fit(joint_positions(person["rotations"], person.get("global"))[:, :2], low, high)
        for joint, parent in enumerate(PARENTS[1:], start=1):
            side = _LEFT if "left" in JOINTS[joint] else _RIGHT if "right" in JOINTS[joint] else shade
            draw.line([*joints[parent], *joints[joint]], fill=side, width=line)
        neck, head = joints[JOINTS.index("neck")], joints[JOINTS.index("head")]
        radius = max(float(np.linalg.norm(head - neck)), line) * 0.8
        draw.ellipse([*(head - radius), *(head + radius)], outline=shade, width=line)
    return np.asarray(picture)


def _fit(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Scale points (N, 2) until they fill the box, and move them to its centre."""
    first, last = points.min(0), points.max(0)
    scale = 0.9 * ((high - low) / np.maximum(last - first, 1e-6)).min()
    return (points - (first + last) / 2) * scale + (low + high) / 2
