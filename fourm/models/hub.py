"""Saves and loads models, on disk and on the Hugging Face hub: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from fourm.models import model_card
from fourm.models.fm_utils import LayerNorm
from fourm.utils.checkpoints import STATE, WEIGHTS, ModelFormat, check_export, write_config
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.files import atomic_path, save_tensors
from fourm.utils.finite import check_finite
from fourm.utils.weight_files import load_safetensors

log = logging.getLogger("fourm")


class HubModel(PyTorchModelHubMixin, library_name="fourm", tags=["4m"], model_card_template=model_card.TEMPLATE):
    """Adds ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` to a model that is built from a ``config``.

    Attributes:
        title, marks: As in :class:`ModelFormat`.
        summary: What the model is, in the first paragraph of its model card.
        training_facts: How the weights were trained, for the model card. A training run writes it beside the weights.
            Change it, or set it to ``{}``, if you have changed the weights since.
    """

    title: ClassVar[str]
    marks: ClassVar[frozenset[str]]
    summary: ClassVar[str]
    config: dict[str, Any]
    training_facts: model_card.Tables = {}

    @classmethod
    def model_format(cls) -> ModelFormat:
        """Return how these models are stored on disk."""
        return ModelFormat(cls.title, cls, cls.marks, cls.published)  # type: ignore[arg-type]

    @staticmethod
    def published(config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration to publish with the weights."""
        return dict(config)

    def model_facts(self) -> model_card.Tables:
        """Return what the model card says about the model itself."""
        return {}

    def usage(self, repo_id: str) -> str:
        """Return Python code that loads the model from a repository of the hub."""
        cls = type(self)
        return f'from {cls.__module__} import {cls.__name__}\n\nmodel = {cls.__name__}.from_pretrained("{repo_id}")'

    def generate_model_card(self, *args: Any, repo_id: str = "OWNER/NAME", **options: Any) -> ModelCard:
        """Write the ``README.md`` of the model: what it is, how it was trained, how it is loaded.

        Args:
            repo_id: Where the model is published.
            options: Further variables of the template: ``model_name`` is the title.
        """
        return super().generate_model_card(
            *args,
            title=self.title[0].upper() + self.title[1:],
            summary=self.summary,
            tables=model_card.markdown(self.model_facts() | self.training_facts),
            usage=self.usage(repo_id),
            **options,
        )

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Push weights, configuration and model card to the hub, as the base class does.

        Args:
            repo_id: ``OWNER/NAME`` of the repository, which is created if it does not exist.
            options: Those of the base class: ``private``, ``token``, ``branch``, … ``model_card_kwargs`` are arguments
                of :meth:`generate_model_card`, and ``ignore_patterns="README.md"`` keeps the card that is on the hub.
        """
        card = {"repo_id": repo_id} | (options.pop("model_card_kwargs", None) or {})
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Choose the weights to load from those of a file; loading them is strict."""
        return state_dict

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Save the model to a folder, as the base class does.

        Raises:
            UserError: If the folder contains another kind of model or cannot be written to; nothing is changed then.
        """
        check_export(Path(save_directory), self.model_format())  # before the base class removes config.json
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write tied weights under each of their names, because the published layout has no ties."""
        assert isinstance(self, nn.Module)
        tensors: dict[str, Tensor] = {}
        written: set[int] = set()
        for name, tensor in self.state_dict().items():
            tensors[name] = tensor.clone() if tensor.data_ptr() in written else tensor.contiguous()
            written.add(tensor.data_ptr())
        write_config(save_directory, type(self).published(self.config))
        with atomic_path(save_directory / WEIGHTS) as path:
            save_tensors(tensors, path, metadata={"format": "pt"} | model_card.to_header(self.training_facts))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """Load a model from a folder, a ``.safetensors`` file with the configuration in its header, or the hub.

        Raises:
            UserError: If there is no model, or its files are damaged, malformed, or do not fit together.
        """
        path = Path(pretrained_model_name_or_path)
        if path.suffix == ".safetensors":
            return cls.from_file(path, **options)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)
        except UserError as error:
            raise UserError(f"{pretrained_model_name_or_path}: {error}") from error
        except Exception as error:  # the hub client, json, safetensors and torch each raise their own errors
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            source = str(pretrained_model_name_or_path)
            if Path(source).is_dir():
                raise UserError(f"{source}: no model could be loaded: {reason}") from error
            raise UserError(f"{source} is neither a folder with a model nor a model on the hub: {reason}") from error

    @classmethod
    def from_file(cls, path: Path, **options: Any) -> Any:
        """Load a model from a ``.safetensors`` file with the configuration in its header.

        Args:
            path: The file.
            options: Arguments of the class, except the configuration.

        Raises:
            UserError: If the file does not exist or is damaged, or its header does not describe the model.
        """
        weights, config = load_safetensors(path)
        try:
            return _load(cls(cls.foreign_config(config, path), **options), weights, path.name)  # type: ignore[call-arg]
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def foreign_config(cls, config: dict[str, Any], source: str | Path) -> dict[str, Any]:
        """Return the keys of a configuration, which other software may have written, that the model has."""
        return config

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        model.training_facts = model_card.read_facts(model_file)
        return _load(model, load_file(model_file, device=str(map_location)), Path(model_file).name)

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        weights = torch.load(model_file, map_location=map_location, weights_only=True)
        return _load(model, weights, Path(model_file).name)


class Hub4M(HubModel):
    """A 4M model."""

    title = "4M model"
    marks = frozenset({"domains_in", "encoder_depth"})
    config_keys: ClassVar[Iterable[str]]
    """The keys of a configuration."""

    def model_facts(self) -> model_card.Tables:
        assert isinstance(self, nn.Module)
        columns = {
            "dim": "width",
            "encoder_depth": "encoder blocks",
            "decoder_depth": "decoder blocks",
            "num_heads": "heads",
        }
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return {"Model": [{"parameters": parameters} | {name: self.config.get(key) for key, name in columns.items()}]}

    @staticmethod
    def published(config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration to publish: untied, because files store tied weights under each of their names."""
        return {key: value for key, value in config.items() if key != "share_embedding"}

    @classmethod
    def foreign_config(cls, config: dict[str, Any], source: str | Path) -> dict[str, Any]:
        known = set(cls.config_keys)
        if unknown := [key for key in config if key not in known]:
            log.warning("%s: keys of the configuration that have no meaning here: %s", source, ", ".join(unknown))
        return {key: value for key, value in config.items() if key in known}

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Any:
        config, folder = options.get("config"), Path(model_id)
        # The folder of a run is our own, so that an unknown key in it is a mistake.
        if isinstance(config, dict) and not any((folder / name).exists() for name in ("config.yaml", STATE)):
            options["config"] = cls.foreign_config(config, model_id)
        return super()._from_pretrained(model_id=model_id, **options)


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
    """Convert a hub configuration to arguments of FourM: classes replace the name of ``act_layer`` and ``norm_bias``.

    Raises:
        UserError: If ``act_layer`` is not an activation in ``torch.nn``.
    """
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
    except Exception:  # other modules may raise anything
        return False
