"""4M models."""

from fourm.models.flops import StepFlops
from fourm.models.fm import FM, FourM
from fourm.models.fm_vit import FMViT, FourMViT
from fourm.models.registry import MODEL_NAMES, count_parameters, model_config
from fourm.models.token_selection import TokenPlan, plan_tokens

__all__ = [
    "FM", "MODEL_NAMES", "FMViT", "FourM", "FourMViT", "StepFlops", "TokenPlan", "count_parameters", "model_config",
    "plan_tokens",
]  # fmt: skip
