"""The batches of tokenizer trainings: from files to the input of an encoder.

Shapes: B samples, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.batch_loader import BatchLoader
from fourm.data.identity import dataset_facts
from fourm.data.unified_datasets import Batch, EvalBatches, TrainBatches
from fourm.train.tasks.pretrain import normalise
from fourm.utils.errors import UserError
from fourm.utils.seeds import generator
from fourm.vq.features import FeatureNetwork, timm_network
from fourm.vq.pictures import resized
from fourm.vq.training_data import TokenizerSamples, open_samples


class TokenizerBatches:
    """Reads the batches of a training and of its evaluations.

    Args:
        config: The :class:`fourm.train.tasks.tokenizer.TokenizerTrainingConfig` of the run.
    """

    def __init__(self, config: Any):
        self.config = config
        self._train = None if config.plan or config.eval else self._samples(training=True)
        self._features: FeatureNetwork | None = None

    def _samples(self, training: bool) -> TokenizerSamples:
        config = self.config
        first = None if training else config.num_eval_metrics_samples
        return open_samples(
            config.dataset(training),
            config.labels,
            training,
            config.max_bad_fraction,
            first,
            config.keeps_depth(training),
        )

    def samples_per_epoch(self) -> int:
        """Count the samples of the training folder.

        Raises:
            UserError: The samples are in shards, which are not counted.
        """
        config = self.config
        if config.eval:
            return 1
        if self._train is None or config.use_wds:
            raise UserError(
                "'epoch_size' is not set: set it to the number of samples of an epoch, which shards do not tell"
            )
        return len(self._train.source.all(BadSampleLedger(config.domain, config.max_bad_fraction)))

    def facts(self) -> dict[str, Any]:
        """Return facts about the training data for :meth:`fourm.train.task.Task.identity`."""
        return {} if self._train is None else dataset_facts(self.config.dataset(training=True))

    def train_loader(
        self,
        rank: int,
        world_size: int,
        batches_per_epoch: int,
        start_batch: int,
        draws_by_stream: Mapping[int, int],
        pin_memory: bool,
    ) -> BatchLoader:
        """Return the training batches, see :meth:`fourm.train.task.Task.train_batches`."""
        config = self.config
        assert self._train is not None
        batches = TrainBatches(
            [self._train],
            [1.0],
            self._train.modalities,
            batch_size=config.batch_size,
            batches_per_epoch=batches_per_epoch,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
            start_batch=start_batch,
            draws_by_stream=draws_by_stream,
            num_streams=config.streams(world_size),
        )
        return BatchLoader(batches, config.num_workers, pin_memory)

    def eval_loader(self, rank: int, world_size: int) -> BatchLoader:
        """Return the validation batches of one rank."""
        config = self.config
        batches = EvalBatches(
            self._samples(training=False),
            batch_size=config.batch_size_eval or config.batch_size,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
        )
        return BatchLoader(batches, config.num_workers)

    def empty(self) -> Batch:
        """Return a validation batch of one blank sample."""
        config = self.config
        size = config.loaded_size(training=False)
        tensor = torch.zeros(1, 3, size, size) if config.network else self.blank_input(size)
        entry = {"tensor": tensor, "seed": torch.zeros(1, dtype=torch.int64)}
        return Batch({config.domain: entry | ({"depth": tensor} if config.keeps_depth(False) else {})})

    def step_size(self, step: int) -> int:
        """Draw the size in pixels of an optimizer step, which depends only on the seed and the step."""
        sizes = self.config.sizes()
        return sizes[int(generator(self.config.seed, "size", step).integers(len(sizes)))]

    def loaded(self, batch: Batch, device: torch.device) -> Tensor:
        """Copy the images of a batch to the device and normalise them: (B, C, H, W), or class ids (B, H, W)."""
        ((name, entry),) = batch.mod_dict.items()
        images = entry["tensor"].to(device, non_blocking=True)
        return normalise(images, *batch.scaling[name]) if images.dtype == torch.uint8 else images

    def encoder_input(self, loaded: Tensor, size: int) -> Tensor:
        """Resize the result of :meth:`loaded` to ``size`` pixels, and extract features if the domain needs them."""
        images = resized(loaded, size) if self.config.are_cropped and loaded.shape[-1] != size else loaded
        return self._feature_network(images.device)(images) if self.config.network else images

    def _feature_network(self, device: torch.device) -> FeatureNetwork:
        config = self.config
        if self._features is None:
            network = timm_network(config.network, config.feature_weights, dynamic_img_size=True)
            self._features = FeatureNetwork(network, config.domain_info.kind == "vector").to(device)
        return self._features

    def blank_input(self, size: int) -> Tensor:
        """Return one blank input of the encoder, made of images of ``size`` pixels."""
        config, info = self.config, self.config.domain_info
        if info.kind == "classes":
            return torch.zeros(1, size, size, dtype=torch.int64)
        side = size if info.is_picture else 1 if info.kind == "vector" else size // config.patch_size
        return torch.zeros(1, config.channels, side, side)
