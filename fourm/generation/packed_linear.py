"""Linear layers whose weights are kept on the CPU in the order in which their product reads them fastest.

A matrix product on a CPU first copies the weights into the order of its kernel. Generation multiplies by the same
weights in every step, often with only a few tokens, so that it pays to copy them once: for oneDNN, or, if a single
token is multiplied, which takes the time of reading the weights, with the columns of the weights as rows.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourm.utils.memory import physical_memory

_MAX_SHARE = 1 / 4  # of the machine's memory, for the copies of all weights


def supported() -> bool:
    """Return whether PyTorch can reorder weights here; the operators are those that ``torch.compile`` uses."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class PackedLinears:
    """Multiplies by packed copies of the weights of a model's linear layers.

    A layer gets its copy when it is used for the second time, so that a single step does not wait for copies.
    """

    def __init__(self) -> None:
        self._layers: dict[nn.Linear, _PackedLinear] = {}
        self.limit = int(_MAX_SHARE * physical_memory())

    @property
    def nbytes(self) -> int:
        """Memory of all copies, in bytes."""
        return sum(layer.nbytes for layer in self._layers.values())

    def has_room(self, weight: Tensor) -> bool:
        """Return whether a copy of ``weight`` would stay within the limit."""
        return self.nbytes + weight.nbytes <= self.limit

    def check(self) -> None:
        """Compare each copy with its weights, which may have changed, when it is used for the next time."""
        for layer in self._layers.values():
            layer.checked = False

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let the linear layers of ``model`` use their copies.

        This has no effect under autocast, on compiled models, on weights that are not ordinary float32 tensors on the
        CPU, and where :func:`supported` is False.
        """
        modules = [*model.modules()]
        usable = supported() and not torch.is_autocast_enabled("cpu")
        usable = usable and not any(module._compiled_call_impl for module in modules)
        linears = [m for m in modules if type(m) is nn.Linear and _is_ordinary(m.weight)] if usable else []
        for linear in linears:
            layer = self._layers.setdefault(linear, _PackedLinear(linear, self))
            linear.forward = layer.forward  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for linear in linears:
                del linear.forward  # the method of the class again


class _Order(NamedTuple):
    """An order of the weights: copies them, and multiplies ``x`` by the copy, (…, in) and the bias → (…, out)."""

    copy: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _multiply_transposed(x: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    y = (x.reshape(1, -1) @ columns).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _multiply_pair(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply two rows as the columns of a matrix, which is faster than either copy."""
    y = (weight @ x.reshape(2, -1).t()).t().reshape(*x.shape[:-1], -1)
    return y.contiguous() if bias is None else y + bias


_ORDERS: Mapping[str, _Order] = {
    "packed": _Order(lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight), _multiply_packed),
    "transposed": _Order(lambda weight: weight.t().contiguous(), _multiply_transposed),
}


class _PackedLinear:
    def __init__(self, linear: nn.Linear, owner: PackedLinears):
        self._linear, self._owner = linear, owner
        self._copies: dict[str, Tensor] = {}
        self._uses: Counter[str] = Counter()
        self._state: Any = None
        self.checked = False

    @property
    def nbytes(self) -> int:
        return len(self._copies) * self._linear.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._linear.weight, self._linear.bias
        if x.numel() == 0 or x.dtype != torch.float32:
            return F.linear(x, weight, bias)
        rows = x.numel() // x.shape[-1]
        if rows == 2:
            return _multiply_pair(x, weight, bias)
        order = "transposed" if rows == 1 and weight.shape[0] >= weight.shape[1] else "packed"
        self._uses[order] += 1
        if self._copies and not self.checked and self._state != _state(weight):
            self._copies.clear()
        self.checked = True
        if order not in self._copies and self._uses[order] > 1 and self._owner.has_room(weight):
            self._copies[order], self._state = _ORDERS[order].copy(weight.detach()), _state(weight)
        if order not in self._copies:
            return F.linear(x, weight, bias)
        return _ORDERS[order].multiply(x, self._copies[order], bias)


def _is_ordinary(weight: Tensor) -> bool:
    kind = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
    return kind and not weight.is_inference()


def _state(weight: Tensor) -> tuple[int, int, float]:
    """Return what changes with the weights. Writing to ``weight.data`` does not change the version."""
    return weight.data_ptr(), weight._version, weight.detach().sum().item()
