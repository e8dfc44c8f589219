"""An independent judge of generated pictures: a small network, trained on true renders, that says which toys it sees.

The network knows nothing of tokens, captions or the model. It looks at a picture of 64 pixels, says for each cell
of 4 x 4 pixels which toys are visible in it, and takes a toy to be in the picture if it is visible in any cell.

Shapes: B pictures, K toys, N scenes, h x w cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fourm.demo.annotations import MIN_AREA
from fourm.demo.scene import CLASSES, TOYS
from fourm.demo.scores import precision_recall
from fourm.demo.truth import DecodedScene
from fourm.utils.errors import UserError
from fourm.utils.files import atomic_path, save_tensors
from fourm.utils.seeds import generator

SIZE = 64  # side of the pictures in pixels
CELL = 4  # side of a cell in pixels
MAX_SHIFT = 4  # augmentation: maximum shift in pixels


@dataclass(frozen=True)
class JudgeOptions:
    """How the judge is trained.

    Attributes:
        epochs: Number of passes over the scenes.
        batch_size: Number of pictures of a step.
        lr: Maximum learning rate of AdamW, which rises for a tenth of the steps and then falls to 0.
        seed: Seed of the weights, the order and the augmentation.
    """

    epochs: int = 14
    batch_size: int = 64
    lr: float = 3e-3
    seed: int = 0


class Judge(nn.Module):
    """A convolutional network with 0.8 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, 32, stride=2), _convolution(32, 48))
        self.middle = nn.Sequential(_convolution(48, 96, stride=2), _Residual(96, layers=1))
        self.deep = nn.Sequential(_convolution(96, 160, stride=2), _Residual(160, layers=2))
        mixed, cells = _convolution(96 + 160, 96, size=1), nn.Conv2d(96, len(TOYS), 1)
        nn.init.constant_(cells.bias, -4.0)  # type: ignore[arg-type]  # most cells show no toy
        self.head = nn.Sequential(mixed, cells)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the logits of each toy in each cell.

        Args:
            pictures: (B, 3, H, W) in [−1, 1].

        Returns:
            (B, K, h, w)
        """
        middle = self.middle(self.stem(pictures))
        deep = F.interpolate(self.deep(middle), scale_factor=2.0)
        return self.head(torch.cat([middle, deep], dim=1))

    @torch.inference_mode()
    def objects(self, pictures: Sequence[np.ndarray], batch_size: int = 64) -> list[set[str]]:
        """Return the names of the toys in each picture (64, 64, 3) uint8."""
        self.eval()
        seen: list[set[str]] = []
        for start in range(0, len(pictures), batch_size):
            batch = torch.from_numpy(np.stack(pictures[start : start + batch_size]))
            present = self(_normalized(batch)).amax((2, 3)) > 0  # (B, K)
            seen += [{name for name, is_present in zip(TOYS, row, strict=True) if is_present} for row in present]
        return seen

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_tensors({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, temporary)

    @classmethod
    def load(cls, path: Path) -> Judge:
        """Load a judge that :meth:`save` wrote.

        Raises:
            UserError: If the file is missing or does not hold a judge.
        """
        judge = cls()
        try:
            judge.load_state_dict(load_file(path))
        except Exception as error:  # safetensors and torch raise their own errors
            raise UserError(f"{path} does not hold the weights of a judge; train one with --train_judge") from error
        return judge.eval()


class _Residual(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.Sequential(*(_convolution(width, width) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def train_judge(
    pictures: np.ndarray,
    classes: np.ndarray,
    options: JudgeOptions,
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Judge:
    """Train a judge.

    Args:
        pictures: True renders, (N, 64, 64, 3) uint8.
        classes: Their class ids, (N, 64, 64), indices into ``CLASSES``.
        options: The options.
        report: Called after each epoch with its number, from 1, and its mean loss.
    """
    torch.manual_seed(options.seed)
    random = generator(options.seed, "judge")
    judge = Judge().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=options.lr, weight_decay=0.02)
    steps = options.epochs * -(-len(pictures) // options.batch_size)
    warmup = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    rgb, ids = torch.from_numpy(pictures), torch.from_numpy(classes)
    for epoch in range(1, options.epochs + 1):
        losses = []
        for chosen in torch.from_numpy(random.permutation(len(rgb))).split(options.batch_size):
            batch, truth = augment(_normalized(rgb[chosen]), ids[chosen], random)
            logits = judge(batch.contiguous(memory_format=torch.channels_last))
            loss = _loss(logits, truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        report(epoch, float(np.mean(losses)))
    return judge.eval()


def _loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the cross-entropy of the toys of each picture, plus that of the toys of each cell.

    The cells teach the network where to look, so that thousands of scenes are enough.
    """
    in_pixels = F.one_hot(classes.long(), len(CLASSES))[..., 1:].permute(0, 3, 1, 2).float()  # (B, K, H, W)
    in_cells = F.max_pool2d(in_pixels, CELL)
    of_cells = F.binary_cross_entropy_with_logits(logits, in_cells, reduction="none").sum(1).mean()
    return (
        of_cells
        + F.binary_cross_entropy_with_logits(logits.amax((2, 3)), in_cells.amax((2, 3)), reduction="none").sum(1).mean()
    )


def augment(pictures: Tensor, classes: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Flip, shift, brighten and blur a batch; flips and shifts also apply to the class ids.

    Args:
        pictures: (B, 3, H, W) in [−1, 1].
        classes: (B, H, W).
        random: The random generator.
    """
    count, _, height, width = pictures.shape
    if random.random() < 0.5:
        pictures, classes = pictures.flip(-1), classes.flip(-1)
    down, right = random.integers(0, 2 * MAX_SHIFT + 1, 2)
    pad = (MAX_SHIFT,) * 4
    pictures = F.pad(pictures, pad, mode="reflect")[..., down : down + height, right : right + width]
    ids = F.pad(classes[:, None].float(), pad, mode="reflect")[:, 0, down : down + height, right : right + width]
    # Pictures that tokens are decoded to lack details, which must not be what the judge looks for.
    side = int(random.integers(SIZE * 3 // 8, SIZE + 1))
    blurred = F.interpolate(F.interpolate(pictures, (side, side), mode="area"), (height, width), mode="bilinear")
    is_blurred = torch.from_numpy(random.random((count, 1, 1, 1)) < 0.5)
    brightness = torch.from_numpy(random.uniform(0.8, 1.25, (count, 1, 1, 1))).float()
    pictures = (torch.where(is_blurred, blurred, pictures) + 1) * brightness - 1
    return pictures.clamp(-1, 1), ids.to(classes.dtype)


def _normalized(pictures: Tensor) -> Tensor:
    """Convert pictures (B, H, W, 3) uint8 to (B, 3, H, W) in [−1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def objects_in_segmentation(classes: np.ndarray) -> set[str]:
    """Return the names of the toys that class ids (H, W) show, each with at least :data:`MIN_AREA` of the pixels."""
    areas = np.bincount(classes[classes >= 0], minlength=len(CLASSES)) / classes.size
    return {name for name, area in zip(CLASSES[1:], areas[1:], strict=False) if area >= MIN_AREA}


@dataclass(frozen=True)
class Score:
    """How many of the objects that captions name are in generated or true scenes.

    Attributes:
        modality: Where the objects are: ``RGB``, ``segmentation`` or ``boxes``.
        source: Where that comes from: ``generated``, ``true renders``, ``tokens of the truth`` or ``guess``.
        precision: Fraction of the objects seen that are named.
        recall: Fraction of the objects named that are seen.
    """

    modality: str
    source: str
    precision: float
    recall: float


def score_scenes(scenes: Sequence[DecodedScene], named: Sequence[set[str]], source: str, judge: Judge) -> list[Score]:
    """Compare the objects in RGB, segmentations and boxes of scenes, if they have them, with those that are named.

    Args:
        scenes: Scenes at 64 pixels, kind → value.
        named: The names of the objects of each scene.
        source: As in :class:`Score`.
        judge: The judge of RGB.
    """
    scores = []
    if "rgb" in scenes[0]:
        seen = judge.objects([scene["rgb"].value for scene in scenes])
        scores.append(Score("RGB", source, *precision_recall(seen, named)))
    if "semseg" in scenes[0]:
        seen = [objects_in_segmentation(scene["semseg"].value) for scene in scenes]
        scores.append(Score("segmentation", source, *precision_recall(seen, named)))
    if "det" in scenes[0]:
        seen = [{box["class_name"] for box in scene["det"].value} for scene in scenes]
        scores.append(Score("boxes", source, *precision_recall(seen, named)))
    return scores
