"""From inputs to results in one call: ``Sampler.load("run")({"rgb": "photo.jpg"}, targets=["depth", "caption"])``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fourm.data.modality_info import Modality, as_modality
from fourm.generation.chained_generation import GenerationSampler
from fourm.generation.decoding import CLASSES, Decoded, Tokenizers, decode, decode_modality
from fourm.generation.inputs import find_modality, make_batch
from fourm.generation.settings import chained_schedule
from fourm.generation.token_sampling import Seed
from fourm.models.fm import FM, FourM
from fourm.models.from_checkpoint import load_model
from fourm.utils.checkpoints import WEIGHTS, newest_checkpoint
from fourm.utils.config import load_yaml
from fourm.utils.device import choose_device
from fourm.utils.errors import UserError
from fourm.utils.model_store import download_if_remote, find_model
from fourm.utils.tokenizer import load_text_tokenizer
from fourm.vq import load_tokenizer
from fourm.vq.tokenizer import CONFIG

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
        self.info = {**self.inputs, **self.targets}

    @classmethod
    def load(
        cls,
        model: str | Path,
        tokenizers: str | Path | Mapping[str, str | Path] | None = None,
        text_tokenizer: str | Path | None = None,
        class_names: Sequence[str] = (),
        device: str = "auto",
        dtype: torch.dtype | None = None,
        like: Sampler | None = None,
        compile: bool = False,
    ) -> Sampler:
        """Everything from files.

        Args:
            model: a run folder (of a run that goes on, its newest checkpoint), a folder with ``config.json`` and
                ``model.safetensors``, an id on the Hugging Face hub, or the ``s3://`` URL of one of the former.
            tokenizers: a folder with one tokenizer folder per modality of images, or modality → folder or hub id.
            text_tokenizer: the vocabulary's file; None = the one that the run was trained with.
            device: See :func:`fourm.utils.device.choose_device`.
            like: a sampler whose tokenizers, vocabulary and class names serve where none are named here, such as that of
                the model whose results this one is to upsample.
            compile: ``torch.compile`` the blocks, once for all lengths; pays where many batches are generated on a GPU.

        Raises:
            UserError: something is missing or damaged, or the text vocabulary is not that of ``like``.
        """
        where = choose_device(device)
        model = download_if_remote(model, find_model)
        images: Tokenizers = {n: load_tokenizer(f, where) for n, f in _tokenizer_folders(tokenizers).items()}
        path = text_tokenizer or _vocabulary_of(Path(model))
        words = load_text_tokenizer(path) if path else None
        if like is not None:
            images, class_names = {**like.tokenizers, **images}, class_names or like.class_names
            if words and like.text_tokenizer and words.get_vocab() != like.text_tokenizer.get_vocab():
                raise UserError(f"{model}: its text vocabulary is {path}, not that of the model before it")
            words = words or like.text_tokenizer
        loaded = _load_model(model).to(where)
        if compile:
            loaded.compile_blocks(dynamic=True)
        return cls(loaded, images, words, class_names, dtype)

    def __call__(
        self,
        inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        targets: str | Sequence[str],
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
                same modalities is one batch. Results are inputs too: those that the model cannot read are left out.
            targets: modalities, or a single one. Here and in ``inputs``, ``depth`` finds ``tok_depth@224``. Of an image that is given,
                the tokens that are −1 are generated.
            seed: see :class:`GenerationSampler`; sample b uses ``seed + b``.
            top_k, top_p: see :class:`fourm.generation.token_sampling.TokenSampler`.
            cfg_grow_conditioning: targets guide those after them.
            settings: see :func:`fourm.generation.settings.chained_schedule`, e.g. ``temps={"caption": 0}``.

        Returns:
            What each sample shows.

        Raises:
            UserError: inputs, targets or settings that do not suit the model.
        """
        targets = [targets] if isinstance(targets, str) else targets
        given = [self._readable(sample) for sample in ([inputs] if isinstance(inputs, Mapping) else inputs)]
        if not given or not given[0] or not targets:
            raise UserError("generation needs at least one input and one target")
        device = self.generation.model.mask_token.device
        batch = make_batch(given, self.info, self.tokenizers, self.text_tokenizer, device)
        missing = {name: int(entry["input_mask"].sum(1).max()) for name, entry in batch.items()}
        schedule = self.schedule(missing, targets, cfg_grow_conditioning, **settings)
        result = self.generation.generate(batch, schedule, top_k, top_p, self.text_tokenizer, verbose, seed)
        generated = {step["target_domain"] for step in schedule}
        seen = {n for n in batch.keys() - generated if all(isinstance(sample[n], Decoded) for sample in given)}
        unseen = {name: entry for name, entry in result.items() if name not in seen}
        found = decode(unseen, self.info, self.tokenizers, self.text_tokenizer)
        return [
            {name: given[b][name] if name in seen else self._named(found[b][name]) for name in result}
            for b in range(len(given))
        ]

    def schedule(
        self,
        given: Mapping[str, int],
        targets: str | Sequence[str],
        cfg_grow_conditioning: bool = True,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """What a call with these arguments does, step by step.

        Args:
            given: input modality → how many of its tokens are not known, 0 if it is complete.

        Raises:
            UserError: targets or settings that do not suit the model.
        """
        targets = [targets] if isinstance(targets, str) else targets
        chain = [find_modality(name, self.targets, "a target", last=given) for name in targets]
        edited = {name: given[name] for name in chain if given.get(name) and self.targets[name].type == "img"}
        both = [name for name in chain if (name in given and name not in edited) or chain.count(name) > 1]
        if both:
            raise UserError(f"{both[0]} is to be generated, but it is given or named twice")
        others = self.targets.keys() - chain
        for key, value in settings.items():
            if isinstance(value, Mapping):
                settings[key] = {find_modality(n, self.targets, "a target", last=others): v for n, v in value.items()}
        steps = {name: max(count // 4, 1) for name, count in edited.items()}
        settings = {"tokens_per_target": edited, "decoding_steps": steps, **settings}
        conditions = [name for name in given if name not in edited]
        return chained_schedule(conditions, chain, self.info, settings, cfg_grow_conditioning)

    def _readable(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The sample by full names, without results that the model cannot read."""
        found = {}
        for name, value in sample.items():
            try:
                full_name = find_modality(name, self.inputs, "an input")
                found[full_name] = _picture(value, self.inputs[full_name]) if torch.is_tensor(value) else value
            except UserError:
                if not isinstance(value, Decoded):
                    raise
        return found

    def _named(self, value: Decoded) -> Decoded:
        return dataclasses.replace(value, names=self.class_names) if value.kind in CLASSES else value


def _picture(value: Tensor, modality: Modality) -> Any:
    """A tensor of pixels, (C, H, W) or a batch of one: normalised as the model takes it, or a picture in 8 bits."""
    if not modality.is_pixels:
        return value
    pixels = value[0] if value.ndim == 4 and len(value) == 1 else value
    if pixels.dtype == torch.uint8 and pixels.ndim == 3 and len(pixels) == modality.num_channels:
        return pixels.permute(1, 2, 0).cpu().numpy()
    size = modality.input_size or pixels.shape[-1]
    if not pixels.is_floating_point() or pixels.shape != (modality.num_channels, size, size):
        raise UserError(
            f"{modality.name}: a tensor must be {modality.num_channels} x {size} x {size} normalised numbers or a picture in "
            f"8 bits (uint8), not {tuple(value.shape)} of type {value.dtype}"
        )
    known = torch.zeros(modality.max_tokens or 1, dtype=torch.bool)
    return decode_modality(pixels.detach().float().cpu(), known, modality, {}, None)


def _load_model(model: str | Path) -> FM:
    folder = Path(model)
    if folder.is_dir() and not (folder / WEIGHTS).exists():
        return load_model(newest_checkpoint(folder))
    return FM.from_pretrained(str(folder if folder.is_dir() else model))


def _vocabulary_of(folder: Path) -> str | None:
    """The vocabulary that a run folder names, or a checkpoint.

    Raises:
        UserError: the file that should name it is damaged.
    """
    state, config = folder / "state.json", folder / "config.yaml"
    if state.is_file():
        try:
            path = json.loads(state.read_bytes()).get("config", {}).get("text_tokenizer_path")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{state} is damaged, and names no text vocabulary: set text_tokenizer") from error
    else:
        path = load_yaml(config).get("text_tokenizer_path") if config.is_file() else None
    if not isinstance(path, str | None):
        raise UserError(f"{state if state.is_file() else config}: 'text_tokenizer_path' is no path: set text_tokenizer")
    return path


def _tokenizer_folders(tokenizers: str | Path | Mapping[str, str | Path] | None) -> dict[str, Path]:
    if tokenizers is None:
        return {}
    if isinstance(tokenizers, Mapping):
        return {name: _downloaded(place) for name, place in tokenizers.items()}
    found = {path.parent.name: path.parent for path in sorted(Path(tokenizers).glob(f"*/{CONFIG}"))}
    if not found:
        raise UserError(f"tokenizers: {tokenizers} has no folder with a {CONFIG}; fit one with fourm fit-codebook")
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
