"""The optimizer: its parameter groups, and a step that clips, unscales or skips without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fourm.train.device import DeviceOptions
from fourm.train.muon import Muon, MuonOptions, block_matrices
from fourm.train.parallel import Strategy
from fourm.utils.errors import UserError
from fourm.utils.options import option

_INITIAL_SCALE, _GROWTH_INTERVAL = 2.0**16, 2000


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(MuonOptions, DeviceOptions):
    """Optimizer"""

    opt: Literal["adamw", "sgd", "muon"] = option(
        "optimizer; muon trains the matrices of the blocks with Muon, and everything else with AdamW",
        "adamw",
        fixed=True,
    )
    opt_eps: float = option("AdamW epsilon", 1e-8, at_least=1e-30, at_most=1.0, fixed=True)
    opt_betas: tuple[float, float] = option("AdamW betas", (0.9, 0.95), at_least=0, below=1, fixed=True)
    momentum: float = option("SGD momentum", 0.9, at_least=0, below=1, fixed=True)
    clip_grad: float | None = option(
        "maximum of the global gradient norm, to which gradients are clipped", None, above=0, fixed=True
    )
    skip_grad: float | None = option("skip steps whose gradient norm exceeds this", None, above=0, fixed=True)
    skip_nan_grad: bool = option("no effect: steps whose loss or gradient norm is not finite are always skipped", False)
    max_skipped_steps: int = option(
        "stop after this many steps in a row whose loss or gradient norm was not finite", 10, at_least=1
    )
    compute_grad_norm: bool = option("no effect: the gradient norm is always logged", True)

    def check(self) -> None:
        if len(self.opt_betas) != 2:
            raise UserError(f"'opt_betas' must be two numbers, not {list(self.opt_betas)}")


def build_optimizer(
    model: nn.Module,
    options: OptimizerOptions,
    blocks: Sequence[nn.Module] = (),
    parallel: Strategy | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer, with weight decay on everything except vectors (norms, biases).

    Frozen parameters are included, because they are trained in a later phase. The ``algorithm`` of a parameter group
    tells which states its parameters have.

    Args:
        blocks: The blocks of the model, see :meth:`Task.blocks`; only Muon needs them.
        parallel: How processes share the work of Muon.

    Raises:
        UserError: There are no matrices for Muon.
    """
    if options.opt == "sgd":
        optimizer = torch.optim.SGD(_groups(model.parameters(), "sgd"), lr=0.0, momentum=options.momentum, fused=True)
        if options.momentum:
            # SGD would leave the buffers uninitialised if its first step were skipped.
            for parameter in model.parameters():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    matrices = block_matrices(blocks) if options.opt == "muon" else []
    known = set(matrices)
    rest = [parameter for parameter in model.parameters() if parameter not in known]
    adamw = torch.optim.AdamW(_groups(rest, "adamw"), lr=0.0, betas=options.opt_betas, eps=options.opt_eps, fused=True)
    if options.opt == "adamw":
        return adamw
    if not matrices:
        raise UserError("'opt' muon: the model has no blocks with matrices that Muon could train; set it to adamw")
    assert parallel is not None
    (group,) = _groups(matrices, "muon", options.muon_lr_scale)
    return Muon(group, adamw, options.muon_momentum, parallel)


def _groups(parameters: Iterable[nn.Parameter], algorithm: str, lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """Return parameter groups: what weight decay applies to, and the vectors."""
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for parameter in parameters:
        groups["decay" if parameter.ndim > 1 else "no_decay"].append(parameter)
    return [
        {
            "params": members,
            "name": name,
            "algorithm": algorithm,
            "lr_scale": lr_scale,
            "weight_decay_scale": float(name == "decay"),
        }
        for name, members in groups.items()
        if members
    ]


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate and weight decay of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay * group["weight_decay_scale"]


class GradientStep:
    """An optimizer step that clips the gradients if asked to, and is skipped if they are not finite.

    Whether to skip is decided on the device: the fused optimizers read ``found_inf`` (1 leaves everything as it is) and
    ``grad_scale`` (a divisor of the gradients), as they do for ``torch.amp.GradScaler``. Clipping is part of that
    divisor and costs no pass over the gradients. All processes skip the same steps, because they have the same norm.

    Attributes:
        scale: The factor of the losses in the backward pass; 1 unless the precision is float16. It doubles after 2000
            steps in a row without an overflow, and an overflow halves it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, options: OptimizerOptions, parallel: Strategy):
        self._optimizer, self._parallel = optimizer, parallel
        self._half = options.autocast_dtype == "float16"
        self._clip, self._max_norm = options.clip_grad, options.skip_grad
        self.scale = torch.tensor(_INITIAL_SCALE if self._half else 1.0, device=parallel.device)
        self._good = torch.zeros_like(self.scale)

    def __call__(self, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Do the step and free the gradients.

        Returns:
            The norm of the unscaled gradients, and 1 if the step was skipped, otherwise 0.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = self._parallel.gradient_norm(gradients) / self.scale
        finite = norm.isfinite()
        skip = (~finite).float()
        if self._max_norm is not None:
            skip = torch.maximum(skip, (~(norm <= self._max_norm)).float())
        divisor = self.scale if self._half else None
        if self._clip is not None:
            divisor = self.scale * ((norm + 1e-6) / self._clip).clamp(min=1)
        self._optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        self._optimizer.found_inf = skip  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._half:
            self._adapt_scale(finite)
        return norm, skip

    def failed(self, norm: Tensor) -> Tensor:
        """Return 1 if the last step, with gradient norm ``norm``, failed because the norm was not finite, otherwise 0.

        Overflows in float16 do not count as long as a smaller loss scale can prevent them.
        """
        failed = ~norm.isfinite()
        return (failed & (self.scale < 1) if self._half else failed).float()

    def _adapt_scale(self, finite: Tensor) -> None:
        self._good = torch.where(finite, self._good + 1, 0)
        grown = torch.where(self._good == _GROWTH_INTERVAL, self.scale * 2, self.scale)
        self.scale = torch.where(finite, grown, self.scale / 2)
        self._good = torch.where(self._good == _GROWTH_INTERVAL, 0, self._good)

    def state(self) -> list[float]:
        return [self.scale.item(), self._good.item()]

    def load_state(self, state: Sequence[float]) -> None:
        self.scale, self._good = (torch.tensor(value, device=self.scale.device) for value in state)
