"""Loads a 4M model from the checkpoint of a training run, regardless of the number of processes that wrote it."""

from __future__ import annotations

from pathlib import Path

from fourm.models.fm import FM
from fourm.utils.checkpoints import layout, read_weights

FORMAT = FM.model_format()


def load_model(checkpoint: Path, ema: bool = False) -> FM:
    """Load the model of a checkpoint, as :meth:`FM.from_pretrained` loads the final model of a run.

    Args:
        checkpoint: Folder of the checkpoint.
        ema: Load the moving average of the weights instead of the weights.

    Raises:
        UserError: See :func:`read_weights`.
    """
    config, weights = read_weights(checkpoint, FORMAT, ema)
    model = layout(FORMAT.published(config), FORMAT, checkpoint)
    assert isinstance(model, FM)
    tensors = model.to_empty(device="cpu").state_dict()
    for name, tensor in weights:
        tensors[name].copy_(tensor)
    return model.eval()
