"""Load the data YAML into typed data sets; all references are resolved and checked before training starts.

``train.datasets.NAME`` declares a data set, and ``val.datasets.NAME`` one for validation, which inherits unset fields
from the training set of that name. ``modalities:`` declares modalities that the table lacks.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fourm.data.alphas import alphas_from_file, alphas_from_values
from fourm.data.budgets import BudgetSampler
from fourm.data.image_augmenter import (
    AbstractImageAugmenter,
    CenterCropImageAugmenter,
    EmptyAugmenter,
    PreTokenizedImageAugmenter,
    RandomCropImageAugmenter,
)
from fourm.data.layout import expand, expand_braces, is_remote, split_data_path
from fourm.data.modality_info import MODALITY_INFO, Modality, resolve_modalities
from fourm.data.modality_transforms import (
    MODALITY_TRANSFORMS,
    CaptionEmbTransform,
    CaptionTransform,
    ImageTransform,
    PixelTransform,
    UnifiedDataTransform,
    transforms_for,
)
from fourm.data.presence import Missing, Presence, presence
from fourm.data.shard_cache import RemoteOptions
from fourm.utils.config import Range, build, check_keys, convert, load_yaml
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.options import option
from fourm.utils.paths import AnyPath, InputPath, expand_path
from fourm.utils.seeds import generator

_BUDGET_DRAWS = 200  # if none of so many draws has a target token, we assume that no draw has


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The fields of a data set that need no resolution.

    Attributes:
        type: ``multimodal`` (shards or folders) or ``huggingface`` (records: JSON or text files, or a data set on the
            hub).
        data_path: Location of the data, e.g. ``root/[rgb,caption]/shard-{00000..00099}.tar``.
        missing: Whether a sample that lacks a modality is bad (``error``), is left out (``skip``), or is used with the
            modalities that it has (``allow``).
        masking: ``mixture`` draws budgets from a Dirichlet mixture. ``transfer`` uses all tokens of in_domains as input
            and all tokens of out_domains as target.
        use_wds: Whether the data are tar shards. If False, or if data_path is a folder, they are folders of files.
        wds_n_repeats: Number of times a sample is used while it is in memory, with different crops and masks.
        wds_shuffle_buffer_tar: Number of samples that are shuffled before the repeats.
        wds_shuffle_buffer_repeat: Number of samples that are shuffled after the repeats.
        main_augment_domain: Modality whose image defines the original size; None = the first pixel modality.
        aligned_captions: Whether a list of captions has one caption per stored crop.
        tok_train_aug: Whether to draw a random stored crop; False always takes the first, which is the centre crop.
        hflip: Probability of a horizontal flip, for data without tokens.
        crop_scale: Range of the area of crops relative to the image, for data without tokens.
        crop_ratio: Range of the aspect ratio (width by height) of crops, for data without tokens.
        modality_name_map: Folder (or column) → modality where the names differ.
        max_bad_fraction: Maximum share of unusable samples; more than this stops the run.
    """

    type: Literal["multimodal", "huggingface"] = "multimodal"
    data_path: AnyPath
    missing: Missing = "error"
    masking: Literal["mixture", "transfer"] = "mixture"
    use_wds: bool = False
    wds_n_repeats: int = option("uses of a sample", 1, at_least=1, at_most=10**6)
    wds_shuffle_buffer_tar: int = option("samples", 1000, at_least=0, at_most=10**8)
    wds_shuffle_buffer_repeat: int = option("samples", 1000, at_least=0, at_most=10**8)
    main_augment_domain: str | None = None
    aligned_captions: bool = True
    tok_train_aug: bool = True
    hflip: float = option("probability", 0.5, at_least=0, at_most=1)
    crop_scale: tuple[float, float] = option("share of the area", (0.2, 1.0), above=0, at_most=1)
    crop_ratio: tuple[float, float] = option("width by height", (3 / 4, 4 / 3), at_least=0.01, at_most=100)
    modality_name_map: dict[str, str] = dataclasses.field(default_factory=dict)
    max_bad_fraction: float = option("share of the samples", 0.01, at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class _DeclaredDataset(_Options):
    """A data set as declared in the YAML. A number of tokens that is None comes from the main config."""

    in_domains: str | list[str]
    out_domains: str | list[str]
    input_alphas: Any = None
    target_alphas: Any = None
    alphas_config: InputPath | None = None
    num_input_tokens: int | None = option("tokens", None, at_least=0, at_most=10**6)
    num_target_tokens: int | None = option("tokens", None, at_least=0, at_most=10**6)
    min_input_tokens: int | None = option("tokens", None, at_least=0)
    min_target_tokens: int | None = option("tokens", None, at_least=0)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(_Options):
    """A resolved data set.

    Attributes:
        name: Key of the data set in the YAML.
        in_domains: Names of the modalities that may be inputs.
        out_domains: Names of the modalities that may be targets.
        modalities: All of these modalities, inputs first, with ``input_alphas``, ``target_alphas`` and ``keep``.
        sampling_weights: Weights of the components of the mixture; None = equal.
        input_tokens_range: Minimum and maximum input tokens of a sample, both inclusive.
        target_tokens_range: Minimum and maximum target tokens of a sample, both inclusive.
        remote: Options for reading shards from object stores.
    """

    name: str
    in_domains: tuple[str, ...]
    out_domains: tuple[str, ...]
    modalities: dict[str, Modality]
    sampling_weights: tuple[float, ...] | None
    input_tokens_range: tuple[int, int]
    target_tokens_range: tuple[int, int]
    remote: RemoteOptions | None = None

    @property
    def presence(self) -> Presence:
        """The rules for samples that lack modalities."""
        return presence(self.missing, self.modalities, transforms_for(self.modalities), self.main_augment_domain)


@dataclass(frozen=True)
class DataConfig:
    """All data sets of a run.

    Attributes:
        train: Training sets by name, in the order of the file.
        weights: Unnormalised weight of each training set in the mixture.
        val: Validation sets by name, in the order of the file.
        declarations: The ``modalities:`` block of the file, from which models build their embeddings.
        path: Path of the file.
    """

    train: dict[str, DatasetConfig]
    weights: dict[str, float]
    val: dict[str, DatasetConfig]
    declarations: dict[str, dict[str, Any]]
    path: Path

    @property
    def in_domains(self) -> list[str]:
        """Every input modality of the training sets, sorted."""
        return sorted({name for dataset in self.train.values() for name in dataset.in_domains})

    @property
    def out_domains(self) -> list[str]:
        """Every target modality of the training sets, sorted."""
        return sorted({name for dataset in self.train.values() for name in dataset.out_domains})

    @property
    def modalities(self) -> dict[str, Modality]:
        """Every modality of the training sets, sorted by name, without alphas."""
        names = sorted({*self.in_domains, *self.out_domains})
        return resolve_modalities(names, self.declarations, str(self.path))


def load_data_config(
    path: str | Path,
    *,
    num_input_tokens: int,
    num_target_tokens: int,
    min_input_tokens: int | None = None,
    min_target_tokens: int | None = None,
    max_bad_fraction: float = 0.01,
    remote: RemoteOptions | None = None,
) -> DataConfig:
    """Read a data YAML and the alphas files that it refers to.

    Args:
        path: Path of the YAML.
        num_input_tokens: Maximum input tokens of data sets that do not set their own.
        num_target_tokens: Maximum target tokens of data sets that do not set their own.
        min_input_tokens: Minimum input tokens of data sets that do not set their own; None = the maximum.
        min_target_tokens: Minimum target tokens of data sets that do not set their own; None = the maximum.
        max_bad_fraction: Maximum share of unusable samples of data sets that do not set their own.
        remote: Options for reading shards from object stores.

    Raises:
        UserError: The configuration is invalid. The message names the file, data set and key, and suggests a name.
    """
    path = Path(expand_path(str(path), "data_config"))
    content = load_yaml(path)
    check_keys(content, ("train", "val", "modalities"), str(path))
    declarations = _mapping(content, "modalities", str(path))
    train, val = (_mapping(content, split, str(path)) for split in ("train", "val"))
    check_keys(train, ("datasets", "weights"), f"{path}: train")
    check_keys(val, ("datasets",), f"{path}: val")
    train_sets, val_sets = _datasets(train, f"{path}: train"), _datasets(val, f"{path}: val")
    if not train_sets:
        raise UserError(f"{path}: 'train.datasets' must declare at least one data set")
    inherited = {name: _inherit(train_sets.get(name, {}), own) for name, own in val_sets.items()}
    defaults = {
        "num_input_tokens": num_input_tokens,
        "num_target_tokens": num_target_tokens,
        "min_input_tokens": min_input_tokens,
        "min_target_tokens": min_target_tokens,
        "max_bad_fraction": max_bad_fraction,
    }

    def resolve(split: str, sets: Mapping[str, Any]) -> dict[str, DatasetConfig]:
        return {
            name: replace(
                _dataset(name, defaults | fields, declarations, path, f"{path}: {split}.datasets.{name}"), remote=remote
            )
            for name, fields in sets.items()
        }

    weights = _weights(train.get("weights"), list(train_sets), f"{path}: train.weights")
    return DataConfig(resolve("train", train_sets), weights, resolve("val", inherited), declarations, path)


def build_sample_transform(dataset: DatasetConfig, training: bool, raw_pixels: bool = False) -> UnifiedDataTransform:
    """Build the aligned transform of a data set.

    Args:
        dataset: The data set.
        training: Use random crops; otherwise the first stored crop or the centre crop.
        raw_pixels: Leave images in 8 bits, see :class:`PixelTransform`.

    Raises:
        UserError: A transform does not exist or does not match its modality.
    """
    captions = {
        name: replace(transform, aligned_captions=dataset.aligned_captions)
        for name, transform in MODALITY_TRANSFORMS.items()
        if isinstance(transform, (CaptionTransform, CaptionEmbTransform))
    }
    transforms = transforms_for(dataset.modalities, {**MODALITY_TRANSFORMS, **captions})
    if raw_pixels:
        transforms = {k: replace(t, raw=True) if isinstance(t, PixelTransform) else t for k, t in transforms.items()}
    return UnifiedDataTransform(transforms, _augmenter(dataset, training))


def _augmenter(dataset: DatasetConfig, training: bool) -> AbstractImageAugmenter:
    main = dataset.main_augment_domain or ""
    size = (dataset.modalities[main].input_size if main in dataset.modalities else None) or 224
    if any(m.pretokenized for m in dataset.modalities.values()):
        no_aug = not (training and dataset.tok_train_aug)
        return PreTokenizedImageAugmenter(size, no_aug, main_domain=main)
    if main not in dataset.modalities:
        return EmptyAugmenter()
    if not training:
        return CenterCropImageAugmenter(size, main_domain=main)
    return RandomCropImageAugmenter(size, dataset.hflip, dataset.crop_scale, dataset.crop_ratio, main_domain=main)


def _dataset(
    name: str, fields: Mapping[str, Any], declarations: Mapping[str, Any], path: Path, where: str
) -> DatasetConfig:
    fields = _rename_published_keys(fields, where)
    declared = build(_DeclaredDataset, fields, where, path)
    declared = replace(declared, data_path=_resolve_data_path(declared.data_path, path))
    known = {**MODALITY_INFO, **declarations}
    inputs = split_domains(declared.in_domains, known, f"{where}: 'in_domains'")
    targets = split_domains(declared.out_domains, known, f"{where}: 'out_domains'")
    modalities = resolve_modalities(dict.fromkeys((*inputs, *targets)), declarations, where)
    for domains, role, embedding in ((inputs, "an input", "encoder"), (targets, "a target", "decoder")):
        for domain in domains:
            if not modalities[domain][f"{embedding}_embedding"]:
                raise UserError(f"{where}: modality {domain} cannot be {role}: it has no {embedding}_embedding")
    if declared.alphas_config is not None:
        if declared.input_alphas is not None or declared.target_alphas is not None:
            raise UserError(f"{where}: set either 'alphas_config' or 'input_alphas' and 'target_alphas', not both")
        if not Path(declared.alphas_config).is_file():
            raise UserError(
                f"{where}: 'alphas_config': there is no file {declared.alphas_config} in the working directory, in the "
                f"folder of {path}, or in a parent folder of it"
            )
        mixture = alphas_from_file(Path(declared.alphas_config), modalities, inputs, targets)
    else:
        default = 1.0 if declared.masking == "transfer" else None
        input_alphas = default if declared.input_alphas is None else declared.input_alphas
        target_alphas = default if declared.target_alphas is None else declared.target_alphas
        mixture = alphas_from_values(input_alphas, target_alphas, inputs, targets, where)
    _check_type_and_masking(declared, modalities, inputs, targets, where)
    check_keys(dict.fromkeys(declared.modality_name_map.values()), modalities, f"{where}: 'modality_name_map'")
    for key in ("crop_scale", "crop_ratio"):
        pair = getattr(declared, key)
        if len(pair) != 2 or pair[0] > pair[1]:
            raise UserError(f"{where}: '{key}' must be two numbers, the smaller one first, not {list(pair)}")
    options = {f.name: getattr(declared, f.name) for f in dataclasses.fields(_Options)}
    options["use_wds"] = declared.use_wds and not _is_folder(declared.data_path, where)
    options["main_augment_domain"] = _main_domain(declared.main_augment_domain, modalities, where)
    dataset = DatasetConfig(
        **options,
        name=name,
        in_domains=inputs,
        out_domains=targets,
        modalities={key: mixture.fill(modality) for key, modality in modalities.items()},
        sampling_weights=mixture.sampling_weights,
        input_tokens_range=_range(declared.min_input_tokens, declared.num_input_tokens, f"{where}: input"),
        target_tokens_range=_range(declared.min_target_tokens, declared.num_target_tokens, f"{where}: target"),
    )
    if dataset.masking == "mixture":
        _check_targets(dataset, where)
    return dataset


def _resolve_data_path(data_path: str, config: Path) -> str:
    """Resolve a relative path against the working directory, the folder of the configuration and its parents."""
    if is_remote(data_path) or re.match(r"\w+://", data_path) or os.path.isabs(data_path):
        return data_path
    pattern, folders = split_data_path(re.sub(r":\w+$", "", data_path))  # without the split of records
    first_files = [expand_braces(pattern)[0].replace("\0", folder) for folder in folders or [""]]
    for parent in ("", *map(str, config.resolve().parents)):
        for file in first_files:
            if next(glob.iglob(os.path.join(glob.escape(parent), file)), None):
                return os.path.join(parent, data_path)
    return data_path


def _rename_published_keys(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rename keys of published configs to ours: those of records use ``shuffle_buffer_load``."""
    fields = dict(fields)
    if "shuffle_buffer_load" in fields:
        if "wds_shuffle_buffer_tar" in fields:
            raise UserError(
                f"{where}: 'shuffle_buffer_load' and 'wds_shuffle_buffer_tar' have the same meaning; keep one of them"
            )
        fields["wds_shuffle_buffer_tar"] = fields.pop("shuffle_buffer_load")
    return fields


def _is_folder(data_path: str, where: str) -> bool:
    """Return whether ``data_path`` names folders of files rather than shards.

    Raises:
        UserError: The path is a folder that contains shards.
    """
    if is_remote(data_path):
        return False
    pattern, names = split_data_path(data_path)
    first = Path(expand(pattern, names[0] if names else None)[0])
    if first.suffix == ".tar" or not first.is_dir():
        return False
    if any(first.glob("*.tar")) or any(first.glob("*/*.tar")):
        raise UserError(
            f"{where}: 'data_path' {data_path} is a folder with shards; name the shards, "
            "for example ROOT/[rgb,caption]/shard-{00000..00099}.tar"
        )
    return True


def leaves_targets(dataset: DatasetConfig) -> bool:
    """Return whether the input budgets leave tokens to predict, because a patch cannot be both input and target."""
    ranges = dataset.input_tokens_range, dataset.target_tokens_range
    budgets = BudgetSampler(dataset.modalities, *ranges, sampling_weights=dataset.sampling_weights)
    rng = generator(0, "targets")
    return any(any(budgets.draw(rng).target.values()) for _ in range(_BUDGET_DRAWS))


def _check_targets(dataset: DatasetConfig, where: str) -> None:
    """Raise a :class:`UserError` if no tokens are left to predict."""
    if not leaves_targets(dataset):
        inputs, targets = dataset.input_tokens_range, dataset.target_tokens_range
        max_tokens = sum(modality.max_tokens or 0 for modality in dataset.modalities.values())
        raise UserError(
            f"{where}: nothing is left to predict: samples have at most {max_tokens} tokens, of which inputs take "
            f"{inputs[0]} to {inputs[1]} and targets {targets[0]} to {targets[1]}; lower 'num_input_tokens' and "
            "'min_input_tokens', or raise 'num_target_tokens'"
        )


def _check_type_and_masking(
    declared: _DeclaredDataset,
    modalities: Mapping[str, Modality],
    inputs: Sequence[str],
    targets: Sequence[str],
    where: str,
) -> None:
    """Raise a :class:`UserError` for modalities that ``type`` or ``masking`` does not support."""
    if declared.type == "huggingface":
        for name, modality in modalities.items():
            if modality.pretokenized or modality.is_pixels:
                raise UserError(f"{where}: modality {name} cannot be read from records; use type multimodal")
    both = [name for name in inputs if name in targets]
    if declared.masking == "transfer" and both:
        raise UserError(f"{where}: 'masking' transfer: {both[0]} cannot be in in_domains and in out_domains")


def _main_domain(name: str | None, modalities: Mapping[str, Modality], where: str) -> str | None:
    """Return the modality whose image defines the original size: ``name``, or else the first pixel modality."""
    pixels = [m.name for m in modalities.values() if m.is_pixels and _is_picture(m)]
    boxes_follow_crops = any(m.transform == "det" for m in modalities.values()) and any(
        m.pretokenized for m in modalities.values()
    )
    if name is None and pixels:
        return pixels[0]
    if name not in pixels and (pixels or boxes_follow_crops):
        raise UserError(
            f"{where}: 'main_augment_domain' must be a pixel modality of this data set "
            f"({', '.join(pixels) or 'it has none, but boxes that follow crops need one'}), "
            f"not {name!r}{did_you_mean(str(name), pixels)}"
        )
    return name


def _is_picture(modality: Modality) -> bool:
    return isinstance(MODALITY_TRANSFORMS.get(modality.transform or ""), ImageTransform)


def split_domains(value: str | Sequence[str], known: Iterable[str], where: str) -> tuple[str, ...]:
    """Split names joined by ``-``, or check a list. A name may contain ``-``: the longest known name is taken.

    Raises:
        UserError: A name is unknown or repeated, or there is none.
    """
    known = set(known)
    parts = value.split("-") if isinstance(value, str) else list(value)
    names: list[str] = []
    while parts:
        ends = [end for end in range(len(parts), 0, -1) if "-".join(parts[:end]) in known]
        if not ends:
            raise UserError(
                f"{where}: unknown modality '{parts[0]}'{did_you_mean(parts[0], known)}; names are joined by '-', "
                "and new ones are declared in a 'modalities:' block"
            )
        names.append("-".join(parts[: ends[0]]))
        parts = parts[ends[0] :]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated or not names:
        raise UserError(f"{where}: " + (f"'{repeated[0]}' is listed twice" if repeated else "lists no modality"))
    return tuple(names)


def _inherit(train: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a validation set's fields into those of the training set; its own alphas replace all inherited ones."""
    alphas = {"input_alphas", "target_alphas", "alphas_config"}
    dropped = alphas if alphas & own.keys() else set()
    return {key: value for key, value in train.items() if key not in dropped} | dict(own)


def _mapping(content: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    return convert(content.get(key) or {}, dict[str, Any], f"{where}: '{key}'")


def _datasets(split: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    datasets = _mapping(split, "datasets", where)
    return {name: _mapping(datasets, name, f"{where}.datasets") for name in datasets}


def _weights(value: Any, names: Sequence[str], where: str) -> dict[str, float]:
    """Parse a list of weights in the order of the data sets, or a mapping by name; all weights are equal if unset."""
    if isinstance(value, Mapping):
        check_keys(value, names, where)
        value = [value.get(name, 0) for name in names]
    weights = convert([1.0] * len(names) if value is None else value, list[float], where)
    Range(at_least=0, at_most=1e9).check(weights, where)
    if len(weights) != len(names) or sum(weights) <= 0:
        raise UserError(f"{where} must be one number of at least 0 for each of {', '.join(names)}, not {value}")
    return dict(zip(names, weights, strict=True))


def _range(low: int | None, high: int | None, where: str) -> tuple[int, int]:
    assert high is not None  # load_data_config gives every data set a maximum
    low = high if low is None else low
    if not 0 <= low <= high:
        raise UserError(
            f"{where} tokens must range from a minimum of at least 0 to a maximum, not from {low} to {high}"
        )
    return low, high
