"""Data loading: modalities, and how they are read, cropped together, masked and batched."""

from fourm.data.data_config import DataConfig, DatasetConfig, build_sample_transform, load_data_config
from fourm.data.image_augmenter import (
    AbstractImageAugmenter,
    CenterCropImageAugmenter,
    EmptyAugmenter,
    PreTokenizedImageAugmenter,
    RandomCropImageAugmenter,
)
from fourm.data.masking import UnifiedMasking
from fourm.data.modality_info import (
    MODALITY_INFO,
    MODALITY_TRANSFORMS,
    Modality,
    register_modality,
    resolve_modalities,
)
from fourm.data.modality_transforms import UnifiedDataTransform
from fourm.data.pretraining_datasets import (
    build_fm_pretraining_dataset,
    build_mixture_dataloader,
    build_wds_fm_pretraining_dataloader,
)
from fourm.data.unified_datasets import Batch, build_eval_loader, build_train_loader, draws_in_epoch

__all__ = [
    "MODALITY_INFO",
    "MODALITY_TRANSFORMS",
    "Batch",
    "DataConfig",
    "DatasetConfig",
    "Modality",
    "UnifiedDataTransform",
    "UnifiedMasking",
    "build_eval_loader",
    "build_fm_pretraining_dataset",
    "build_mixture_dataloader",
    "build_sample_transform",
    "build_train_loader",
    "build_wds_fm_pretraining_dataloader",
    "draws_in_epoch",
    "load_data_config",
    "AbstractImageAugmenter",
    "CenterCropImageAugmenter",
    "EmptyAugmenter",
    "PreTokenizedImageAugmenter",
    "RandomCropImageAugmenter",
    "register_modality",
    "resolve_modalities",
]
