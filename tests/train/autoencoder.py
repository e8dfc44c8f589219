"""A second task: an autoencoder of image files, with a running mean of the pixels as a changing buffer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, get_worker_info

from fourm.data.batch_loader import BatchLoader
from fourm.train.config import RunConfig
from fourm.train.task import Evaluation, Inputs, Losses, StepCost, Task
from fourm.utils.checkpoints import ModelFormat
from fourm.utils.options import Options, option
from fourm.utils.seeds import generator


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Images"""

    data_path: str = option("folder of images of 8 x 8 pixels for training", "")
    eval_data_path: str = option("the same for evaluation", "")
    width: int = option("width of the code", 16, fixed=True)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(ImageOptions, RunConfig):
    """All keys"""


class Autoencoder(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([nn.Linear(192, config["width"]), nn.Linear(config["width"], 192)])
        self.register_buffer("mean", torch.zeros(192))

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)
        nn.init.zeros_(self.mean)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        centred = pixels - self.mean
        return F.mse_loss(self.layers[1](F.gelu(self.layers[0](centred))), centred), pixels.sum(0)


@dataclass
class Images:
    pixels: torch.Tensor
    position: dict[str, Any]


class ImageBatches(IterableDataset):
    def __init__(self, folder: str, numbers: Any, batch_size: int, seed: int | None):
        paths = sorted(Path(folder).glob("*.png"))
        self._pixels = np.stack([np.asarray(Image.open(path), np.float32).reshape(-1) / 255 for path in paths])
        self._numbers, self._size, self._seed = numbers, batch_size, seed

    def __iter__(self):
        worker = get_worker_info()
        for number in itertools.islice(
            self._numbers, worker.id if worker else 0, None, worker.num_workers if worker else 1
        ):
            chosen = np.arange(number * self._size, (number + 1) * self._size) % len(self._pixels)
            if self._seed is not None:
                chosen = generator(self._seed, "images", number).integers(len(self._pixels), size=self._size)
            position = {"stream": 0, "epoch": 0, "draws": number, "skipped": {}, "missing": {}}
            yield Images(torch.from_numpy(self._pixels[chosen]), position)


class AutoencoderTask(Task[AutoencoderConfig]):
    name, config_class, losses = "test-autoencoder", AutoencoderConfig, ["reconstruction"]
    format = ModelFormat("autoencoder", Autoencoder, frozenset({"width"}))

    def build_model(self):
        with torch.device("meta"):
            return Autoencoder({"width": self.config.width})

    def blocks(self, model):
        return list(model.layers)

    def changing_buffers(self, model):
        return ["mean"]

    def train_batches(self, rank, world_size, batches_per_epoch, start_batch, draws_by_stream, pin_memory):
        numbers = itertools.count(start_batch * world_size + rank, world_size)
        config = self.config
        return BatchLoader(ImageBatches(config.data_path, numbers, config.batch_size, config.seed), config.num_workers)

    def prepare(self, model, batch, device):
        values = batch.pixels.to(device)
        return Inputs(
            values, {"reconstruction": len(values)}, samples=len(values), flops=self._flops(model, len(values))
        )

    def loss(self, model, inputs):
        loss, total = model(inputs.values)
        return Losses(loss, {"reconstruction": loss}, {"pixels": total, "images": total.new_tensor(inputs.samples)})

    def update(self, model, statistics, skipped):
        mean = statistics["pixels"] / statistics["images"]
        model.mean.lerp_(torch.where(skipped > 0, model.mean, mean), 0.1)

    def evaluations(self, rank, world_size, is_main):
        numbers = range(rank, 4, world_size)
        loader = BatchLoader(ImageBatches(self.config.eval_data_path, numbers, 2, None), 0)
        return [Evaluation("images", "all", loader, self._prepare_or_nothing)]

    def _prepare_or_nothing(self, model, batch, device, generator):
        return self.prepare(model, batch or Images(torch.zeros(1, 192), {}), device)

    def step_cost(self, model):
        return StepCost(
            self._flops(model, self.config.batch_size), 4.0 * self.config.batch_size * (192 + self.config.width)
        )

    def _flops(self, model, samples):
        return 6.0 * samples * sum(layer.weight.numel() for layer in model.layers)
