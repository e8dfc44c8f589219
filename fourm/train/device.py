"""Precision, memory and peak performance of devices."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from fourm.utils.options import Options, option

SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Device, precision and memory"""

    device: str = option("'auto' = cuda if there is a GPU, otherwise cpu", "auto")
    dtype: Literal["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"] = option(
        "autocast precision; parameters stay float32", "bfloat16", fixed=True
    )
    use_act_checkpoint: bool = option("recompute the activations of the blocks in the backward pass", False)
    act_checkpoint_every: int = option("use_act_checkpoint applies to every n-th block", 1, at_least=1)
    compile: bool = option("torch.compile every block, and the cross-entropy of the tokens", False)
    peak_tflops: float | None = option(
        "10^12 operations per second that a device can do, for the MFU (default: from the name of the GPU)",
        None,
        above=0,
    )

    @property
    def autocast_dtype(self) -> str:
        """``dtype`` as torch names it."""
        return SHORT_DTYPES.get(self.dtype, self.dtype)


class Gpu(NamedTuple):
    """Specifications of a GPU.

    Attributes:
        tflops: 10¹² operations per second in dense matrix products in bfloat16.
        memory: Memory in GB.
    """

    tflops: float
    memory: float


# If one name is part of another, the longer one comes first.
GPUS = {
    "H100 PCIe": Gpu(756, 80),
    "H100 NVL": Gpu(835, 94),
    "H100": Gpu(989, 80),
    "H200": Gpu(989, 141),
    "GH200": Gpu(989, 96),
    "B200": Gpu(2250, 180),
    "A100": Gpu(312, 80),
    "A10": Gpu(125, 24),
    "A10G": Gpu(70, 24),
    "L40S": Gpu(362, 48),
    "L4": Gpu(121, 24),
    "MI300X": Gpu(1307, 192),
    "MI250X": Gpu(383, 128),
}


def peak_tflops(config: DeviceOptions, device: torch.device) -> float | None:
    """Return the peak of the device in 10¹² operations per second, or None if it is not known."""
    if config.peak_tflops is not None:
        return config.peak_tflops
    if device.type != "cuda" or config.autocast_dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.tflops for known, gpu in GPUS.items() if re.search(rf"\b{known}\b", name)), None)


def peak_memory(device: torch.device) -> int:
    """Return the peak of the allocated bytes of a GPU since the last call, or of the resident bytes of the process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def autocast(config: DeviceOptions, device: torch.device) -> torch.autocast:
    """Return a context for the forward pass in the configured precision; parameters and loss stay in float32."""
    dtype = getattr(torch, config.autocast_dtype)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
