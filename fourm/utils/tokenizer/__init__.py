"""The text vocabulary: WordPiece with sentinels, coordinates and class names as single tokens."""

from fourm.utils.tokenizer.spans import merge_spans, split_spans
from fourm.utils.tokenizer.text_tokenizer import TextEncoder, load_text_tokenizer

__all__ = ["TextEncoder", "load_text_tokenizer", "merge_spans", "split_spans"]
