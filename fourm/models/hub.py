"""Models on disk and on the Hugging Face hub: ``config.json`` + ``model.safetensors`` in the published layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from fourm.models.fm_utils import LayerNorm
from fourm.utils.checkpoints import WEIGHTS, ModelFormat, check_export, write_config
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.files import atomic_path, save_tensors
from fourm.utils.finite import check_finite


class HubModel(PyTorchModelHubMixin):
    """Adds ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` to a model that is made of a ``config``.

    Attributes:
        title, marks: as in :class:`ModelFormat`.
    """

    title: ClassVar[str]
    marks: ClassVar[frozenset[str]]
    config: dict[str, Any]

    @classmethod
    def model_format(cls) -> ModelFormat:
        """How these models lie on disk."""
        return ModelFormat(cls.title, cls, cls.marks, cls.published)  # type: ignore[arg-type]

    @staticmethod
    def published(config: dict[str, Any]) -> dict[str, Any]:
        """The configuration as it stands beside the weights."""
        return dict(config)

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a file's weights the model wants; the rest of the loading is strict."""
        return state_dict

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """As of the base class.

        Raises:
            UserError: another kind of model is in the folder, or it cannot be written to; nothing is changed.
        """
        check_export(Path(save_directory), self.model_format())  # the base class begins by removing config.json
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write tied weights under each of their names: the published layout does not know ties."""
        assert isinstance(self, nn.Module)
        tensors: dict[str, Tensor] = {}
        written: set[int] = set()
        for name, tensor in self.state_dict().items():
            tensors[name] = tensor.clone() if tensor.data_ptr() in written else tensor.contiguous()
            written.add(tensor.data_ptr())
        write_config(save_directory, type(self).published(self.config))
        with atomic_path(save_directory / WEIGHTS) as path:
            save_tensors(tensors, path, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """A model from a folder, or from the hub.

        Raises:
            UserError: there is none, or its files are damaged, malformed or do not fit together.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)
        except UserError as error:
            raise UserError(f"{pretrained_model_name_or_path}: {error}") from error
        except Exception as error:  # the hub's client, json, safetensors and torch each have errors of their own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if Path(place := str(pretrained_model_name_or_path)).is_dir():
                raise UserError(f"{place}: no model could be loaded: {reason}") from error
            raise UserError(f"{place} is neither a folder with a model nor a model of the hub: {reason}") from error

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        return _load(model, load_file(model_file, device=str(map_location)), Path(model_file).name)

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        weights = torch.load(model_file, map_location=map_location, weights_only=True)
        return _load(model, weights, Path(model_file).name)


class Hub4M(HubModel):
    """A 4M model."""

    title = "4M model"
    marks = frozenset({"domains_in", "encoder_depth"})

    @staticmethod
    def published(config: dict[str, Any]) -> dict[str, Any]:
        """The configuration beside published weights, which stand under each of their names whether tied or not."""
        return {key: value for key, value in config.items() if key != "share_embedding"}


def _load(model: Any, state_dict: dict[str, Tensor], file: str) -> Any:
    try:
        model.load_state_dict(model.adapt_state_dict(state_dict))
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:3]]
        raise UserError(f"{file} does not hold the weights of its config.json: {' '.join(problems)[:300]}") from error
    for name, tensor in state_dict.items():
        check_finite(name, tensor, file)
    return model.eval()


def trunk_options(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of FourM from those of a hub config: classes instead of ``act_layer``'s name and ``norm_bias``."""
    options = dict(config)
    name = options.pop("act_layer", "GELU")
    activation = getattr(nn, name, None)
    if not isinstance(activation, type):
        raise UserError(f"model config: act_layer '{name}' is not in torch.nn{did_you_mean(name, dir(nn))}")
    if not _is_activation(activation):
        raise UserError(f"model config: act_layer '{name}' is not an activation, such as GELU or SiLU")
    return options | {
        "act_layer": activation,
        "norm_layer": partial(LayerNorm, bias=options.pop("norm_bias", True)),
    }


def _is_activation(activation: type) -> bool:
    try:
        with torch.device("meta"):
            return activation()(torch.empty(1, 2, 8)).shape == (1, 2, 8)
    except Exception:  # whatever a module that is something else raises
        return False
