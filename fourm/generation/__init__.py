"""Generation with a trained model: ``Sampler`` generates, ``decode`` converts batches, ``plot`` draws the results."""

from fourm.generation.decoding import Decoded, decode
from fourm.generation.plotting import as_image, plot
from fourm.generation.sampler import Sampler

__all__ = ["Decoded", "Sampler", "as_image", "decode", "plot"]
