"""A simulated GPU, for machines without one.

In :func:`simulated_gpu`, ``"cuda"`` means tensors that say they are on a GPU, compute on the CPU, and refuse what a GPU
refuses: an operation on tensors of both devices raises :class:`WrongDevice`. Forgetting to move a tensor is the usual
fault of code that never ran on a GPU, and does not depend on kernels, speed or precision, which are those of the CPU.

Not simulated: CUDA graphs, streams, profiles, ``torch.compile``, several processes, and operations in a backward pass,
which are not checked, because autograd creates tensors where it believes the others to be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.optim import optimizer
from torch.utils import _foreach_utils as foreach
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
_MIXED = {
    _aten._to_copy.default,
    _aten.copy_.default,
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
"""The operations that may have tensors on both devices: copies, and indices that are on the CPU."""
_real = {name: getattr(Tensor, name) for name in ("to", "tolist", "backward")}


class WrongDevice(RuntimeError):
    """An operation with tensors on both devices."""


class OnGpu(Tensor):
    """A tensor on the simulated GPU. In C++ it is on the CPU, where autograd and indexing need a real device."""

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGpu:
        layout = values.shape, values.stride(), values.storage_offset()
        return Tensor._make_wrapper_subclass(cls, *layout, dtype=values.dtype, device=values.device)

    def __init__(self, values: Tensor):
        self.values_ = values

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnGpu({self.values_})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Catches the operations that create tensors, which have no ``OnGpu`` among their arguments."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


_backward_passes: list[Tensor] = []  # that are running


def _run(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Check and run an operation on the CPU."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_gpu = any(isinstance(x, OnGpu) for x in tensors)
    if kwargs.get("device") is not None:
        result_on_gpu = _is_gpu(kwargs["device"])
        kwargs = kwargs | {"device": torch.device("cpu"), "pin_memory": False}
    else:
        result_on_gpu = isinstance(args[0], OnGpu) if operation is _aten.copy_.default else on_gpu
    if _backward_passes:
        result_on_gpu = True
    elif on_gpu and operation not in _MIXED and any(x.ndim and not isinstance(x, OnGpu) for x in tensors):
        raise WrongDevice(f"{operation} of {', '.join(f'{tuple(x.shape)} on {x.device}' for x in tensors)}")
    result = operation(*tree_map(_values, args), **tree_map(_values, kwargs))
    own = {id(_values(x)): x for x in tensors}  # an operation in place returns its argument

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return own[id(x)] if id(x) in own else OnGpu(x) if result_on_gpu else x

    return tree_map(wrapped, result)


def _values(x: Any) -> Any:
    return x.values_ if isinstance(x, OnGpu) else x


def _is_gpu(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return OnGpu(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Tensor:
        return gradient.values_.clone()


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        return x.values_.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return OnGpu(gradient.clone())


def _target(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, torch.dtype | None]:
    """Return the device and the type among the arguments of ``to``."""
    given = [
        part for x in (*args, *kwargs.values()) for part in ((x.device, x.dtype) if isinstance(x, Tensor) else [x])
    ]
    device = next((x for x in given if isinstance(x, (str, torch.device))), None)
    return device, next((x for x in given if isinstance(x, torch.dtype)), None)


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype = _target(args, kwargs)
    moved = self
    if _is_gpu(device) and not isinstance(self, OnGpu):
        moved = _ToGpu.apply(self)
    elif device is not None and not _is_gpu(device):
        moved = _real["to"](_ToHost.apply(self) if isinstance(self, OnGpu) else self, device)
    return _real["to"](moved, dtype, copy=kwargs.get("copy", False)) if dtype or "copy" in kwargs else moved


def _module_to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Replace parameters and buffers; those that several modules share stay shared."""
    device, dtype = _target(args, kwargs)
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def move(old: Tensor) -> Tensor:
        if id(old) not in moved:
            new = old.detach().to(device, dtype if old.is_floating_point() else None)
            moved[id(old)] = old, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        return moved[id(old)][1]

    for module in self.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: move(tensor) for name, tensor in tensors.items() if tensor is not None})
    return self


def _backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
    _backward_passes.append(self)
    try:
        _real["backward"](self, *args, **kwargs)
    finally:
        _backward_passes.pop()


def _created_on_host(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` copies to a device in C++, where no mode sees it."""

    def created(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if not _is_gpu(device):
            return create(data, *args, device=device, **kwargs)
        return create(data, *args, device="cpu", **kwargs).to(device)

    return created


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu"):
        self._device = GPU if _is_gpu(device) else torch.device("cpu")

    device = property(lambda self: self._device)


class _Event:
    def __init__(self, enable_timing: bool = False):
        self.enable_timing = enable_timing

    def record(self, stream: Any = None) -> None:
        """Do nothing: operations are done when they are called."""

    def synchronize(self) -> None:
        """Do nothing either."""

    def elapsed_time(self, other: _Event) -> float:
        assert self.enable_timing and other.enable_timing
        return 1.0


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if _is_gpu(device_type) else device_type, *args, **kwargs)


def _as_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda device_type="cuda": function("cpu" if _is_gpu(device_type) else device_type)


def _grouped(lists: Any, with_indices: bool = False) -> dict:
    """Group parameters for an optimizer by what they say of their device, not by what it is in C++."""
    groups = _real_groups(lists, with_indices)
    return {(GPU if isinstance(group[0][0][0], OnGpu) else key[0], key[1]): group for key, group in groups.items()}


_real_groups = foreach._group_tensors_by_device_and_dtype


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """Let this process see a GPU, in this thread."""
    cuda = {
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "Event": _Event,
    }
    methods = {
        "backward": _backward,
        "cpu": lambda self: self.to("cpu"),
        "cuda": lambda self, device=None: self.to(GPU),
        "pin_memory": lambda self, device=None: self,
        "to": _to,
        "tolist": lambda self: _real["tolist"](_values(self)),
    }
    functions = {
        "autocast": _Autocast,
        "as_tensor": _created_on_host(torch.as_tensor),
        "Generator": _Generator,
        "get_autocast_dtype": _as_on_cpu(torch.get_autocast_dtype),
        # The tensors of an inference cannot be wrapped.
        "inference_mode": lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext(),
        "is_autocast_enabled": _as_on_cpu(torch.is_autocast_enabled),
        "tensor": _created_on_host(torch.tensor),
    }
    checkpoints = {
        # They copy storages and use streams.
        "staging.DefaultStager.stage": lambda self, state: {
            name: x.detach().to("cpu", copy=True) for name, x in state.items()
        },
        "filesystem._OverlappingCpuLoader": lambda resolve, **options: filesystem._SerialCpuLoader(resolve),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(mock.patch.multiple(Tensor, **methods))
        stack.enter_context(mock.patch.multiple(torch, **functions))
        stack.enter_context(
            mock.patch.multiple(
                nn.Module,
                to=_module_to,
                cpu=lambda self: self.to("cpu"),
                cuda=lambda self, device=None: self.to(GPU),
            )
        )
        available = _as_on_cpu(torch.amp.is_autocast_available)
        stack.enter_context(mock.patch.object(torch.amp, "is_autocast_available", available))
        for module in (foreach, optimizer):
            stack.enter_context(mock.patch.object(module, "_group_tensors_by_device_and_dtype", _grouped))
        check = "_accelerator_graph_capture_health_check"
        stack.enter_context(mock.patch.object(torch.optim.Optimizer, check, lambda self: None))
        for name, replacement in checkpoints.items():
            stack.enter_context(mock.patch(f"torch.distributed.checkpoint.{name}", replacement))
        stack.enter_context(_Factories())
        yield
