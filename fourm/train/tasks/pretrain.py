"""Pre-training of 4M: masked prediction of any modalities from any others (papers, sections 2 and 3)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fourm.data.batch_loader import BatchLoader
from fourm.data.data_config import leaves_targets
from fourm.data.identity import identity_of
from fourm.data.modality_info import own_declarations
from fourm.data.options import DataOptions
from fourm.data.sample_dataset import build_masking
from fourm.data.unified_datasets import Batch, build_eval_loader, build_train_loader
from fourm.models import FM, StepFlops, TokenSelection, count_parameters, model_config
from fourm.models.activations import activation_bytes
from fourm.models.from_checkpoint import FORMAT
from fourm.models.model_card import Tables
from fourm.train.batch_warmup import BatchWarmupOptions
from fourm.train.config import RunConfig
from fourm.train.task import Evaluation, Inputs, Losses, StepCost, Task
from fourm.utils.errors import UserError
from fourm.utils.options import Options, option
from fourm.utils.tokenizer import load_text_tokenizer
from fourm.utils.urls import redact_url

log = logging.getLogger("fourm")
_BUDGET_DRAWS = 400  # for the mean token budgets
MeanBudgets = dict[str, float]  # tokens in a batch by modality


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """4M model and loss"""

    model: str = option("name of the model size and variant", "fm_tiny_6e_6d_swiglu_nobias", fixed=True)
    model_kwargs: dict = option("FourM arguments that override the named model, e.g. {dim: 192}", {}, fixed=True)
    patch_size: int = option(
        "patch size in pixels where a modality declares none", 16, at_least=1, at_most=10_000, fixed=True
    )
    input_size: int = option(
        "input size in pixels where a modality declares none", 224, at_least=1, at_most=100_000, fixed=True
    )
    num_register_tokens: int = option("register tokens of the encoder", 0, at_least=0, at_most=100_000, fixed=True)
    residual_dtype: Literal["float32", "bfloat16"] = option(
        "precision of the residual stream between the blocks; bfloat16 needs 'dtype' bfloat16", "float32", fixed=True
    )
    loss_type: Literal["mod", "token"] = option("average the loss over modalities, or over tokens", "mod", fixed=True)
    frozen_embedding_domain: str | None = option(
        "domains, joined by '-', whose embeddings are also frozen in the frozen phase", None, fixed=True
    )
    fixed_eval: bool = option("also evaluate with fixed token budgets", True)
    fixed_eval_input_tokens: int = option("input token budget of the fixed evaluation", 128, at_least=1, at_most=10**6)
    fixed_eval_target_tokens: int = option(
        "target token budget of the fixed evaluation", 128, at_least=1, at_most=10**6
    )
    fixed_eval_batch_size: int = option("batch size of the fixed evaluation", 32, at_least=1, at_most=10**6)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(DataOptions, ModelOptions, BatchWarmupOptions, RunConfig):
    """All keys of ``run_training_4m.py`` and ``run_training_4m_fsdp.py``"""

    @property
    def tokens_per_sample(self) -> int:
        return self.num_input_tokens + self.num_target_tokens

    def check(self) -> None:
        if self.residual_dtype == "bfloat16" != self.autocast_dtype:
            raise UserError(f"'residual_dtype' bfloat16 needs 'dtype' bfloat16, not {self.dtype}")


class Pretrain(Task[PretrainConfig]):
    """Trains 4M to predict any modalities from any others.

    Args:
        config: The configuration; the data configuration that it names is read, but no data.

    Attributes:
        data: The data sets.
        losses: The modalities that are predicted.
        slots: The numbers of tokens in the encoder and in the decoder.
    """

    name = "pretrain"
    config_class = PretrainConfig
    format = FORMAT

    def __init__(self, config: PretrainConfig):
        super().__init__(config)
        self.data = config.load_data(max_bad_fraction=config.max_bad_fraction)
        self.text_tokenizer = load_text_tokenizer(config.text_tokenizer_path)
        self.losses = list(self.data.out_domains)
        sets = self.data.train.values()
        self.slots = (
            max(dataset.input_tokens_range[1] for dataset in sets),
            max(dataset.target_tokens_range[1] for dataset in sets),
        )
        self._flops: tuple[nn.Module, StepFlops] | None = None

    def build_model(self) -> FM:
        config = self.config
        options = {
            "num_register_tokens": config.num_register_tokens,
            "use_act_checkpoint": config.use_act_checkpoint and config.act_checkpoint_every,
            "image_size": config.input_size,
            "patch_size": config.patch_size,
            "share_embedding": True,
        }
        for key in ("domains_in", "domains_out", "modalities"):
            if key in config.model_kwargs:
                raise UserError(f"'model_kwargs': '{key}' follows from the data configuration; remove it")
        # The modalities that are not in the built-in table: those of the data YAML, and those that a program has
        # declared.
        own = own_declarations(self.data.modalities)
        declared = {name: own.get(name, {}) | dict(fields or {}) for name, fields in self.data.declarations.items()}
        with torch.device("meta"):
            model = FM(
                model_config(
                    config.model,
                    self.data.in_domains,
                    self.data.out_domains,
                    modalities=own | declared,
                    **options | config.model_kwargs,
                )
            )
        model.residual_dtype = getattr(torch, config.residual_dtype)
        return model

    @property
    def model_name(self) -> str:
        return f"'model' {self.config.model}" + (" with its 'model_kwargs'" if self.config.model_kwargs else "")

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        assert isinstance(model, FM)
        return [*model.encoder, *model.decoder]

    def compile(self, model: nn.Module, **options: Any) -> None:
        assert isinstance(model, FM)
        model.compile_blocks(**options)

    def parts(self, model: nn.Module) -> list[nn.Module]:
        # The embeddings of the decoder are not parts: their vocabularies are also output matrices, and they share the
        # modality vectors of the encoder. The root of the model keeps what two modules share.
        assert isinstance(model, FM)
        embeddings = [part for embedding in model.encoder_embeddings.values() for part in embedding.children()]
        return [*embeddings, *self.blocks(model)]

    def set_trainable(self, model: nn.Module, frozen: bool) -> None:
        """Train everything or, in the ``frozen`` phase, the embeddings except those of ``frozen_embedding_domain``."""
        assert isinstance(model, FM)
        model.unfreeze_all()
        if frozen and self.config.frozen_embedding_domain:
            model.freeze_params_except_specific_embeddings(self.config.frozen_embedding_domain)
        elif frozen:
            model.freeze_shared_params()

    def count_parameters(self, model: nn.Module) -> dict[str, int]:
        assert isinstance(model, FM)
        return count_parameters(model)

    def describe(self) -> None:
        for name, dataset in self.data.train.items():
            log.info("data set %s, weight %g: %s", name, self.data.weights[name], redact_url(dataset.data_path))
            log.info("  inputs %s of %d-%d tokens", ", ".join(dataset.in_domains), *dataset.input_tokens_range)
            log.info("  targets %s of %d-%d tokens", ", ".join(dataset.out_domains), *dataset.target_tokens_range)
        log.info("model %s", self.config.model)

    def train_batches(
        self,
        rank: int,
        world_size: int,
        batches_per_epoch: int,
        start_batch: int,
        draws_by_stream: Mapping[int, int],
        pin_memory: bool,
    ) -> BatchLoader:
        config = self.config
        return build_train_loader(
            self.data,
            self.text_tokenizer,
            batch_size=config.batch_size,
            batches_per_epoch=batches_per_epoch,
            num_workers=config.num_workers,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
            start_batch=start_batch,
            draws_by_stream=draws_by_stream,
            num_streams=config.streams(world_size),
            pin_memory=pin_memory,
            raw_pixels=True,
        )

    def updates(self, step: int) -> int:
        return self.config.updates(step)

    def prepare(self, model: nn.Module, batch: Batch, device: torch.device) -> Inputs:
        return self._select_and_copy(self.slots, model, batch, device)

    def _select_and_copy(
        self,
        slots: tuple[int, int],
        model: nn.Module,
        batch: Batch | None,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Inputs:
        """Select the tokens that the model uses on the host, so that nothing waits for the device."""
        assert isinstance(model, FM)
        batch = batch or _EMPTY_BATCH
        # Compiled blocks need the same shapes in every batch.
        selection = model.select_tokens(batch.mod_dict, *slots, generator, pack=not self.config.compile)
        inputs, targets = selection.encoder.counts, selection.decoder.counts
        (samples, num_inputs), num_targets = selection.encoder.modality.shape, selection.decoder.modality.shape[1]
        computed = selection.encoder.num_computed, selection.decoder.num_computed
        return Inputs(
            values=(*to_device(batch, selection, device), slots),
            targets=targets,
            samples=samples,
            tokens=sum(inputs.values()) + sum(targets.values()),
            flops=self._flops_of(model)(samples, num_inputs, num_targets, inputs, targets, computed),
        )

    def _flops_of(self, model: FM) -> StepFlops:
        if self._flops is None or self._flops[0] is not model:
            self._flops = model, StepFlops(model)
        return self._flops[1]

    def loss(self, model: nn.Module, inputs: Inputs) -> Losses:
        mod_dict, selection, slots = inputs.values
        return Losses(*model(mod_dict, *slots, self.config.loss_type, selection=selection))

    def evaluations(self, rank: int, world_size: int, is_main: bool) -> list[Evaluation]:
        """Return the evaluations of each validation set, with the token budgets of the training and with fixed ones.

        Raises:
            UserError: A validation set cannot be read, or has modalities that the model does not have.
        """
        config, data = self.config, self.data
        evaluations = []
        for name, dataset in data.val.items():
            unknown = {*dataset.in_domains} - {*data.in_domains} | {*dataset.out_domains} - {*data.out_domains}
            if unknown:
                raise UserError(
                    f"{data.path}: validation set {name}: no training set has {', '.join(sorted(unknown))} in that role"
                )
            fixed = (config.fixed_eval_input_tokens,) * 2, (config.fixed_eval_target_tokens,) * 2
            kinds = {"train": (dataset.input_tokens_range, dataset.target_tokens_range, config.batch_size)}
            if config.fixed_eval and dataset.masking != "transfer":  # which draws no token budgets
                if leaves_targets(replace(dataset, input_tokens_range=fixed[0], target_tokens_range=fixed[1])):
                    kinds["fixed"] = (*fixed, config.fixed_eval_batch_size)
                elif is_main:
                    log.warning(
                        "validation set %s is not evaluated with fixed budgets: fixed_eval_input_tokens %d takes all "
                        "of its tokens and leaves nothing to predict; lower it, or set --no_fixed_eval",
                        name,
                        fixed[0][0],
                    )
            for kind, (inputs, targets, batch_size) in kinds.items():
                loader = build_eval_loader(
                    dataset,
                    self.text_tokenizer,
                    batch_size=batch_size,
                    num_workers=config.num_workers,
                    rank=rank,
                    world_size=world_size,
                    seed=config.seed,
                    input_tokens_range=inputs,
                    target_tokens_range=targets,
                    raw_pixels=True,
                )
                prepare = partial(self._select_and_copy, (inputs[1], targets[1]))
                evaluations.append(Evaluation(name, kind, loader, prepare))
        return evaluations

    def evaluation_loss(self, sums: Mapping[str, float], targets: Mapping[str, int]) -> float:
        """Average over the modalities with targets or, for ``loss_type`` token, over the tokens.

        In training, a modality of the batch without targets counts as a loss of 0 for ``loss_type`` mod.
        """
        if self.config.loss_type == "mod":
            return super().evaluation_loss(sums, targets)
        return sum(sums.values()) / sum(targets.values())

    def identity(self) -> dict[str, dict[str, Any]]:
        return identity_of(self.data, self.text_tokenizer)

    def facts(self) -> Tables:
        sets, total = self.data.train, sum(self.data.weights.values())
        data, budgets = [], []
        for name, dataset in sets.items():
            ranges = {"input tokens": dataset.input_tokens_range, "target tokens": dataset.target_tokens_range}
            domains = {"inputs": [*dataset.in_domains], "targets": [*dataset.out_domains]}
            data.append({"data set": name, "share of the samples": self.data.weights[name] / total, **domains})
            budgets.append({"data set": name} | {key: "–".join(map(str, sorted({*r}))) for key, r in ranges.items()})
        return {"Data": data, "Token budgets": budgets}

    def step_cost(self, model: nn.Module) -> StepCost:
        """Return the cost of a batch with the mean token budgets."""
        assert isinstance(model, FM)
        config = self.config
        inputs, targets = self.mean_budgets()
        half = config.autocast_dtype != "float32"
        return StepCost(
            flops=StepFlops(model)(config.batch_size, *self.slots, inputs, targets),
            activations=sum(activation_bytes(model, config.batch_size, *self.slots, targets, half).values()),
        )

    def mean_budgets(self) -> tuple[MeanBudgets, MeanBudgets]:
        """Return the mean input and target tokens per modality in a batch, if no text is shorter than its budget."""
        data = self.data
        totals: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        weight_of_all = sum(data.weights.values())
        rng = np.random.default_rng(0)
        for name, dataset in data.train.items():
            masking = build_masking(dataset, self.text_tokenizer)
            share = self.config.batch_size * data.weights[name] / weight_of_all / _BUDGET_DRAWS
            for _ in range(_BUDGET_DRAWS):
                budgets = masking.draw_budgets(rng)
                for total, drawn in zip(totals, (budgets.input, budgets.target), strict=True):
                    for modality, count in drawn.items():
                        total[modality] += count * share  # type: ignore[assignment]
        inputs, targets = totals
        return (
            {modality: inputs[modality] for modality in data.in_domains},
            {modality: targets[modality] for modality in data.out_domains},
        )


# A batch of one sample without tokens.
_NO_MASK = torch.zeros(1, 0, dtype=torch.bool)
_NO_TOKENS = {"input_mask": _NO_MASK, "target_mask": _NO_MASK, "decoder_attention_mask": _NO_MASK.long()}
_EMPTY_BATCH = Batch({"nothing": {"tensor": torch.empty(0), **_NO_TOKENS}})


def to_device(
    batch: Batch, selection: TokenSelection, device: torch.device
) -> tuple[dict[str, dict[str, Tensor]], TokenSelection]:
    """Copy the values and selected tokens of a batch to ``device``, without waiting if they are in page-locked memory.

    The masks are not copied, because the selection has all that the model needs of them. Images are copied in 8 bits
    and normalised on the device.
    """
    values = {}
    for name, entry in batch.mod_dict.items():
        tensor = entry["tensor"].to(device, non_blocking=True)
        if tensor.dtype == torch.uint8:
            tensor = normalise(tensor, *batch.scaling[name])
        values[name] = {"tensor": tensor}
    return values, selection.to(device, non_blocking=True)


def normalise(pixels: Tensor, scale: Sequence[float], bias: Sequence[float]) -> Tensor:
    """Convert (B, C, H, W) in 8 bits to float32, with exactly the bits that the loader would have computed."""
    # Scale and bias are numbers, because tensors would have to be copied to the device first.
    channels = zip(pixels.unbind(1), scale, bias, strict=True)
    return torch.stack([channel.float() * s + b for channel, s, b in channels], dim=1)
