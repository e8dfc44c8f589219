"""Losses on the validation sets: with the training's token budgets and with fixed ones, always on the same masks."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from fourm.data.data_config import DataConfig, leaves_targets
from fourm.data.unified_datasets import Batch, BatchLoader, build_eval_loader
from fourm.models import FM
from fourm.train.config import TrainConfig
from fourm.train.device import autocast, to_device
from fourm.train.metrics import count_missing, missing_shares
from fourm.train.parallel import Processes, Strategy
from fourm.train.waiting import Waiting
from fourm.utils.errors import DataError, UserError

log = logging.getLogger("fourm")


@dataclass(frozen=True)
class Evaluation:
    """One validation set with one kind of budgets, ``train`` or ``fixed``."""

    dataset: str
    kind: str
    loader: BatchLoader
    num_input_tokens: int
    num_target_tokens: int


def build_evaluations(
    config: TrainConfig, data: DataConfig, text_tokenizer: Any, parallel: Processes
) -> list[Evaluation]:
    """What is to be evaluated. Without ``dist_eval`` every process goes through all samples.

    Raises:
        UserError: a validation set that cannot be read, or has modalities that the model lacks.
    """
    rank, world_size = (parallel.rank, parallel.world_size) if config.dist_eval else (0, 1)
    evaluations = []
    for name, dataset in data.val.items():
        lacking = {*dataset.in_domains} - {*data.in_domains} | {*dataset.out_domains} - {*data.out_domains}
        if lacking:
            raise UserError(
                f"{data.path}: validation set {name}: no training set has {', '.join(sorted(lacking))} in that role"
            )
        fixed = (config.fixed_eval_input_tokens,) * 2, (config.fixed_eval_target_tokens,) * 2
        kinds = {"train": (dataset.input_tokens_range, dataset.target_tokens_range, config.batch_size)}
        if config.fixed_eval and dataset.masking != "transfer":  # where nothing is drawn that could be fixed
            if leaves_targets(replace(dataset, input_tokens_range=fixed[0], target_tokens_range=fixed[1])):
                kinds["fixed"] = (*fixed, config.fixed_eval_batch_size)
            elif parallel.is_main:
                log.warning(
                    "validation set %s is not evaluated with fixed budgets: fixed_eval_input_tokens %d take all of its tokens "
                    "and leave nothing to predict; lower it, or set --no_fixed_eval", name, fixed[0][0],
                )  # fmt: skip
        for kind, (inputs, targets, batch_size) in kinds.items():
            loader = build_eval_loader(
                dataset, text_tokenizer, batch_size=batch_size, num_workers=config.num_workers, rank=rank,
                world_size=world_size, seed=config.seed, input_tokens_range=inputs, target_tokens_range=targets,
                raw_pixels=True,
            )  # fmt: skip
            evaluations.append(Evaluation(name, kind, loader, inputs[1], targets[1]))
    return evaluations


# A batch of one sample without any tokens.
_NO_MASK = torch.zeros(1, 0, dtype=torch.bool)
_NO_TOKENS = {"input_mask": _NO_MASK, "target_mask": _NO_MASK, "decoder_attention_mask": _NO_MASK.long()}
_NOTHING = Batch({"nothing": {"tensor": torch.empty(0), **_NO_TOKENS}}, position={})


@torch.no_grad()
def evaluate(
    model: FM, evaluation: Evaluation, config: TrainConfig, parallel: Strategy, waiting: Waiting
) -> dict[str, Any]:  # fmt: skip
    """Go through a validation set once.

    Every target token counts the same, so that neither the batch size nor the number of processes matters.

    Returns:
        ``loss`` (the mean over the modalities that have targets or, for ``loss_type`` token, over the tokens),
        ``per_modality``, ``tokens``, ``samples``, ``bad_samples`` by data set and reason, and ``missing``, the share of
        samples without a modality, if samples may lack something.

    Raises:
        DataError: there is nothing to predict.
        Stopped: a process was told to stop.
    """
    was_training = model.training
    model.eval()
    inputs, targets = evaluation.num_input_tokens, evaluation.num_target_tokens
    order = torch.Generator().manual_seed(config.seed)
    sums, counts, bad, present = totals = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for batch in parallel.in_step(waiting.all_of(evaluation.loader), model):
        plan = model.plan((batch or _NOTHING).mod_dict, inputs, targets, generator=order)
        with autocast(config, parallel.device):
            mod_dict, plan_there = to_device(batch or _NOTHING, plan, parallel.device)
            _, losses = model(mod_dict, inputs, targets, config.loss_type, plan=plan_there)
        if batch is None:
            continue
        means = torch.stack([losses[name].double() for name in losses]).tolist()
        counts.update(plan.decoder.counts)
        counts["samples"] += len(plan.decoder.modality)
        bad.update(batch.position["skipped"])
        count_missing(present, batch.position)
        sums.update({name: mean * plan.decoder.counts[name] for name, mean in zip(losses, means, strict=True)})
    model.train(was_training)
    if config.dist_eval:
        shares = parallel.gather(totals)
        sums, counts, bad, present = totals = Counter(), Counter(), Counter(), Counter()
        for share in shares:
            for total, part in zip(totals, share, strict=True):
                total.update(part)
    samples, tokens = counts.pop("samples", 0), counts
    if not sum(tokens.values()):
        raise DataError(
            f"validation set {evaluation.dataset}: {samples} samples could be read, but there are no targets"
        )
    per_modality = {name: sums[name] / tokens[name] for name in sorted(tokens) if tokens[name]}
    by_modality = sum(per_modality.values()) / len(per_modality)
    return {
        "loss": by_modality if config.loss_type == "mod" else sum(sums.values()) / sum(tokens.values()),
        "per_modality": per_modality,
        "tokens": sum(tokens.values()),
        "samples": samples,
        "bad_samples": dict(bad),
        "missing": missing_shares(present),
    }
