"""From a trained model to something a person looks at: ``Sampler``, ``decode``, ``plot``."""

from fourm.generation.decoding import Decoded, decode
from fourm.generation.plotting import as_image, plot
from fourm.generation.sampler import Sampler

__all__ = ["Decoded", "Sampler", "as_image", "decode", "plot"]
