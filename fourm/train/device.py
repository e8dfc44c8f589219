"""Precision, and the way of a batch to the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fourm.models import TokenPlan
from fourm.train.config import TrainConfig


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The forward pass in the configured precision; parameters and loss stay in float32."""
    dtype = getattr(torch, config.autocast_dtype)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(
    mod_dict: dict[str, dict[str, Tensor]], plan: TokenPlan, device: torch.device
) -> tuple[dict[str, dict[str, Tensor]], TokenPlan]:
    """Values and plan of a batch on ``device``, from page-locked memory without waiting. The masks stay behind: the plan
    says all that the model needs of them."""
    values = {name: {"tensor": entry["tensor"].to(device, non_blocking=True)} for name, entry in mod_dict.items()}
    return values, plan.to(device, non_blocking=True)
