"""Rules for samples that lack modalities (``missing`` in the data YAML)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fourm.data.layout import CROP_SETTINGS, wanted_names
from fourm.data.modality_info import Modality
from fourm.data.modality_transforms import AbstractTransform, DetectionTransform

Missing = Literal["error", "skip", "allow"]


@dataclass(frozen=True)
class Presence:
    """Decides which samples and modalities of a data set are used.

    Attributes:
        missing: What to do with a sample that lacks a modality. ``error`` counts it as bad, ``skip`` leaves it out, and
            ``allow`` uses the modalities that it has.
        needs: Modality → other modalities that a sample must have for this one to be usable.
    """

    missing: Missing = "error"
    needs: Mapping[str, Collection[str]] = field(default_factory=dict)

    def usable(self, available: Collection[str], wanted: Collection[str]) -> list[str]:
        """Return the ``available`` modalities of a sample that can be used; an empty list if the sample cannot."""
        if self.missing != "allow":
            return list(available) if len(available) == len(wanted) else []
        usable = [name for name in available if all(other in available for other in self.needs.get(name, ()))]
        return usable if set(usable) - {CROP_SETTINGS} else []


def presence(
    missing: Missing,
    modalities: Mapping[str, Modality],
    transforms: Mapping[str, AbstractTransform],
    main_domain: str | None,
) -> Presence:
    """Build the presence rules of a data set.

    A modality that follows the crop needs the stored crops or, if there are none, the main image. Boxes always need the
    size of the main image.
    """
    stored = CROP_SETTINGS in wanted_names(modalities)
    needs = {}
    for name, transform in transforms.items():
        anchors = {CROP_SETTINGS} if stored and transform.follows_crop else set()
        if transform.follows_crop and (not stored or isinstance(transform, DetectionTransform)):
            anchors |= {other for other in modalities if other == main_domain}
        needs[name] = anchors - {name}
    return Presence(missing, needs)
