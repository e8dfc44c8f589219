"""4M: massively multimodal masked modeling (arXiv 2312.06647, 2406.09406)."""

from fourm.utils.interrupts import end_at_once, is_command_of

if is_command_of("fourm"):
    end_at_once()
