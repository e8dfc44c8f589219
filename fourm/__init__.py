"""4M: massively multimodal masked modeling (arXiv 2312.06647, 2406.09406)."""

from typing import TYPE_CHECKING, Any

from fourm.utils.interrupts import exit_on_interrupt, is_module_command

if TYPE_CHECKING:
    from fourm.demo.shipped import load_demo

__all__ = ["load_demo"]

if is_module_command("fourm"):
    exit_on_interrupt()


def __getattr__(name: str) -> Any:
    """Import ``load_demo`` when it is used, because it needs torch."""
    if name == "load_demo":
        from fourm.demo.shipped import load_demo

        return load_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
