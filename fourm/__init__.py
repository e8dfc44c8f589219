"""4M: massively multimodal masked modeling (arXiv 2312.06647, 2406.09406)."""

from fourm.utils.interrupts import exit_on_interrupt, is_module_command

if is_module_command("fourm"):
    exit_on_interrupt()
