"""The optimizer and its two parameter groups, with and without weight decay."""

from __future__ import annotations

import torch
from torch import nn

from fourm.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay on everything but vectors (norms, biases). Frozen parameters are included: a phase may thaw them."""
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for parameter in model.parameters():
        groups["decay" if parameter.ndim > 1 else "no_decay"].append(parameter)
    described = [
        {"params": parameters, "name": name, "weight_decay_scale": float(name == "decay")}
        for name, parameters in groups.items()
        if parameters
    ]
    if config.opt == "sgd":
        return torch.optim.SGD(described, lr=0.0, momentum=config.momentum)
    return torch.optim.AdamW(described, lr=0.0, betas=config.opt_betas, eps=config.opt_eps, fused=True)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["weight_decay_scale"]
