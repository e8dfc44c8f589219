"""What a sample must have to be used, and what becomes of the others (``missing`` of the data YAML)."""

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
    """Which samples of a data set are used.

    Attributes:
        missing: ``error``: a sample that lacks anything is a bad one; ``skip``: it is left out; ``allow``: what it has is
            used.
        needs: modality → what else a sample must have so that this one can be used.
    """

    missing: Missing = "error"
    needs: Mapping[str, Collection[str]] = field(default_factory=dict)

    def usable(self, found: Collection[str], wanted: Collection[str]) -> list[str]:
        """Of what was ``found`` of a sample, that which can be used; empty: the sample cannot."""
        if self.missing != "allow":
            return list(found) if len(found) == len(wanted) else []
        usable = [name for name in found if all(other in found for other in self.needs.get(name, ()))]
        return usable if set(usable) - {CROP_SETTINGS} else []


def presence(
    missing: Missing,
    modalities: Mapping[str, Modality],
    transforms: Mapping[str, AbstractTransform],
    main_domain: str | None,
) -> Presence:
    """What follows a crop needs the stored crops or, without any, the main image; boxes always need the latter's size."""
    stored = CROP_SETTINGS in wanted_names(modalities)
    needs = {}
    for name, transform in transforms.items():
        anchors = {CROP_SETTINGS} if stored and transform.follows_crop else set()
        if transform.follows_crop and (not stored or isinstance(transform, DetectionTransform)):
            anchors |= {other for other in modalities if other == main_domain}
        needs[name] = anchors - {name}
    return Presence(missing, needs)
