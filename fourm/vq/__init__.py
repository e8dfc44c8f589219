"""Tokenizers of images: pixels ↔ grids of token ids."""

from fourm.vq.feature_codebook import FeatureCodebook, FeatureCodebookConfig
from fourm.vq.patch_codebook import PatchCodebook, PatchCodebookConfig
from fourm.vq.published import get_image_tokenizer
from fourm.vq.registry import TOKENIZERS, load_tokenizer
from fourm.vq.tokenizer import ImageTokenizer, TokenizerConfig

__all__ = [
    "TOKENIZERS",
    "FeatureCodebook",
    "FeatureCodebookConfig",
    "ImageTokenizer",
    "PatchCodebook",
    "PatchCodebookConfig",
    "TokenizerConfig",
    "get_image_tokenizer",
    "load_tokenizer",
]
