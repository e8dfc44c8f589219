"""Data: what a modality is, how it is read, cropped alike, masked and batched."""

from fourm.data.data_config import DataConfig, DatasetConfig, build_sample_transform, load_data_config
from fourm.data.modality_info import (
    MODALITY_INFO,
    MODALITY_TRANSFORMS,
    Modality,
    register_modality,
    resolve_modalities,
)
from fourm.data.modality_transforms import UnifiedDataTransform

__all__ = [
    "MODALITY_INFO", "MODALITY_TRANSFORMS", "DataConfig", "DatasetConfig", "Modality", "UnifiedDataTransform",
    "build_sample_transform", "load_data_config", "register_modality", "resolve_modalities",
]  # fmt: skip
