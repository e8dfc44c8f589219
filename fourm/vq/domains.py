"""The domains of tokenizers: their files, their channels, and whether an encoder cuts them into patches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fourm.data.modality_transforms import MODALITY_TRANSFORMS, AbstractTransform
from fourm.utils.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Domain:
    """The kind of images that a tokenizer is trained on.

    Attributes:
        channels: The number of channels of the encoder's input; for class maps, the width of the embedding of a class.
        kind: ``picture`` for pixels, ``classes`` for class ids, ``mask`` for masks of one instance in [0, 1], ``map``
            for features of another network with one vector per patch, and ``vector`` for a single vector.
        labels: The number of classes of class maps; class 0 is "none".
        transform: Key of ``MODALITY_TRANSFORMS``; None for the name of the domain.
        network: The network of timm that extracts the features from RGB images; None reads them from files.
        options: The fields of the transform that differ from its defaults.
        tokens: The kind of its modality in 4M-21, which is the name of that modality without ``tok_`` and the size;
            None for the name of the domain.
    """

    channels: int
    kind: Literal["picture", "classes", "mask", "map", "vector"] = "picture"
    labels: int | None = None
    transform: str | None = None
    network: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    tokens: str | None = None

    @property
    def is_picture(self) -> bool:
        """Whether the encoder cuts the input into patches."""
        return self.kind in ("picture", "classes", "mask")


_CLIP_B, _CLIP_L = "vit_base_patch16_clip_224.openai", "vit_large_patch14_clip_224.openai"
_DINO_B, _DINO_G = "vit_base_patch14_dinov2.lvd142m", "vit_giant_patch14_dinov2.lvd142m"

DOMAINS = {
    "rgb": Domain(3),
    "normal": Domain(3),
    "depth": Domain(1),
    "canny_edge": Domain(1),
    "sam_edge": Domain(1, transform="canny_edge"),
    "semseg_coco": Domain(64, "classes", labels=134, options={"zero_is_none": True}),
    "semseg": Domain(64, "classes"),
    "sam_mask": Domain(1, "mask", transform="instance_mask", tokens="sam_instance"),
    "CLIP-B16": Domain(512, "map", network=_CLIP_B, tokens="clip"),
    "CLIP-L14": Domain(768, "map", network=_CLIP_L, transform="features"),
    "DINOv2-B14": Domain(768, "map", network=_DINO_B, tokens="dinov2"),
    "DINOv2-G14": Domain(1536, "map", network=_DINO_G, transform="features"),
    "ImageBind-H14": Domain(1280, "map", tokens="imagebind"),
    "DINOv2-B14-global": Domain(768, "vector", network=_DINO_B, tokens="dinov2_global"),
    "ImageBind-H14-global": Domain(1280, "vector", tokens="imagebind_global"),
    "human_poses": Domain(207, "vector", transform="body_pose"),
}


def transform_of(modality: str) -> AbstractTransform | None:
    """Return the transform that reads the files of a modality, or None if it is not known.

    Args:
        modality: The name of a domain, or a key of ``MODALITY_TRANSFORMS``.
    """
    domain = DOMAINS.get(modality)
    return MODALITY_TRANSFORMS.get((domain and domain.transform) or modality)


def domain_named(name: str) -> Domain:
    """Return the domain with this name.

    Raises:
        UserError: There is no such domain.
    """
    if name not in DOMAINS:
        raise UserError(f"'domain': unknown '{name}'{did_you_mean(name, DOMAINS)}; there are {', '.join(DOMAINS)}")
    return DOMAINS[name]
