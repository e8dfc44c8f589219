"""4M: massively multimodal masked modeling (arXiv 2312.06647, 2406.09406)."""
