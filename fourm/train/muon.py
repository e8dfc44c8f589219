"""Muon for the matrices of the blocks and AdamW for everything else, as one optimizer.

Muon moves a matrix by the orthogonal matrix that is nearest to its momentum (https://arxiv.org/abs/2502.16982, whose
scale of the update makes it about as large as one of AdamW, so that both share learning rate and weight decay). The
Newton-Schulz iteration that finds it is that of ``torch.optim.Muon``. It needs whole matrices and nearly all of the
time, so each process does it for its share of them (:meth:`Strategy.map_matrices`). Everything else works on single
elements, and each process does it for the parameters, or shards of parameters, that it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourm.train.parallel import Strategy
from fourm.utils.options import Options, option

_RMS = 0.2  # of the elements of an update of AdamW, as measured in the paper


@dataclass(frozen=True, kw_only=True)
class MuonOptions(Options):
    """Muon"""

    muon_momentum: float = option("Muon momentum", 0.95, at_least=0, below=1, fixed=True)
    muon_lr_scale: float = option(
        "learning rate of the matrices that Muon trains, relative to that of the rest", 1.0, above=0, fixed=True
    )


class Muon(torch.optim.Optimizer):
    """Trains matrices with Muon, and the parameters of ``adamw`` with that.

    The parameter groups and states of ``adamw`` become those of this optimizer as well. Like the fused optimizers of
    torch, it divides gradients by ``grad_scale`` and changes nothing if ``found_inf`` is 1, without waiting for the
    device.

    Args:
        matrices: A parameter group of matrices.
        adamw: The optimizer of the other parameters.
        momentum: The share of the momentum that a step keeps.
        parallel: How processes share the work.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, matrices: dict[str, Any], adamw: torch.optim.Optimizer, momentum: float, parallel: Strategy):
        super().__init__([matrices], {"lr": 0.0, "weight_decay": 0.0})
        self._adamw, self._momentum, self._parallel = adamw, momentum, parallel
        self.param_groups += adamw.param_groups
        self.state = adamw.state
        for matrix in matrices["params"]:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        self._adamw.grad_scale, self._adamw.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        group = self.param_groups[0]
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        if not matrices:
            return  # they are frozen
        skip = torch.zeros((), device=matrices[0].device) if self.found_inf is None else self.found_inf
        updates = [self._follow_momentum(matrix, skip) for matrix in matrices]
        directions = self._parallel.map_matrices(_orthogonalise, updates, [matrix.shape for matrix in matrices])
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        for matrix, direction in zip(matrices, directions, strict=True):
            weights, scale = _local(matrix), lr * _RMS * math.sqrt(max(matrix.shape))
            weights.mul_(1 - decay * (1 - skip)).addcmul_(direction.float(), (skip - 1) * scale)

    def _follow_momentum(self, matrix: Tensor, skip: Tensor) -> Tensor:
        """Add the gradient to the momentum; return what is to be orthogonalised, in bfloat16 as torch does it."""
        assert matrix.grad is not None
        gradient, momentum = _local(matrix.grad), _local(self.state[matrix]["momentum_buffer"])
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        gradient = gradient.masked_fill(skip > 0, 0)  # it may not be finite
        momentum.lerp_(gradient, (1 - self._momentum) * (1 - skip))
        return gradient.lerp(momentum, self._momentum).bfloat16()  # Nesterov's momentum


def block_matrices(blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the matrices of the blocks of a model, which are what Muon trains."""
    return list(dict.fromkeys(p for block in blocks for p in block.parameters() if p.ndim == 2))


def _orthogonalise(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix near ``matrix``, (A, B) in bfloat16.

    This is the step of ``torch.optim.Muon`` from zeros against ``matrix``, which is not scaled if A <= B.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    result = nn.Parameter(torch.zeros_like(wide))
    result.grad = wide
    torch.optim.Muon([result], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    return -(result if wide is matrix else result.T).detach()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
