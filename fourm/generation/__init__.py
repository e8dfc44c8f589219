"""From a trained model to something a person looks at."""

from fourm.generation.decoding import Decoded, decode

__all__ = ["Decoded", "decode"]
