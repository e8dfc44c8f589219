"""A modality of one's own, for ``notebooks/own_modality.ipynb``: how far each pixel is from the nearest object.

It is computed from the class ids in ``semseg/`` while they are read, so that no files of distances are needed. Pass
``--plugin notebooks.distance_modality`` to a command to register it.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt

from fourm.data import MODALITY_TRANSFORMS
from fourm.data.transforms.image import SemsegTransform
from fourm.generation.decoding import DECODERS
from fourm.generation.plotting import IMAGES, colormap


class DistanceTransform(SemsegTransform):
    """Distance to the nearest object, float32 (1, H, W): −1 on it, 1 from a quarter of the picture's side on."""

    def postprocess(self, value):
        ground = super().postprocess(value) == 0
        return np.float32(2 * (4 / len(ground) * distance_transform_edt(ground)).clip(0, 1) - 1)[None]


MODALITY_TRANSFORMS["distance"] = DistanceTransform()  # file → array
DECODERS["distance"] = lambda image: (image[..., 0] + 1) / 2  # what the tokenizer decodes, (H, W, 1) → value
IMAGES["distance"] = lambda distance: colormap("magma", 1 - distance)  # value → picture
