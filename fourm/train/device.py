"""Precision, the way of a batch to the device, and what a device can do."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fourm.data.unified_datasets import Batch
from fourm.models import TokenPlan
from fourm.train.config import TrainConfig


class Gpu(NamedTuple):
    """Figures of the manufacturer.

    Attributes:
        tflops: 10¹² operations per second of dense matrix products in bfloat16.
        memory: GB.
    """

    tflops: float
    memory: float


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h

# Where one name is part of another, the longer one comes first.
GPUS = {
    "H100 PCIe": Gpu(756, 80), "H100 NVL": Gpu(835, 94), "H100": Gpu(989, 80), "H200": Gpu(989, 141),
    "GH200": Gpu(989, 96), "B200": Gpu(2250, 180), "A100": Gpu(312, 80), "A10": Gpu(125, 24), "A10G": Gpu(70, 24),
    "L40S": Gpu(362, 48), "L4": Gpu(121, 24), "MI300X": Gpu(1307, 192), "MI250X": Gpu(383, 128),
}  # fmt: skip


def peak_tflops(config: TrainConfig, device: torch.device) -> float | None:
    """10¹² operations per second that the device could do at best; None if that is not known."""
    if config.peak_tflops is not None:
        return config.peak_tflops
    if device.type != "cuda" or config.autocast_dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.tflops for known, gpu in GPUS.items() if re.search(rf"\b{known}\b", name)), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU since the last call, else the most this process ever had resident."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the rest of this process; elsewhere than with glibc nothing happens.

    Else it returns every large tensor to the system, which clears its pages again when the next step asks for them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The forward pass in the configured precision; parameters and loss stay in float32."""
    dtype = getattr(torch, config.autocast_dtype)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(batch: Batch, plan: TokenPlan, device: torch.device) -> tuple[dict[str, dict[str, Tensor]], TokenPlan]:
    """Values and plan of a batch on ``device``, from page-locked memory without waiting.

    The masks stay behind: the plan says all that the model needs of them. Pictures travel in 8 bits and are normalised
    there.
    """
    values = {}
    for name, entry in batch.mod_dict.items():
        tensor = entry["tensor"].to(device, non_blocking=True)
        if tensor.dtype == torch.uint8:
            tensor = normalised(tensor, *batch.scaling[name])
        values[name] = {"tensor": tensor}
    return values, plan.to(device, non_blocking=True)


def normalised(pixels: Tensor, scale: Sequence[float], bias: Sequence[float]) -> Tensor:
    """(B, C, H, W) of 8 bits → float32, bit for bit as the loader would have done it."""
    # Numbers, not tensors, for scale and bias: these would have to be copied to the device first.
    channels = zip(pixels.unbind(1), scale, bias, strict=True)
    return torch.stack([channel.float() * s + b for channel, s, b in channels], dim=1)
