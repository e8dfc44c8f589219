"""Precision, and what a device can do."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from fourm.utils.options import Options, option

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Device, precision and memory"""

    device: str = option("'auto' = cuda where there is one, else cpu", "auto")
    dtype: Literal["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"] = option(
        "autocast precision; parameters stay float32", "bfloat16", fixed=True
    )
    use_act_checkpoint: bool = option("recompute the blocks' activations in the backward pass", False)
    act_checkpoint_every: int = option("with use_act_checkpoint: only in every so many-th block", 1, at_least=1)
    compile: bool = option("torch.compile every block", False)
    peak_tflops: float | None = option(
        "10^12 operations per second that a device can do, of which MFU is the share (default: by the name of the GPU)",
        None,
        above=0,
    )

    @property
    def autocast_dtype(self) -> str:
        """``dtype`` without its abbreviations, a name in torch."""
        return _SHORT_DTYPES.get(self.dtype, self.dtype)


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


def peak_tflops(config: DeviceOptions, device: torch.device) -> float | None:
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


def autocast(config: DeviceOptions, device: torch.device) -> torch.autocast:
    """The forward pass in the configured precision; parameters and loss stay in float32."""
    dtype = getattr(torch, config.autocast_dtype)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
