"""From inputs to results in one call: ``Sampler.load("run")({"rgb": "photo.jpg"}, targets=["depth", "caption"])``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fourm.data.modality_info import as_modality
from fourm.generation.decoding import CLASSES, Decoded, Tokenizers, decode
from fourm.generation.inputs import find_modality, make_batch
from fourm.generation.settings import chained_schedule
from fourm.models.fm import FM, FourM
from fourm.models.generate import GenerationSampler
from fourm.models.token_sampling import Seed
from fourm.utils.config import load_yaml
from fourm.utils.errors import UserError
from fourm.utils.tokenizer import load_text_tokenizer
from fourm.vq import load_tokenizer
from fourm.vq.tokenizer import CONFIG, best_device

Result = dict[str, Decoded]
"""Modality → what it shows, the inputs first."""


class Sampler:
    """A model with all that is needed to give it pictures and words and to look at what it answers.

    Args:
        model: the model.
        tokenizers: of images, by the modality of the images (``rgb``, ``depth``, …).
        text_tokenizer: the text vocabulary.
        class_names: of the segmentation's class ids.
        dtype: compute in this precision where that is safe.
    """

    def __init__(
        self,
        model: FourM,
        tokenizers: Tokenizers | None = None,
        text_tokenizer: Tokenizer | None = None,
        class_names: Sequence[str] = (),
        dtype: torch.dtype | None = None,
    ):
        self.generation = GenerationSampler(model.eval(), dtype)
        self.tokenizers, self.text_tokenizer = tokenizers or {}, text_tokenizer
        self.class_names = tuple(class_names)
        info = model.modality_info
        self.inputs = {name: as_modality(name, info[name]) for name in model.encoder_embeddings}
        self.targets = {name: as_modality(name, info[name]) for name in model.decoder_embeddings}

    @classmethod
    def load(
        cls,
        model: str | Path,
        tokenizers: str | Path | Mapping[str, str | Path] | None = None,
        text_tokenizer: str | Path | None = None,
        class_names: Sequence[str] = (),
        device: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> Sampler:
        """Everything from files.

        Args:
            model: a run folder (of a run that goes on, its newest checkpoint), a folder with ``config.json`` and
                ``model.safetensors``, or an id on the Hugging Face hub.
            tokenizers: a folder with one tokenizer folder per modality of images, or modality → folder or hub id.
            text_tokenizer: the vocabulary's file; None = the one that the run was trained with.
            device: ``auto`` = cuda where there is one, else cpu.

        Raises:
            UserError: something is missing or damaged.
        """
        where = best_device(device)
        words = text_tokenizer or _vocabulary_of(Path(model))
        return cls(
            _load_model(model).to(where),
            {name: load_tokenizer(folder, where) for name, folder in _tokenizer_folders(tokenizers).items()},
            load_text_tokenizer(words) if words else None,
            class_names,
            dtype,
        )

    def __call__(
        self,
        inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        targets: Sequence[str],
        seed: Seed = None,
        top_k: int | float = 0.0,
        top_p: float = 0.0,
        cfg_grow_conditioning: bool = True,
        verbose: bool = False,
        **settings: Any,
    ) -> list[Result]:
        """Generate the targets one after another; each follows the inputs and the targets before it.

        Args:
            inputs: modality → value, see :func:`fourm.generation.inputs.read_value`; a list of such samples with the
                same modalities is one batch.
            targets: modalities. Here and in ``inputs``, ``depth`` finds ``tok_depth@224``.
            seed: see :class:`GenerationSampler`; sample b uses ``seed + b``.
            top_k, top_p: see :class:`fourm.models.token_sampling.TokenSampler`.
            cfg_grow_conditioning: targets guide those after them.
            settings: see :func:`fourm.generation.settings.chained_schedule`, e.g. ``temps={"caption": 0}``.

        Returns:
            What each sample shows.

        Raises:
            UserError: inputs, targets or settings that do not suit the model.
        """
        samples = [inputs] if isinstance(inputs, Mapping) else list(inputs)
        if not samples or not samples[0] or not targets:
            raise UserError("generation needs at least one input and one target")
        given = [{find_modality(n, self.inputs, "an input"): v for n, v in sample.items()} for sample in samples]
        chain = [find_modality(name, self.targets, "a target") for name in targets]
        both = [name for name in chain if name in given[0] or chain.count(name) > 1]
        if both:
            raise UserError(f"{both[0]} is to be generated, but it is given or named twice")
        settings = {key: self._by_target(value) for key, value in settings.items()}
        info = {**self.inputs, **self.targets}
        schedule = chained_schedule([*given[0]], chain, info, settings, cfg_grow_conditioning)
        device = self.generation.model.mask_token.device
        batch = make_batch(given, info, self.tokenizers, self.text_tokenizer, device)
        result = self.generation.generate(batch, schedule, top_k, top_p, self.text_tokenizer, verbose, seed)
        found = decode(result, info, self.tokenizers, self.text_tokenizer)
        return [{name: self._named(value) for name, value in sample.items()} for sample in found]

    def _by_target(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {find_modality(name, self.targets, "a target"): v for name, v in value.items()}

    def _named(self, value: Decoded) -> Decoded:
        if value.kind not in CLASSES or not self.class_names:
            return value
        return Decoded(value.kind, value.value, value.dropped, self.class_names)


def _load_model(model: str | Path) -> FM:
    folder = Path(model)
    if folder.is_dir() and not (folder / CONFIG).exists():
        checkpoints = sorted(folder.glob("checkpoints/step-*"))
        if not checkpoints:
            raise UserError(f"{folder} holds no model ({CONFIG} and model.safetensors) and no checkpoints")
        folder = checkpoints[-1]
    try:
        return FM.from_pretrained(str(folder if folder.is_dir() else model))
    except UserError:
        raise
    except Exception as error:  # the hub's client, json and safetensors each have errors of their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{model} is neither a folder with a model nor a model of the hub: {reason}") from error


def _vocabulary_of(run: Path) -> str | None:
    """The vocabulary that a run folder names."""
    config = run / "config.yaml"
    return load_yaml(config).get("text_tokenizer_path") if config.is_file() else None


def _tokenizer_folders(tokenizers: str | Path | Mapping[str, str | Path] | None) -> dict[str, Path]:
    if tokenizers is None:
        return {}
    if isinstance(tokenizers, Mapping):
        return {name: _downloaded(place) for name, place in tokenizers.items()}
    found = {path.parent.name: path.parent for path in sorted(Path(tokenizers).glob(f"*/{CONFIG}"))}
    if not found:
        raise UserError(f"tokenizers: {tokenizers} has no folder with a {CONFIG}; fit one: fit_codebook.py")
    return found


def _downloaded(place: str | Path) -> Path:
    """A folder, or that of a repository of the hub."""
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(place)))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizers: {place} is neither a folder nor a repository of the hub: {reason}") from error
