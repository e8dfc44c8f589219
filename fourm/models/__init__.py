"""4M models."""

from fourm.models.flops import StepFlops
from fourm.models.fm import FM
from fourm.models.fm_vit import FMViT, FourMViT
from fourm.models.fourm import FourM
from fourm.models.registry import MODEL_NAMES, count_parameters, model_config
from fourm.models.token_selection import TokenSelection, select_tokens

__all__ = [
    "FM",
    "MODEL_NAMES",
    "FMViT",
    "FourM",
    "FourMViT",
    "StepFlops",
    "TokenSelection",
    "count_parameters",
    "model_config",
    "select_tokens",
]
