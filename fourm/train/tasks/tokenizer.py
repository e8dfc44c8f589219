"""Training of learned tokenizers: the part that all kinds share, and VQ-VAEs.

Tokenizers with a diffusion decoder are in :mod:`fourm.train.tasks.diffusion_tokenizer`, the data in
:mod:`fourm.train.tasks.tokenizer_batches`, and the metrics in :mod:`fourm.vq.evaluation`.

Shapes: B samples, C channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from fourm.data.batch_loader import BatchLoader
from fourm.data.unified_datasets import Batch
from fourm.models.model_card import Tables
from fourm.train.config import RunConfig
from fourm.train.step_cost import count_activations, count_flops
from fourm.train.task import Evaluation, Inputs, Losses, StepCost, Task
from fourm.train.tasks.tokenizer_batches import TokenizerBatches
from fourm.utils.errors import UserError
from fourm.utils.options import option
from fourm.utils.ranks import torchrun_ranks
from fourm.utils.urls import redact_url
from fourm.vq.evaluation import EvaluationMetrics, TokenizerEvaluationOptions
from fourm.vq.features import timm_network
from fourm.vq.losses import LOSSES, LossOptions, PerceptualLoss, PerceptualOptions
from fourm.vq.pictures import resized, side_by_side
from fourm.vq.quantizers import Part
from fourm.vq.training_data import ImageDataOptions
from fourm.vq.training_options import DecoderOptions, EncoderOptions, PublishedOptions, QuantizerOptions
from fourm.vq.vqvae import VQ, VQVAE

log = logging.getLogger("fourm")


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig(
    TokenizerEvaluationOptions,
    ImageDataOptions,
    EncoderOptions,
    QuantizerOptions,
    LossOptions,
    PublishedOptions,
    RunConfig,
):
    """The options that the trainings of all tokenizers share."""

    epoch_size: int = option(
        "samples that make an epoch (default: those of the folder)",
        -1,
        at_least=1,
        unset=-1,
        fixed=True,
        alias="dataset_size",
    )


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig(DecoderOptions, PerceptualOptions, TokenizerTrainingConfig):
    """All keys of ``run_training_vqvae.py``"""


Config = TypeVar("Config", bound=TokenizerTrainingConfig)


@dataclass(frozen=True)
class Values:
    """The inputs of :meth:`TokenizerTraining.loss`.

    Attributes:
        images: The input of the encoder at the size of this step, (B, C, H, W), or class ids (B, H, W).
        loaded: The images as they were read, which may be larger.
        part: Which micro-batch of its step this is.
        seeds: One seed per sample of an evaluation, (B,) on the host; None in training.
        depth: In an evaluation of depth, the depth before it was standardised, (B, 1, H, W); otherwise None.
    """

    images: Tensor
    loaded: Tensor
    part: Part
    seeds: Tensor | None = None
    depth: Tensor | None = None


class TokenizerTraining(Task[Config], Generic[Config]):
    """The training of any learned tokenizer.

    A subclass implements :meth:`_forward`, and may add losses and change the reconstruction of evaluations.

    Attributes:
        model_class: The class of the model.
        forward_methods: The methods of the model, besides ``forward``, that are called from outside.
    """

    model_class: ClassVar[type[VQ]]
    forward_methods: ClassVar[tuple[str, ...]] = ("autoencode",)

    def __init__(self, config: Config):
        changes: dict[str, Any] = {}
        self._batches = TokenizerBatches(config)
        if config.epoch_size < 0:
            changes["epoch_size"] = self._batches.samples_per_epoch()
        if not (config.finetune or config.eval):
            changes["finetune"] = config.full_ckpt or config.encoder_ckpt
        super().__init__(dataclasses.replace(config, **changes))
        self.losses = ["reconstruction", "codebook"]
        self.num_pictures = config.num_logged_images or 0
        self._metrics = EvaluationMetrics(config)
        self._flops: dict[int, float] = {}  # of a sample, by its size
        self._rank, self._world_size = 0, 1

    # The model

    def build_model(self) -> VQ:
        with torch.device("meta"):
            model = self.model_class(**self.model_arguments())
        model.forward_methods = self.forward_methods  # type: ignore[assignment]
        return model

    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of the model's constructor."""
        config, info = self.config, self.config.domain_info
        size = 1 if info.kind == "vector" else config.sizes()[-1]
        return {
            "image_size": size,
            "image_size_enc": config.input_size_enc or size,
            "n_channels": config.channels,
            "n_labels": config.labels,
            "enc_type": config.encoder_type,
            "patch_proj": info.is_picture,
            "post_mlp": config.post_mlp,
            "patch_size": config.patch_size,
            "freeze_enc": config.freeze_enc,
            "undo_std": config.undo_std,
            "threshold_ema_dead_code": self._dead_code_threshold(),
            "modality": config.domain,
            "transform_options": {} if config.network else config.transform_options(),
            "feature_network": config.network or ("none" if info.kind in ("map", "vector") else ""),
        } | config.quantizer_arguments()

    def _dead_code_threshold(self) -> float:
        """Return how many latents of a step must choose a code, on average, to keep it alive; 0 keeps all codes."""
        config = self.config
        if not config.coef_ema_dead_code:
            return 0.0
        samples = config.batch_size * config.accum_iter * torchrun_ranks()[1]
        sizes = config.sizes()
        side = (sizes[0] + sizes[-1]) // 2 // config.patch_size
        latents = samples * (1 if config.domain_info.kind == "vector" else side**2)
        return latents / config.codebook_size / config.coef_ema_dead_code

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        assert isinstance(model, VQ)
        lists = ("blocks", "input_blocks", "middle_block", "output_blocks")
        return [block for part in (model.encoder, model.decoder) for name in lists for block in getattr(part, name, ())]

    def changing_buffers(self, model: nn.Module) -> list[str]:
        if self.config.freeze_enc:
            return []
        endings = ("_codebook.cluster_size", "_codebook.embed")
        return [name for name, _ in model.named_buffers() if name.endswith(endings)]

    def facts(self) -> Tables:
        return {"Data": [{"domain": self.config.domain, "sides in pixels": [*map(str, self.config.sizes())]}]}

    def describe(self) -> None:
        config = self.config
        sides = ", ".join(map(str, config.sizes()))
        log.info("%s of %s, sides of %s pixels", config.domain, redact_url(config.data_path), sides)
        log.info("%s: %d codes of width %d", config.quantizer_type, config.codebook_size, config.latent_dim)

    def select_weights(self, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Select the encoder and the quantizer for ``encoder_ckpt``; position tables of another size are built anew.

        Raises:
            UserError: The position table of a frozen encoder has another size, so that its tokens would change.
        """
        config = self.config
        if config.encoder_ckpt:
            parts = ("encoder.", "quant_proj.", "quantize.", "cls_emb.")
            weights = {name: tensor for name, tensor in weights.items() if name.startswith(parts)}
        resized_tables = {
            name
            for name, tensor in weights.items()
            if name.endswith("pos_emb") and name in own and tensor.shape != own[name].shape
        }
        if config.freeze_enc and "encoder.pos_emb" in resized_tables:
            size = weights["encoder.pos_emb"].shape[-1] * config.patch_size
            raise UserError(
                f"the frozen encoder was trained with 'input_size_enc' {size}: set it, because other positions give "
                "other tokens"
            )
        return {name: tensor for name, tensor in weights.items() if name not in resized_tables}

    # A step

    def train_batches(
        self,
        rank: int,
        world_size: int,
        batches_per_epoch: int,
        start_batch: int,
        draws_by_stream: Mapping[int, int],
        pin_memory: bool,
    ) -> BatchLoader:
        self._rank, self._world_size = rank, world_size
        return self._batches.train_loader(rank, world_size, batches_per_epoch, start_batch, draws_by_stream, pin_memory)

    def prepare(self, model: nn.Module, batch: Batch, device: torch.device) -> Inputs:
        """Prepare images of the same size in all micro-batches and processes of a step."""
        step, micro_batch = divmod(batch.number, self.config.accum_iter)
        size = self._batches.step_size(step)
        loaded = self._batches.loaded(batch, device)
        part = Part(micro_batch * self._world_size + self._rank, self.config.accum_iter * self._world_size)
        values = Values(self._batches.encoder_input(loaded, size), loaded, part)
        return self._inputs(values, size, self.losses)

    def _inputs(self, values: Values, size: int, names: Sequence[str]) -> Inputs:
        samples = len(values.images)
        return Inputs(values, dict.fromkeys(names, samples), samples, flops=samples * self._flops_of_sample(size))

    def loss(self, model: nn.Module, inputs: Inputs) -> Losses:
        values: Values = inputs.values
        if values.seeds is not None:
            return self._evaluation_losses(model, values)
        (prediction, target), code_loss, statistics = self._forward(model, values, return_statistics=True)
        means = self._means(prediction, target, code_loss)
        return Losses(torch.stack([*means.values()]).sum(), means, statistics)

    @abstractmethod
    def _forward(self, model: nn.Module, values: Values, **options: Any) -> tuple[Any, ...]:
        """Run the forward pass.

        Args:
            options: Keyword arguments of the model's ``forward``.

        Returns:
            The prediction and its target, as a pair, and then the other results of the model.
        """

    def _means(self, prediction: Tensor, target: Tensor, code_loss: Tensor) -> dict[str, Tensor]:
        """Compute the weighted losses, by the names in :attr:`losses`."""
        reconstruction = LOSSES[self.config.loss_fn](prediction.float(), target)
        return {"reconstruction": reconstruction, "codebook": self.config.codebook_weight * code_loss.sum()}

    def update(self, model: nn.Module, statistics: Mapping[str, Tensor], skipped: Tensor) -> None:
        assert isinstance(model, VQ)
        if statistics:  # a frozen quantizer has none
            model.quantize.update(statistics, skipped)

    # Evaluations

    def evaluations(self, rank: int, world_size: int, is_main: bool) -> list[Evaluation]:
        """Return one evaluation for each of the smallest size, the largest size and ``input_size_eval``."""
        config = self.config
        if not config.eval_data_path:
            return []
        loader = self._batches.eval_loader(rank, world_size)
        self._metrics.load_networks()
        sizes = config.evaluated_sizes() if config.are_cropped else config.sizes()[-1:]
        return [
            Evaluation(config.domain, f"{size}px", loader, partial(self._prepare_evaluation, size)) for size in sizes
        ]

    def _prepare_evaluation(
        self, size: int, model: nn.Module, batch: Batch | None, device: torch.device, generator: torch.Generator
    ) -> Inputs:
        batch = batch or self._batches.empty()
        (entry,) = batch.mod_dict.values()
        loaded = self._batches.loaded(batch, device)
        depth = resized(entry["depth"].to(device), size) if "depth" in entry else None
        values = Values(self._batches.encoder_input(loaded, size), loaded, Part(), entry["seed"], depth)
        return self._inputs(values, size, [*self._evaluation_loss_names(), *self._metrics.names(size)])

    def _evaluation_losses(self, model: nn.Module, values: Values) -> Losses:
        """Compute the losses and the metrics of the reconstruction."""
        assert isinstance(model, VQ)
        with recorded_outputs(model.quantize) as outputs:
            (prediction, target), code_loss, *_ = self._forward(model, values)
            reconstruction = self._reconstruction(model, values, prediction, target)
        losses = self._means(prediction, target, code_loss)
        means = {name: losses[name] for name in self._evaluation_loss_names()}
        images = values.images
        pictures = side_by_side(self.config.domain_info, images, reconstruction) if self.num_pictures else None
        return Losses(
            torch.stack([*means.values()]).sum(),
            means | self._metrics.means(reconstruction, images, values.depth),
            self._metrics.statistics(reconstruction, images, outputs[0].ids, model.quantize),
            pictures,
        )

    def _reconstruction(self, model: nn.Module, values: Values, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the reconstruction of ``values.images`` in an evaluation, in float32.

        Args:
            prediction, target: The pair from :meth:`_forward`.
        """
        return prediction.float()

    def evaluation_loss(self, sums: Mapping[str, float], targets: Mapping[str, int]) -> float:
        """Return the sum of the losses, as in training; metrics are not part of it."""
        return sum(sums[name] / targets[name] for name in self._evaluation_loss_names())

    def _evaluation_loss_names(self) -> list[str]:
        """Return the names of the losses of the reconstruction, which are those without that of the quantizer."""
        return [name for name in self.losses if name != "codebook"]

    def evaluation_metrics(self, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        return self._metrics.summarise(statistics)

    # Facts

    def identity(self) -> dict[str, dict[str, Any]]:
        return {"data": self._batches.facts()}

    def step_cost(self, model: nn.Module) -> StepCost:
        """Return the cost of a batch at the largest size."""
        size = self.config.sizes()[-1]
        activations = count_activations(*self._forward_pass(size, torch.device("cpu")))
        return StepCost(self.config.batch_size * self._flops_of_sample(size), self.config.batch_size * activations)

    def _flops_of_sample(self, size: int) -> float:
        if size not in self._flops:
            self._flops[size] = count_flops(*self._forward_pass(size, torch.device("meta")))
        return self._flops[size]

    def _forward_pass(self, size: int, input_device: torch.device) -> tuple[nn.Module, Callable[[], object]]:
        """Return a model on the meta device, and a function that runs it on a sample on ``input_device``."""
        model = self.build_model().eval()
        image = self._batches.blank_input(size).to(input_device)
        return model, lambda: self._forward(model, Values(image, image, Part()))


class VQVAETraining(TokenizerTraining[VQVAEConfig]):
    """Trains a VQ-VAE: an encoder, a quantizer and a decoder for pictures, class maps, features or vectors."""

    name, config_class, model_class, format = "vqvae", VQVAEConfig, VQVAE, VQVAE.model_format()

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        self._perceptual: PerceptualLoss | None = None
        if self.config.percept_loss_weight:
            self.losses = [*self.losses, "perceptual"]

    def model_arguments(self) -> dict[str, Any]:
        config = self.config
        return super().model_arguments() | {
            "dec_type": config.decoder_type,
            "out_conv": config.out_conv,
            "image_size_dec": config.input_size_dec,
            "patch_size_dec": config.patch_size_dec,
        }

    def _forward(self, model: nn.Module, values: Values, **options: Any) -> tuple[Any, ...]:
        prediction, *others = model(values.images, values.part, **options)
        return (prediction, values.images), *others

    def _means(self, prediction: Tensor, target: Tensor, code_loss: Tensor) -> dict[str, Tensor]:
        means = super()._means(prediction, target, code_loss)
        if weight := self.config.percept_loss_weight:
            means["perceptual"] = weight * self._perceptual_loss(target.device)(prediction, target)
        return means

    def _perceptual_loss(self, device: torch.device) -> PerceptualLoss:
        if self._perceptual is None:
            network = timm_network(self.config.percept_model, self.config.percept_weights)
            self._perceptual = PerceptualLoss(network, self.config).to(device)
        return self._perceptual


@contextlib.contextmanager
def recorded_outputs(module: nn.Module) -> Iterator[list[Any]]:
    """Record the outputs of a module in all forward passes within the context."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
