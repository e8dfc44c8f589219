"""Training of learned tokenizers: what all have in common, and VQ-VAEs.

Those that decode by diffusion are in :mod:`fourm.train.tasks.diffusion_tokenizer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.batch_loader import BatchLoader
from fourm.data.identity import dataset_facts
from fourm.data.unified_datasets import Batch, EvalBatches, TrainBatches
from fourm.train.config import RunConfig
from fourm.train.task import Evaluation, Inputs, Losses, StepCost, Task
from fourm.train.tasks.pretrain import normalise
from fourm.utils.errors import UserError
from fourm.utils.options import option
from fourm.utils.ranks import torchrun_ranks
from fourm.utils.seeds import generator
from fourm.utils.urls import redact_url
from fourm.vq.features import FeatureNetwork, timm_network
from fourm.vq.losses import LOSSES, LossOptions, PerceptualLoss, PerceptualOptions
from fourm.vq.metrics import code_counts, codebook_metrics, metrics_of, region_counts, region_metrics, sample_metrics
from fourm.vq.pictures import side_by_side
from fourm.vq.quantizers import Part
from fourm.vq.training_data import ImageDataOptions, open_samples
from fourm.vq.training_options import (
    DecoderOptions,
    EncoderOptions,
    PublishedOptions,
    QuantizerOptions,
    TokenizerEvaluationOptions,
)
from fourm.vq.vqvae import VQ, VQVAE

log = logging.getLogger("fourm")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(
    ImageDataOptions, EncoderOptions, QuantizerOptions, LossOptions, TokenizerEvaluationOptions, PublishedOptions, RunConfig
):  # fmt: skip
    """What the trainings of all tokenizers have in common."""

    # Of a folder the number of samples is known.
    epoch_size: int = option(
        "samples that make an epoch (default: those of the folder)", -1, at_least=1, unset=-1, fixed=True,
        alias="dataset_size",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig(DecoderOptions, PerceptualOptions, TokenizerConfig):
    """All keys of ``run_training_vqvae.py``"""


Config = TypeVar("Config", bound=TokenizerConfig)


@dataclass(frozen=True)
class Values:
    """What :meth:`TokenizerTraining.loss` reads.

    Attributes:
        images: (B, C, H, W), or class maps (B, H, W), at the size of this step.
        loaded: The same as they are read.
        part: Which micro-batch of its step this is.
        seeds: One for each sample of an evaluation, (B,) on the host; None in training.
    """

    images: Tensor
    loaded: Tensor
    part: Part
    seeds: Tensor | None


class TokenizerTraining(Task[Config], Generic[Config]):
    """What the trainings of all tokenizers have in common.

    Attributes:
        model_class: What is trained.
    """

    model_class: ClassVar[type[VQ]]

    def __init__(self, config: Config):
        self.config = config
        self._train = None if config.plan or config.eval else self._samples(training=True)
        changed: dict[str, Any] = {}
        if config.epoch_size < 0:
            changed["epoch_size"] = self._samples_of_an_epoch()
        if not (config.finetune or config.eval):
            changed["finetune"] = config.full_ckpt or config.encoder_ckpt
        super().__init__(dataclasses.replace(config, **changed))
        self.losses = ["reconstruction", "codebook"]
        self._sizes = config.sizes()
        self.num_pictures = config.num_logged_images or 0
        self._features: FeatureNetwork | None = None
        self._costs: dict[int, tuple[float, float]] = {}
        self._rank, self._world_size = 0, 1

    def _samples_of_an_epoch(self) -> int:
        config = self.config
        if config.eval:
            return 1
        if self._train is None or config.use_wds:
            raise UserError(
                "'epoch_size' is not set: how many samples make an epoch? Only those of folders are counted"
            )
        return len(self._train.source.all(BadSampleLedger(config.domain, config.max_bad_fraction)))

    # The model

    def build_model(self) -> VQ:
        with torch.device("meta"):
            model = self.model_class(**self.model_arguments())
        model.forward_methods = ["autoencode"]  # type: ignore[assignment]
        return model

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of the model's constructor."""
        config, info = self.config, self.config.domain_info
        size = 1 if info.kind == "vector" else self._sizes[-1]
        return {
            "image_size": size, "image_size_enc": config.input_size_enc or size, "n_channels": config.channels,
            "n_labels": config.labels, "enc_type": config.encoder_type, "patch_proj": info.is_picture,
            "post_mlp": config.post_mlp, "patch_size": config.patch_size, "freeze_enc": config.freeze_enc,
            "undo_std": config.undo_std, "threshold_ema_dead_code": self._threshold(),
            "modality": info.transform or config.domain,
            "transform_options": {} if config.network else config.transform_options(),
            "feature_network": config.network or ("none" if info.kind in ("map", "vector") else ""),
        } | config.quantizer_arguments()  # fmt: skip

    def _threshold(self) -> float:
        """How many latents of a step choose a code of which it is not dead, at least."""
        config = self.config
        if not config.coef_ema_dead_code:
            return 0.0
        samples = config.batch_size * config.accum_iter * torchrun_ranks()[1]
        side = (self._sizes[0] + self._sizes[-1]) // 2 // config.patch_size
        places = 1 if config.domain_info.kind == "vector" else side**2
        return samples * places / config.codebook_size / config.coef_ema_dead_code

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        assert isinstance(model, VQ)
        return [block for part in (model.encoder, model.decoder) for block in _repeated(part)]

    def changing_buffers(self, model: nn.Module) -> list[str]:
        if self.config.freeze_enc:
            return []
        return [
            name for name, _ in model.named_buffers() if name.endswith(("_codebook.cluster_size", "_codebook.embed"))
        ]

    def describe(self) -> None:
        config = self.config
        log.info(
            "%s of %s, sides of %s pixels",
            config.domain,
            redact_url(config.data_path),
            ", ".join(map(str, self._sizes)),
        )
        log.info("%s: %d codes of width %d", config.quantizer_type, config.codebook_size, config.latent_dim)

    def select_weights(self, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of ``encoder_ckpt`` the encoder and the quantizer. Positions of another size are computed anew.

        Raises:
            UserError: They are those of a frozen encoder, whose tokens would be others.
        """
        if self.config.encoder_ckpt:
            parts = ("encoder.", "quant_proj.", "quantize.", "cls_emb.")
            weights = {name: tensor for name, tensor in weights.items() if name.startswith(parts)}
        for name, tensor in weights.items():
            if name == "encoder.pos_emb" and self.config.freeze_enc and tensor.shape != own[name].shape:
                raise UserError(
                    f"the frozen encoder was trained with 'input_size_enc' {tensor.shape[-1] * self.config.patch_size}: set it, "
                    "because other positions give other tokens"
                )
        return {
            name: tensor for name, tensor in weights.items()
            if not (name.endswith("pos_emb") and name in own and tensor.shape != own[name].shape)
        }  # fmt: skip

    # A step

    def _samples(self, training: bool) -> Any:
        config = self.config
        first = None if training else config.num_eval_metrics_samples
        data = config.dataset(training, self._loaded_size(training))
        return open_samples(data, config.labels, training, config.max_bad_fraction, first)

    def _loaded_size(self, training: bool) -> int:
        """Side in pixels of the pictures that are read, or of a grid of features."""
        config, info = self.config, self.config.domain_info
        if info.kind == "mask":
            return config.mask_size
        if not config.are_cropped:
            return 1 if info.kind == "vector" else config.input_size_max // config.patch_size
        return max(config.sizes()[-1], 0 if training else self._evaluated_sizes()[-1])

    def train_batches(
        self, rank: int, world_size: int, batches_per_epoch: int, start_batch: int, draws: Mapping[int, int] | None,
        pin_memory: bool,
    ) -> BatchLoader:  # fmt: skip
        config = self.config
        self._rank, self._world_size = rank, world_size
        assert self._train is not None
        batches = TrainBatches(
            [self._train], [1.0], self._train.modalities, batch_size=config.batch_size,
            batches_per_epoch=batches_per_epoch, rank=rank, world_size=world_size, seed=config.seed,
            start_batch=start_batch, positions=draws, num_streams=config.streams(world_size),
        )  # fmt: skip
        return BatchLoader(batches, config.num_workers, pin_memory)

    def prepare(self, model: nn.Module, batch: Batch, device: torch.device) -> Inputs:
        """The size of the pictures is the same for all micro-batches and processes of a step."""
        config = self.config
        step, micro = divmod(batch.number, config.accum_iter)
        size = self._sizes[int(generator(config.seed, "size", step).integers(len(self._sizes)))]
        part = Part(micro * self._world_size + self._rank, config.accum_iter * self._world_size)
        return self._inputs(batch, device, size, part, training=True)

    def _inputs(self, batch: Batch, device: torch.device, size: int, part: Part, training: bool) -> Inputs:
        config = self.config
        ((name, entry),) = batch.mod_dict.items()
        loaded = entry["tensor"].to(device, non_blocking=True)
        if loaded.dtype == torch.uint8:
            loaded = normalise(loaded, *batch.scaling[name])
        images = loaded
        if config.are_cropped and images.shape[-1] != size:
            images = resized(images, size)
        if config.network:
            images = self._feature_network(device)(images)
        names = self.losses if training else [*self._evaluated_losses(), *self._metrics()]
        return Inputs(
            Values(images, loaded, part, None if training else entry["seed"]), dict.fromkeys(names, len(images)),
            samples=len(images), flops=len(images) * self._cost_of_sample(size)[0],
        )  # fmt: skip

    def _feature_network(self, device: torch.device) -> FeatureNetwork:
        config = self.config
        if self._features is None:
            network = timm_network(config.network, config.feature_weights, dynamic_img_size=True)
            self._features = FeatureNetwork(network, config.domain_info.kind == "vector").to(device)
        return self._features

    def loss(self, model: nn.Module, inputs: Inputs) -> Losses:
        values: Values = inputs.values
        if values.seeds is not None:
            return self._evaluated(model, values)
        compared, code_loss, statistics = self._forward(model, values, return_statistics=True)
        means = self._losses_of(compared, code_loss)
        return Losses(torch.stack([*means.values()]).sum(), means, statistics)

    def _evaluated(self, model: nn.Module, values: Values) -> Losses:
        """With the metrics of a reconstruction."""
        assert isinstance(model, VQ)
        with kept_outputs(model.quantize) as outputs:
            compared, code_loss, *_ = self._forward(model, values)
            prediction, target = self._reconstruction(model, values, compared)
        losses, classes = self._losses_of(compared, code_loss), self.config.labels
        means = {name: losses[name] for name in self._evaluated_losses()}
        quantizer, ids = model.quantize, outputs[0].ids
        statistics = {"codes": code_counts(ids, quantizer.num_codebooks, quantizer.codebook_size)}
        if classes:
            statistics |= region_counts(prediction, target, classes)
        metrics = sample_metrics(self._metrics(), prediction, target)
        pictures = side_by_side(self.config.domain_info, target, prediction) if self.num_pictures else None
        return Losses(torch.stack([*means.values()]).sum(), means | metrics, statistics, pictures)

    @abstractmethod
    def _forward(self, model: nn.Module, values: Values, **options: Any) -> tuple[Any, ...]:
        """What is compared, as (prediction, target), and what else the model returns beside the prediction."""

    def _losses_of(self, compared: tuple[Tensor, Tensor], code_loss: Tensor) -> dict[str, Tensor]:
        """Name in :attr:`losses` → its share of the total."""
        prediction, target = compared
        reconstruction = LOSSES[self.config.loss_fn](prediction.float(), target)
        return {"reconstruction": reconstruction, "codebook": self.config.codebook_weight * code_loss.sum()}

    def _reconstruction(
        self, model: nn.Module, values: Values, compared: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The reconstruction of an evaluation, float32, and its target."""
        return compared[0].float(), compared[1]

    def update(self, model: nn.Module, statistics: Mapping[str, Tensor], skipped: Tensor) -> None:
        assert isinstance(model, VQ)
        if statistics:  # a frozen quantizer has none
            model.quantize.update(statistics, skipped)

    # Around it

    def _evaluated_sizes(self) -> list[int]:
        sizes = self.config.sizes()
        return sorted({sizes[0], sizes[-1], self.config.input_size_eval or sizes[0]})

    def evaluations(self, rank: int, world_size: int, is_main: bool) -> list[Evaluation]:
        """The validation set at the smallest and the largest size, and at ``input_size_eval``."""
        config = self.config
        if not config.eval_data_path:
            return []
        batches = EvalBatches(
            self._samples(training=False), batch_size=config.batch_size_eval or config.batch_size, rank=rank,
            world_size=world_size, seed=config.seed,
        )  # fmt: skip
        loader = BatchLoader(batches, config.num_workers)
        sizes = self._evaluated_sizes() if config.are_cropped else [self._sizes[-1]]
        return [Evaluation(config.domain, f"{size}px", loader, partial(self._prepared, size)) for size in sizes]

    def _prepared(
        self, size: int, model: nn.Module, batch: Batch | None, device: torch.device, generator: torch.Generator
    ) -> Inputs:
        return self._inputs(batch or self._nothing(), device, size, Part(), training=False)

    def _nothing(self) -> Batch:
        """A batch of one sample without content."""
        size = self._loaded_size(training=False)
        tensor = torch.zeros(1, 3, size, size) if self.config.network else self._zeros(size)
        return Batch({self.config.domain: {"tensor": tensor, "seed": torch.zeros(1, dtype=torch.int64)}}, position={})

    def _metrics(self) -> list[str]:
        return metrics_of(self.config.domain_info, self.config.domain, self._bounded)

    @property
    def _bounded(self) -> bool:
        """Whether values lie in [-1, 1]."""
        config = self.config
        return config.domain in ("rgb", "normal", "canny_edge", "sam_edge") and not config.imagenet_default_mean_and_std

    def evaluation_loss(self, sums: Mapping[str, float], targets: Mapping[str, int]) -> float:
        """As in training: the sum of the losses, without the metrics."""
        return sum(sums[name] / targets[name] for name in self._evaluated_losses())

    def _evaluated_losses(self) -> list[str]:
        """Quantizers have a loss in training only."""
        return [name for name in self.losses if name != "codebook"]

    def evaluation_metrics(self, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        """How the codebook is used and, of class maps, how well the regions of classes fit."""
        return codebook_metrics(statistics["codes"]) | region_metrics(statistics)

    def identity(self) -> dict[str, dict[str, Any]]:
        if self._train is None:
            return {"data": {}}
        return {"data": dataset_facts(self.config.dataset(True, self._loaded_size(True)))}

    def step_cost(self, model: nn.Module) -> StepCost:
        """Of a batch at the largest size."""
        flops, activations = self._cost_of_sample(self._sizes[-1])
        return StepCost(self.config.batch_size * flops, self.config.batch_size * activations)

    def _cost_of_sample(self, size: int) -> tuple[float, float]:
        """Operations of forward and backward pass, and bytes that the latter needs, of one sample: counted, not computed."""
        if size in self._costs:
            return self._costs[size]
        saved: dict[int, torch.UntypedStorage] = {}  # which stay there, so that no other gets the same id

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                saved[id(tensor.untyped_storage())] = tensor.untyped_storage()
            return tensor

        model = self.build_model().eval()
        with FakeTensorMode(allow_non_fake_inputs=True):  # unlike the meta device, it knows autocast
            model.to_empty(device="cpu")
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with FlopCounterMode(display=False) as counter, hooks:
                self._forward(model, Values(sample := self._zeros(size), sample, Part(), None))
        activations = sum(storage.nbytes() for storage in saved.values())
        self._costs[size] = 3.0 * counter.get_total_flops(), float(activations)
        return self._costs[size]

    def _zeros(self, size: int) -> Tensor:
        """One sample of what the encoder gets, made of pictures of this size."""
        config, info = self.config, self.config.domain_info
        if info.kind == "classes":
            return torch.zeros(1, size, size, dtype=torch.int64)
        side = size if info.is_picture else 1 if info.kind == "vector" else size // config.patch_size
        return torch.zeros(1, config.channels, side, side)


class VQVAETraining(TokenizerTraining[VQVAEConfig]):
    """Train a VQ-VAE: an encoder, a quantizer and a decoder that reconstruct pictures, class maps, features or vectors."""

    name, config_class, model_class, format = "vqvae", VQVAEConfig, VQVAE, VQVAE.model_format()

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        self._perceptual: PerceptualLoss | None = None
        if self.config.percept_loss_weight:
            self.losses = [*self.losses, "perceptual"]

    def model_arguments(self) -> dict[str, Any]:
        config = self.config
        return super().model_arguments() | {
            "dec_type": config.decoder_type, "out_conv": config.out_conv, "image_size_dec": config.input_size_dec,
            "patch_size_dec": config.patch_size_dec,
        }  # fmt: skip

    def _forward(self, model: nn.Module, values: Values, **options: Any) -> tuple[Any, ...]:
        prediction, *others = model(values.images, values.part, **options)
        return (prediction, values.images), *others

    def _losses_of(self, compared: tuple[Tensor, Tensor], code_loss: Tensor) -> dict[str, Tensor]:
        losses = super()._losses_of(compared, code_loss)
        if weight := self.config.percept_loss_weight:
            losses["perceptual"] = weight * self._perceptual_loss(compared[1].device)(*compared)
        return losses

    def _perceptual_loss(self, device: torch.device) -> PerceptualLoss:
        if self._perceptual is None:
            network = timm_network(self.config.percept_model, self.config.percept_weights)
            self._perceptual = PerceptualLoss(network, self.config).to(device)
        return self._perceptual


def resized(images: Tensor, size: int) -> Tensor:
    """Pictures (B, C, H, W), or class maps (B, H, W) of whole numbers, at another side in pixels."""
    if images.ndim == 3:
        return F.interpolate(images[:, None].float(), (size, size), mode="nearest-exact")[:, 0].to(images.dtype)
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


@contextlib.contextmanager
def kept_outputs(module: nn.Module) -> Iterator[list[Any]]:
    """The outputs of a module's forward passes within it; the model's own do not contain them."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _repeated(part: Any) -> Iterator[nn.Module]:
    """The blocks of an encoder or decoder."""
    for name in ("blocks", "input_blocks", "middle_block", "output_blocks"):
        yield from getattr(part, name, ())
