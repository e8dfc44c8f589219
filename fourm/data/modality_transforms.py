"""The transform of each modality, and the aligned transform of a whole sample.

A transform is looked up by the modality's full name, and then by the part before ``@`` (``tok_rgb@224`` → ``tok_rgb``),
so a dict of transforms may be specific or general. :func:`transforms_for` builds the specific one from declarations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from functools import lru_cache
from typing import Any

import numpy as np

from fourm.data.image_augmenter import AbstractImageAugmenter, Augmentation
from fourm.data.transforms.arrays import CaptionEmbTransform, GridTransform, ScalarTransform
from fourm.data.transforms.base import AbstractTransform
from fourm.data.transforms.image import (
    DepthTransform,
    ImageTransform,
    MaskTransform,
    NormalTransform,
    PixelTransform,
    RGBTransform,
    SemsegTransform,
)
from fourm.data.transforms.instances import HumanPoseTransform, SAMInstanceTransform
from fourm.data.transforms.objects import BodyPoseTransform, InstanceMaskTransform
from fourm.data.transforms.sequence import (
    CaptionTransform,
    ColorPaletteTransform,
    DetectionTransform,
    MetadataTransform,
)
from fourm.data.transforms.tokens import CodebooksTransform, PerCropTransform, TokTransform
from fourm.utils.config import convert_fields
from fourm.utils.errors import DataError, UnreadableValue, UserError, did_you_mean

__all__ = [
    "MODALITY_TRANSFORMS",
    "UnifiedDataTransform",
    "UnreadableValue",
    "transforms_for",
    "get_transform_key",
    "get_transform_resolution",
    "AbstractTransform",
    "CaptionEmbTransform",
    "CaptionTransform",
    "CodebooksTransform",
    "ColorPaletteTransform",
    "DepthTransform",
    "DetectionTransform",
    "GridTransform",
    "HumanPoseTransform",
    "ImageTransform",
    "MaskTransform",
    "MetadataTransform",
    "NormalTransform",
    "PixelTransform",
    "RGBTransform",
    "SAMInstanceTransform",
    "ScalarTransform",
    "SemsegTransform",
    "TokTransform",
]

_TOKENS = ("rgb", "depth", "normal", "clip", "semseg", "canny_edge", "sam_edge", "dinov2", "imagebind")
_FEATURES = ("CLIP-B16", "DINOv2-B14", "DINOv2-B14-global", "ImageBind-H14", "ImageBind-H14-global")

MODALITY_TRANSFORMS: dict[str, AbstractTransform] = {
    "rgb": RGBTransform(),
    "depth": DepthTransform(),
    "normal": NormalTransform(),
    "canny_edge": PixelTransform(),
    "semseg_coco": SemsegTransform(),
    "semseg": SemsegTransform(),
    "sam_mask": MaskTransform(),
    "mask_valid": MaskTransform(),
    "tok": TokTransform(),
    **{f"tok_{kind}": TokTransform() for kind in _TOKENS},
    **{f"tok_{kind}_global": TokTransform() for kind in ("dinov2", "imagebind")},
    "caption": CaptionTransform(),
    "det": DetectionTransform(),
    "metadata": MetadataTransform(),
    "color_palette": ColorPaletteTransform(),
    "human_poses": HumanPoseTransform(),
    "body_pose": BodyPoseTransform(),
    "sam_instance": SAMInstanceTransform(),
    "instance_mask": InstanceMaskTransform(),
    "t5_caption": CaptionEmbTransform(),
    "features": GridTransform(),
    **{kind: GridTransform() for kind in _FEATURES},
    "scalar": ScalarTransform(),
    "codebooks": CodebooksTransform(),
}
"""Transforms by the part of a modality's name before ``@``, or by its declared ``transform``."""


def transforms_for(
    modality_info: Mapping[str, Mapping[str, Any]],
    transforms: Mapping[str, AbstractTransform] = MODALITY_TRANSFORMS,
) -> dict[str, AbstractTransform]:
    """Return the transform of each modality by full name, bound to the modality's sizes and vocabulary.

    A transform is looked up by the full name and then by ``transform``. If that is not set and the name is unknown, the
    type decides: a grid of token ids, codes, or a caption.

    Raises:
        UserError: A transform does not exist or does not match its modality.
    """
    bound = {}
    for name, modality in modality_info.items():
        implied = name.split("@")[0]
        key = name if name in transforms else modality["transform"]
        tokens_or_none = "tok" if modality["vocab_size"] else None
        by_type = {"img": tokens_or_none, "seq_token": "tok", "seq": "caption", "seq_emb": "t5_caption"}
        if key not in transforms and key == implied:
            key = by_type.get(modality["type"])
        if key not in transforms:
            wanted = modality["transform"]
            raise UserError(
                f"modality {name}: no transform '{wanted}'{did_you_mean(wanted, transforms)}; "
                "set 'transform' in its declaration"
            )
        bound[name] = _with_options(transforms[key], modality).bind(modality)
    return bound


def _with_options(transform: AbstractTransform, modality: Mapping[str, Any]) -> AbstractTransform:
    """Return the transform with the ``transform_options`` of the declaration."""
    options = modality["transform_options"]
    if not options:
        return transform
    where = f"modality {modality['name']}: transform_options"
    if not dataclasses.is_dataclass(transform):
        raise UserError(f"{where}: the transform '{modality['transform']}' has none")
    return dataclasses.replace(transform, **convert_fields(type(transform), options, where))


class UnifiedDataTransform:
    """Transforms all modalities of a sample with the same crop, flip and stored crop.

    Args:
        transforms_dict: Transforms by full name or by the part of it before ``@``.
        image_augmenter: Draws the crop.
    """

    def __init__(self, transforms_dict: Mapping[str, AbstractTransform], image_augmenter: AbstractImageAugmenter):
        self.transforms_dict = transforms_dict
        self.image_augmenter = image_augmenter

    def __call__(
        self, sample: Mapping[str, Any], generator: np.random.Generator | None = None, skip: Set[str] = frozenset()
    ) -> dict[str, Any]:
        """Transform one raw sample: :meth:`preprocess` and :meth:`augment`."""
        return self.augment(self.preprocess(sample), generator, skip)

    def preprocess(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Do everything that does not depend on the crop.

        Args:
            sample: Raw value per modality, and ``crop_settings`` (K, 5) if crops were stored. Keys that begin with
                ``__`` are passed through.

        Raises:
            DataError: A value violates the contract of its modality (token count, vocabulary, …).
            UnreadableValue: A value cannot be parsed.
        """
        return {
            name: _call_for(name, self._transform(name).preprocess, value) if _is_modality(name) else value
            for name, value in sample.items()
        }

    def augment(
        self, values: Mapping[str, Any], generator: np.random.Generator | None = None, skip: Set[str] = frozenset()
    ) -> dict[str, Any]:
        """Crop, flip and finish the result of :meth:`preprocess`, which is not modified.

        Args:
            values: The preprocessed sample.
            generator: Source of all randomness of this sample.
            skip: Modalities that get no tokens. Images among them are neither decoded nor resized, but replaced by
                zeros of the same shape.

        Raises:
            DataError: A value violates the contract of its modality (crop count, …).
            UnreadableValue: A value cannot be decoded.
        """
        generator = generator if generator is not None else np.random.default_rng()
        crop_settings = values.get("crop_settings")
        result = {name: value for name, value in values.items() if name.startswith("__")}
        transforms = {name: self._transform(name) for name in values if _is_modality(name)}
        source = "crop" if crop_settings is None else "crop_settings"
        shared = Augmentation()
        if crop_settings is not None or any(transform.follows_crop for transform in transforms.values()):
            crops = _count_stored_crops(transforms, values) if crop_settings is None else crop_settings
            shared = _call_for(source, self.image_augmenter, values, crops, generator)
        for name, transform in transforms.items():
            target_size = get_transform_resolution(name, shared.target_size)
            if name in skip and isinstance(transform, ImageTransform):
                assert target_size is not None  # augmenters of images set one
                result[name] = transform.empty(target_size)
            else:
                augmentation = shared._replace(target_size=target_size)
                arguments = (transform, values[name], augmentation, crop_settings, generator)
                result[name] = _call_for(name, _augment, *arguments)
        return result

    def lacking(self, sample: Mapping[str, Any]) -> list[str]:
        """Return the modalities of a raw sample whose value is null or empty."""
        return [name for name in sample if _is_modality(name) and self._transform(name).is_missing(sample[name])]

    def _transform(self, name: str) -> AbstractTransform:
        transform = self.transforms_dict.get(name) or self.transforms_dict.get(get_transform_key(name))
        if transform is None:
            raise UserError(f"modality {name}: no transform{did_you_mean(name, self.transforms_dict)}")
        return transform


def _is_modality(name: str) -> bool:
    return name != "crop_settings" and not name.startswith("__")


def _count_stored_crops(transforms: Mapping[str, AbstractTransform], values: Mapping[str, Any]) -> int | None:
    """Return the number of stored crops if no modality needs their coordinates, and None otherwise."""
    following = {name: transform for name, transform in transforms.items() if transform.follows_crop}
    if not all(isinstance(transform, PerCropTransform) for transform in following.values()):
        return None
    crops = {name: transform.stored_crops(values[name]) for name, transform in following.items()}
    if len(set(crops.values())) > 1:
        raise DataError(
            f"the numbers of crops differ: {', '.join(f'{count} of {name}' for name, count in crops.items())}"
        )
    return next(iter(crops.values()))


def get_transform_key(mod_name: str) -> str:
    """Return the part of a modality's name by which its transform is looked up: ``tok_rgb@224`` → ``tok_rgb``."""
    return mod_name.split("@")[0]


def get_transform_resolution(mod_name: str, default_resolution: Any, to_tuple: bool = True) -> Any:
    """Return the resolution that follows the ``@`` in the name of a modality.

    Args:
        mod_name: The name.
        default_resolution: The resolution of a name that has none: a side, (height, width), or None.
        to_tuple: Return (height, width) instead of the side.
    """
    side = _side_of(mod_name)
    resolution = default_resolution if side is None else side
    return (resolution, resolution) if to_tuple and isinstance(resolution, int) else resolution


@lru_cache(maxsize=1024)
def _side_of(mod_name: str) -> int | None:
    side = mod_name.partition("@")[2]
    return int(side) if side.isdigit() else None


def _augment(
    transform: AbstractTransform,
    value: Any,
    augmentation: Augmentation,
    crop_settings: np.ndarray | None,
    generator: np.random.Generator,
) -> Any:
    """Run the steps after ``preprocess``."""
    crops = transform.stored_crops(value)
    if crop_settings is not None and crops is not None and crops != len(crop_settings):
        raise DataError(f"it has values of {crops} crops, but crop_settings has {len(crop_settings)}")
    value = transform.image_augment(value, *augmentation)
    return transform.postprocess(transform.choose(value, generator))


def _call_for(name: str, function: Callable, *arguments: Any) -> Any:
    """Call ``function`` for modality ``name``, or for the crop, and add the name to errors.

    Raises:
        DataError: The value violates the contract of its modality.
        UserError: The configuration of the modality is wrong.
        UnreadableValue: Anything else went wrong, so the content is at fault.
    """
    label = name if name in ("crop", "crop_settings") else f"modality {name}"
    try:
        return function(*arguments)
    except DataError as error:
        raise DataError(f"{label}: {error}", name, str(error)) from error
    except UserError as error:
        raise UserError(f"{label}: {error}") from error
    except UnreadableValue as error:
        raise UnreadableValue(f"{label}: {error}", name, str(error)) from error
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        raise UnreadableValue(f"{label}: {detail}", name, detail) from error
