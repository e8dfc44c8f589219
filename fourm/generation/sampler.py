"""Generates results in one call: ``Sampler.load("run")({"rgb": "photo.jpg"}, targets=["depth", "caption"])``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fourm.data.modality_info import Modality, as_modality
from fourm.generation.batch_entries import emptied
from fourm.generation.chained_generation import GenerationSampler
from fourm.generation.decoding import (
    CLASSES,
    DETOKENIZER,
    Decoded,
    Detokenizer,
    Tokenizers,
    decode,
    decode_modality,
    kind_of,
)
from fourm.generation.defaults import FILE, Defaults, read_defaults
from fourm.generation.inputs import find_modality, is_given, make_batch, split_names
from fourm.generation.plotting import plot
from fourm.generation.prompts import check_prompts
from fourm.generation.settings import COLUMNS, chained_schedule, default_settings, per_target
from fourm.generation.token_sampling import Seed
from fourm.models.fm import FM
from fourm.models.fourm import FourM
from fourm.models.from_checkpoint import load_model
from fourm.utils.checkpoints import WEIGHTS, newest_checkpoint
from fourm.utils.config import load_yaml
from fourm.utils.device import choose_device
from fourm.utils.errors import UserError
from fourm.utils.model_store import download_if_remote, find_model
from fourm.utils.tokenizer import load_text_tokenizer
from fourm.vq import load_tokenizer
from fourm.vq.tokenizer import CONFIG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Decoded]
"""Maps each modality to its decoded value, the inputs first."""

Sample = Mapping[str, Any] | str
"""Maps modalities to values; a text alone is a caption."""

Inputs = Sample | Sequence[Sample]
"""One sample, or several with the same modalities."""


@dataclass(frozen=True)
class Step:
    """The state of a generation after a step.

    Attributes:
        target: The modality that the step generated tokens of.
        number: Number of the step, from 1 to ``total``.
        total: Number of steps of all targets.
        results: Decodes the inputs, the finished targets, and the target of this step as far as it is known. Only
            what has changed since the last call is decoded.
    """

    target: str
    number: int
    total: int
    results: Callable[[], list[Result]]


class Sampler:
    """A model with the tokenizers that convert its inputs and results.

    Args:
        model: The model.
        tokenizers: Maps kinds of images (``rgb``, ``depth``, …) to their tokenizers.
        text_tokenizer: The text vocabulary.
        class_names: Names of the class ids of segmentations.
        dtype: Autocast precision; None disables autocast.
        detokenizer: How images are decoded by diffusion.
        defaults: What is generated, and how, unless a call says otherwise.

    Attributes:
        inputs, targets: The modalities that the model reads and generates.
        default_targets: What a call generates that names no targets, in this order, as far as it is not given.
    """

    def __init__(
        self,
        model: FourM,
        tokenizers: Tokenizers | None = None,
        text_tokenizer: Tokenizer | None = None,
        class_names: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        detokenizer: Detokenizer = DETOKENIZER,
        defaults: Defaults | None = None,
    ):
        self.detokenizer = detokenizer
        self.generation = GenerationSampler(model.eval(), dtype)
        self.tokenizers, self.text_tokenizer = tokenizers or {}, text_tokenizer
        self.class_names = tuple(class_names)
        info = model.modality_info
        self.inputs = {name: as_modality(name, info[name]) for name in model.encoder_embeddings}
        self.targets = {name: as_modality(name, info[name]) for name in model.decoder_embeddings}
        self.info = {**self.inputs, **self.targets}
        self.defaults = defaults or Defaults()
        self.default_targets = self._read_default_targets()
        self._own_settings = self._read_own_settings()

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
        detokenizer: Detokenizer = DETOKENIZER,
    ) -> Sampler:
        """Load a model and its tokenizers. What is not given here is taken from the ``generation.yaml`` of its folder.

        Args:
            model: A run folder (the newest checkpoint is used while the run is unfinished), a folder with
                ``config.json`` and ``model.safetensors``, a ``.safetensors`` file with the configuration in its header,
                the ``s3://`` URL of one of these, or an id on the Hugging Face hub.
            tokenizers: A folder with one tokenizer folder per modality of images, or a mapping from modality to folder,
                file or hub id.
            text_tokenizer: File of the text vocabulary; None uses the one that the run was trained with.
            class_names: Names of the class ids of segmentations.
            device: See :func:`fourm.utils.device.choose_device`.
            dtype: Autocast precision; None disables autocast.
            like: A sampler whose tokenizers, vocabulary and class names are used if they are not given here, such as
                the sampler whose results this one is to upsample.
            compile: Compile the blocks with ``torch.compile``, once for all lengths. This pays off if many batches are
                generated on a GPU.
            detokenizer: How images are decoded by diffusion.

        Raises:
            UserError: If something is missing or damaged, or the text vocabulary is not that of ``like``.
        """
        torch_device = choose_device(device)
        model = download_if_remote(model, find_model)
        defaults = read_defaults(model)
        tokenizers, class_names = tokenizers or defaults.tokenizers, class_names or defaults.class_names
        images = load_tokenizers(tokenizers, torch_device)
        path = text_tokenizer or defaults.text_tokenizer or vocabulary_path(Path(model))
        vocabulary = load_text_tokenizer(path) if path else None
        if like is not None:
            images, class_names = {**like.tokenizers, **images}, class_names or like.class_names
            if vocabulary and like.text_tokenizer and vocabulary.get_vocab() != like.text_tokenizer.get_vocab():
                raise UserError(f"{model}: its text vocabulary is {path}, not that of the model before it")
            vocabulary = vocabulary or like.text_tokenizer
        loaded = load_fm(model).to(torch_device)
        if compile:
            loaded.compile_blocks(dynamic=True)
        return cls(loaded, images, vocabulary, class_names, dtype, detokenizer, defaults)

    def __call__(
        self, inputs: Inputs, targets: str | Sequence[str] | None = None, seed: Seed = None, **options: Any
    ) -> list[Result]:
        """Generate the targets one after another, each conditioned on the inputs and the targets before it.

        Args:
            inputs, targets, seed, options: See :meth:`generate_iter`.

        Returns:
            The inputs and generated targets of each sample.

        Raises:
            UserError: If the inputs, targets or settings do not fit the model.
        """
        for step in self.generate_iter(inputs, targets, seed, **options):  # noqa: B007
            pass
        return step.results()

    def plot(self, results: Sequence[Result] | Result, title: str = "", labels: Sequence[str] = ()) -> Figure:
        """Draw results: see :func:`fourm.generation.plot`."""
        return plot(results, title, labels)

    def generate_iter(
        self,
        inputs: Inputs,
        targets: str | Sequence[str] | None = None,
        seed: Seed = None,
        top_k: int | float | None = None,
        top_p: float | None = None,
        cfg_grow_conditioning: bool = True,
        verbose: bool = False,
        **settings: Any,
    ) -> Iterator[Step]:
        """Generate like :meth:`__call__`, but yield after every step.

        Args:
            inputs: Maps modalities to values, see :func:`fourm.generation.inputs.read_value`; a text alone is a
                caption. A list of such samples with the same modalities is one batch. Results may be inputs, too; those
                that the model cannot read are ignored.
            targets: One or several modalities; None means those of ``default_targets`` that are not given. Here and in
                ``inputs``, ``depth`` stands for ``tok_depth@224``. If an image is also an input, its tokens that are −1
                are generated.
            seed: See :class:`GenerationSampler`; sample b uses ``seed + b``.
            top_k, top_p: See :class:`fourm.generation.token_sampling.TokenSampler`; None means the model's defaults.
            cfg_grow_conditioning: Let finished targets guide the targets after them.
            verbose: Show a progress bar.
            settings: See :func:`fourm.generation.settings.chained_schedule`, e.g. ``temps={"caption": 0}``.

        Raises:
            UserError: If the inputs, targets or settings do not fit the model.
        """
        samples = [self._readable(sample) for sample in _as_list(inputs)]
        if targets is None and samples:
            targets = self.remaining_targets(samples[0])
        targets = [targets] if isinstance(targets, str) else targets
        if not targets:
            raise UserError("generation needs at least one target")
        top_k, top_p = self._top(top_k, top_p)
        batch = self._batch(samples)
        missing = {name: int(entry["input_mask"].sum(1).max()) for name, entry in batch.items()}
        schedule = self.schedule(missing, targets, cfg_grow_conditioning, **settings)
        batches = self.generation.generate_iter(batch, schedule, top_k, top_p, self.text_tokenizer, verbose, seed)
        generated = {step["target_domain"] for step in schedule}
        # Inputs that are results are returned as they are.
        unchanged = {n for n in batch.keys() - generated if all(isinstance(sample[n], Decoded) for sample in samples)}
        known: dict[str, tuple[Mapping[str, Tensor], list[Decoded]]] = {}

        def read(state: Mapping[str, Mapping[str, Tensor]]) -> list[Result]:
            for name, entry in state.items():
                if name in unchanged:
                    known[name] = entry, [sample[name] for sample in samples]
                elif name not in known or any(entry[key] is not known[name][0][key] for key in entry):
                    known[name] = entry, [sample[name] for sample in self._decode({name: entry})]
            return [{name: known[name][1][index] for name in state} for index in range(len(samples))]

        return (
            Step(step["target_domain"], number, len(schedule), partial(read, state))
            for number, (step, state) in enumerate(zip(schedule, batches, strict=True), 1)
        )

    def multi_guided(
        self,
        conditions: Sequence[Inputs],
        weights: Sequence[float],
        targets: str | Sequence[str],
        seed: Seed = None,
        top_k: int | float | None = None,
        top_p: float | None = None,
        cfg_grow_conditioning: bool = True,
        verbose: bool = False,
        **settings: Any,
    ) -> list[Result]:
        """Generate under several weighted conditions: logits = uncond + Σ w_i·(cond_i − uncond).

        Args:
            conditions: The inputs of each condition, as in :meth:`generate_iter`. Their modalities may differ, but all
                conditions have the same number of samples.
            weights: Weight of each condition. One condition of weight s is guidance of scale s, and a negative weight
                leads away from its condition.
            targets, seed, top_k, top_p, cfg_grow_conditioning, verbose: See :meth:`generate_iter`.
            settings: See :meth:`generate_iter`; ``weights`` take the place of ``cfg_scales``.

        Returns:
            The generated targets of each sample.

        Raises:
            UserError: If the conditions, weights, targets or settings do not fit together, or do not fit the model.
        """
        if not conditions or len(conditions) != len(weights):
            raise UserError(f"every condition needs a weight, but there are {len(conditions)} and {len(weights)}")
        if "cfg_scales" in settings:
            raise UserError("weights take the place of cfg_scales; leave cfg_scales out")
        batches = [self._batch(inputs) for inputs in conditions]
        everything = {name: entry for batch in batches for name, entry in batch.items()}
        # Conditions differ from the unconditional inputs in nothing but their own content.
        unconditional = emptied(everything, self.info, everything)
        missing = {name: int(entry["input_mask"].sum(1).max()) for name, entry in everything.items()}
        steps = self.schedule(missing, targets, cfg_grow_conditioning, **settings)
        schedule = [{**step, "cfg_scale": list(weights)} for step in steps]
        top_k, top_p = self._top(top_k, top_p)
        state = self.generation.generate_multi_guided(
            unconditional,
            [{**unconditional, **batch} for batch in batches],
            schedule,
            top_k,
            top_p,
            self.text_tokenizer,
            verbose,
            seed,
        )
        return self._decode({step["target_domain"]: state[step["target_domain"]] for step in schedule})

    def read(self, inputs: Inputs) -> list[Result]:
        """Return the inputs as the model reads them, for example a picture after its tokenizer.

        Args:
            inputs: See :meth:`generate_iter`.

        Raises:
            UserError: If the inputs do not fit the model.
        """
        return self._decode(self._batch(inputs))

    @torch.inference_mode()
    def features(self, inputs: Inputs) -> Tensor:
        """Return one vector per sample, (B, D) on the CPU: the mean of the encoder's output over the input tokens.

        Args:
            inputs: See :meth:`generate_iter`.

        Raises:
            UserError: If the inputs do not fit the model.
        """
        with self.generation.running():
            return self.generation.model.pooled(self._batch(inputs)).float().cpu()

    def schedule(
        self,
        given: Mapping[str, int],
        targets: str | Sequence[str],
        cfg_grow_conditioning: bool = True,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """Return the schedule of a call with these arguments.

        Args:
            given: Maps each input modality to the number of its unknown tokens, which is 0 if it is complete.
            targets, cfg_grow_conditioning, settings: See :meth:`__call__`.

        Raises:
            UserError: If the targets or settings do not fit the model.
        """
        targets = [targets] if isinstance(targets, str) else targets
        chain = [find_modality(name, self.targets, "a target", avoid=given) for name in targets]
        edited = {name: given[name] for name in chain if given.get(name) and self.targets[name].type == "img"}
        conflicts = [name for name in chain if (name in given and name not in edited) or chain.count(name) > 1]
        if conflicts:
            raise UserError(f"{conflicts[0]} is to be generated, but it is given as an input or named twice")
        others = self.targets.keys() - chain
        by_full_name = {
            key: {find_modality(name, self.targets, "a target", avoid=others): v for name, v in value.items()}
            for key, value in settings.items()
            if isinstance(value, Mapping)
        }
        steps = {name: max(count // 4, 1) for name, count in edited.items()}
        settings = {"tokens_per_target": edited, "decoding_steps": steps, **settings, **by_full_name}
        conditions = [name for name in given if name not in edited]
        return chained_schedule(conditions, chain, self.info, settings, cfg_grow_conditioning, own=self._own_settings)

    def default_settings(self, target: str) -> dict[str, Any]:
        """Return a target's settings if a call gives none; see :func:`fourm.generation.settings.chained_schedule`."""
        return default_settings(self.targets[target]) | self._own_settings.get(target, {})

    def remaining_targets(self, given: Iterable[str]) -> list[str]:
        """Return those of ``default_targets`` whose content is not among the inputs ``given``, which are full names."""
        inputs = {name: self.inputs[name] for name in given}
        return [name for name in self.default_targets if not is_given(self.targets[name], inputs)]

    def _read_default_targets(self) -> tuple[str, ...]:
        """Return the targets of ``defaults``, and otherwise all: RGB first, texts last. Texts need the vocabulary."""
        if self.defaults.target_domains:
            names = split_names(self.defaults.target_domains, self.targets, f"{FILE}: target_domains")
            return tuple(find_modality(name, self.targets, "a target") for name in names)
        names = tuple(name for name, m in self.targets.items() if m.type != "seq" or self.text_tokenizer)
        return tuple(sorted(names, key=lambda n: (self.targets[n].type != "img", kind_of(self.targets[n]) != "rgb")))

    def _read_own_settings(self) -> dict[str, dict[str, Any]]:
        """Return target → settings of ``defaults``. As in a call, a temperature is constant if it has no schedule."""
        own: dict[str, dict[str, Any]] = {name: {} for name in self.targets}
        for key, value in self.defaults.settings().items():
            names = self.default_targets
            if isinstance(value, Mapping):
                value = {find_modality(name, self.targets, "a target"): v for name, v in value.items()}
                names = tuple(own)
            settings = per_target(value, COLUMNS[key], names, f"{FILE}: '{key}'")
            for name, setting in zip(names, settings, strict=True):
                if setting is not None:
                    own[name][key] = setting
        return {name: {"temp_schedules": "constant"} | s if "temps" in s else s for name, s in own.items()}

    def _top(self, top_k: int | float | None, top_p: float | None) -> tuple[int | float, float]:
        """Return ``top_k`` and ``top_p``, where None means the model's defaults."""
        return (
            (self.defaults.top_k or 0.0) if top_k is None else top_k,
            (self.defaults.top_p or 0.0) if top_p is None else top_p,
        )

    def _batch(self, inputs: Inputs) -> dict[str, Any]:
        """Return the batch that has all of ``inputs`` as input, on the device of the model."""
        samples = [self._readable(sample) for sample in _as_list(inputs)]
        if not samples or not samples[0]:
            raise UserError("the model needs at least one input")
        device = self.generation.model.mask_token.device
        return make_batch(samples, self.info, self.tokenizers, self.text_tokenizer, device)

    def _readable(self, sample: Sample) -> dict[str, Any]:
        """Return the sample by full names, without results that the model cannot read."""
        if isinstance(sample, str):
            sample = {find_modality("caption", self.inputs, "an input"): check_prompts([sample], "the caption")[0]}
        readable = {}
        for name, value in sample.items():
            try:
                full_name = find_modality(name, self.inputs, "an input")
                readable[full_name] = _read_tensor(value, self.inputs[full_name]) if torch.is_tensor(value) else value
            except UserError:
                if not isinstance(value, Decoded):
                    raise
        return readable

    def _decode(self, batch: Mapping[str, Mapping[str, Tensor]]) -> list[Result]:
        return [
            {name: self._add_class_names(value) for name, value in sample.items()}
            for sample in decode(batch, self.info, self.tokenizers, self.text_tokenizer, self.detokenizer)
        ]

    def _add_class_names(self, value: Decoded) -> Decoded:
        return dataclasses.replace(value, names=self.class_names) if value.kind in CLASSES else value


def _as_list(inputs: Inputs) -> Sequence[Sample]:
    return [inputs] if isinstance(inputs, (Mapping, str)) else inputs


def _read_tensor(value: Tensor, modality: Modality) -> Any:
    """Convert a tensor of pixels, (C, H, W) or a batch of one, that is normalised for the model or has 8 bits."""
    if not modality.is_pixels:
        return value
    pixels = value[0] if value.ndim == 4 and len(value) == 1 else value
    if pixels.dtype == torch.uint8 and pixels.ndim == 3 and len(pixels) == modality.num_channels:
        return pixels.permute(1, 2, 0).cpu().numpy()
    size = modality.input_size or pixels.shape[-1]
    if not pixels.is_floating_point() or pixels.shape != (modality.num_channels, size, size):
        raise UserError(
            f"{modality.name}: a tensor must be {modality.num_channels} x {size} x {size} normalised numbers or a "
            f"picture in 8 bits (uint8), not {tuple(value.shape)} of type {value.dtype}"
        )
    known = torch.zeros(modality.max_tokens or 1, dtype=torch.bool)
    return decode_modality(pixels.detach().float().cpu(), known, modality, {}, None)


def load_fm(model: str | Path) -> FM:
    """Load a model from any place that :meth:`Sampler.load` takes and that is not in a store."""
    folder = Path(model)
    if folder.is_dir() and not (folder / WEIGHTS).exists():
        return load_model(newest_checkpoint(folder))
    return FM.from_pretrained(str(folder if folder.is_dir() else model))


def vocabulary_path(folder: Path) -> str | None:
    """Return the path of the text vocabulary that a run folder or a checkpoint names.

    Raises:
        UserError: If the file that should name it is damaged.
    """
    state, config = folder / "state.json", folder / "config.yaml"
    if state.is_file():
        try:
            path = json.loads(state.read_bytes()).get("config", {}).get("text_tokenizer_path")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{state} is damaged and names no text vocabulary; set text_tokenizer") from error
    else:
        path = load_yaml(config).get("text_tokenizer_path") if config.is_file() else None
    if not isinstance(path, str | None):
        file = state if state.is_file() else config
        raise UserError(f"{file}: 'text_tokenizer_path' is not a path; set text_tokenizer")
    return path


def load_tokenizers(
    places: str | Path | Mapping[str, str | Path] | None, device: str | torch.device = "cpu"
) -> Tokenizers:
    """Load the tokenizers of several kinds of modalities.

    Args:
        places: A folder with one tokenizer folder per kind (``rgb``, ``clip``, ``human_poses``, …), or a mapping from
            kind to folder, file or hub id; None loads nothing.
        device: The device of the tokenizers.

    Raises:
        UserError: There are no tokenizers, or one cannot be loaded.
    """
    if not isinstance(places, (Mapping, type(None))):
        folder = places
        places = {path.parent.name: path.parent for path in sorted(Path(folder).glob(f"*/{CONFIG}"))}
        if not places:
            raise UserError(
                f"tokenizers: {folder} has no folder with a {CONFIG}; make a tokenizer with fourm fit-codebook"
            )
    return {name: load_tokenizer(place, device) for name, place in (places or {}).items()}
