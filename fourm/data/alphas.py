"""The Dirichlet mixture of a data set, which divides a sample's tokens among its modalities.

Component m of the mixture draws the input budgets from Dirichlet(input_alphas[:, m]), and the target budgets from
Dirichlet(target_alphas[:, m]) (4M, arXiv 2312.06647, its method section and its appendix on masking).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fourm.data.modality_info import Modality
from fourm.utils.config import Range, build, convert, load_yaml
from fourm.utils.errors import UserError, did_you_mean

Keep = Literal["random", "all", "binary"]


@dataclass(frozen=True)
class _ModalityAlphas:
    """One modality of an alphas file, with a value per component or a single value for a single component."""

    input_alphas: float | list[float] | None = None
    target_alphas: float | list[float] | None = None
    keep: Keep | list[Keep] | None = None


@dataclass(frozen=True)
class Mixture:
    """The alphas and keep schemes of a mixture by modality, with one value per component.

    Attributes:
        input_alphas: Input alphas of each input modality.
        target_alphas: Target alphas of each target modality.
        keep: Keep schemes of sequences.
        sampling_weights: Weights of the components; None = equal.
    """

    input_alphas: dict[str, tuple[float, ...]]
    target_alphas: dict[str, tuple[float, ...]]
    keep: dict[str, tuple[str, ...]]
    sampling_weights: tuple[float, ...] | None = None

    def fill(self, modality: Modality) -> Modality:
        """Return ``modality`` with its values; alphas are 0 in a role that it does not have."""
        components = len(next(iter((*self.input_alphas.values(), *self.target_alphas.values()))))
        is_text = modality.type.startswith("seq")
        return dataclasses.replace(
            modality,
            input_alphas=self.input_alphas.get(modality.name, (0.0,) * components),
            target_alphas=self.target_alphas.get(modality.name, (0.0,) * components),
            keep=self.keep.get(modality.name, ("random",) * components) if is_text else (),
        )


def alphas_from_values(
    input_alphas: Any, target_alphas: Any, inputs: Sequence[str], targets: Sequence[str], where: str
) -> Mixture:
    """Build a mixture of one component from one value, or from a value per modality (joined by ``-``, or a list)."""

    def spread(value: Any, names: Sequence[str], key: str) -> dict[str, tuple[float, ...]]:
        if value is None:
            raise UserError(f"{where}: '{key}' is required, or an 'alphas_config'")
        # A minus sign in an exponent is not a separator.
        parts = re.split(r"(?<![eE])-", value) if isinstance(value, str) else value
        numbers = convert(parts if isinstance(parts, list) else [parts], list[float], f"{where}: '{key}'")
        if len(numbers) not in (1, len(names)):
            raise UserError(
                f"{where}: '{key}' has {len(numbers)} values for {len(names)} modalities ({', '.join(names)})"
            )
        numbers = numbers * len(names) if len(numbers) == 1 else numbers
        return {
            name: (_non_negative(number, f"{where}: '{key}'"),) for name, number in zip(names, numbers, strict=True)
        }

    return Mixture(
        spread(input_alphas, inputs, "input_alphas"), spread(target_alphas, targets, "target_alphas"), keep={}
    )


def alphas_from_file(
    path: Path, modalities: Mapping[str, Modality], inputs: Sequence[str], targets: Sequence[str]
) -> Mixture:
    """Build a mixture from the entries of an alphas file for ``modalities``; the file may contain others.

    Raises:
        UserError: A modality lacks values that its role requires, or lists differ in length.
    """
    content = load_yaml(path)
    weights = None
    if "alphas_mixture" in content:
        unknown = content.keys() - {"alphas_mixture", "sampling_weights"}
        if unknown:
            raise UserError(
                f"{path}: unknown key '{sorted(unknown)[0]}' beside 'alphas_mixture' and 'sampling_weights'"
            )
        weights, content = content.get("sampling_weights"), content["alphas_mixture"]
        content = convert(content, dict[str, Any], f"{path}: 'alphas_mixture'")
    entries: dict[str, _ModalityAlphas] = {}
    for name in modalities:
        if name not in content:
            raise UserError(f"{path}: no alphas for modality {name}{did_you_mean(name, content)}; add an entry for it")
        entries[name] = build(_ModalityAlphas, content[name] or {}, f"{path}: {name}")

    components: dict[int, str] = {}

    def listed(name: str, key: str) -> tuple[Any, ...]:
        value = getattr(entries[name], key)
        if value is None:
            raise UserError(f"{path}: {name}: '{key}' is required")
        values = tuple(value) if isinstance(value, list) else (value,)
        components.setdefault(len(values), f"{name}: '{key}'")
        if len(components) > 1:
            counts = " and ".join(f"{count} of {where}" for count, where in components.items())
            raise UserError(f"{path}: every list needs one value per component of the mixture, not {counts}")
        return values

    def numbers(name: str, key: str) -> tuple[float, ...]:
        return tuple(_non_negative(number, f"{path}: {name}: '{key}'") for number in listed(name, key))

    for name, entry in entries.items():
        if entry.keep is not None and not modalities[name].type.startswith("seq"):
            raise UserError(f"{path}: {name}: 'keep' is only for sequences, not for type {modalities[name].type}")
    mixture = Mixture(
        {name: numbers(name, "input_alphas") for name in inputs},
        {name: numbers(name, "target_alphas") for name in targets},
        {name: listed(name, "keep") for name, entry in entries.items() if entry.keep is not None},
    )
    if weights is None:
        return mixture
    weights = convert(weights, list[float], f"{path}: 'sampling_weights'")
    count = next(iter(components))
    Range(at_least=0, at_most=1e9).check(weights, f"{path}: 'sampling_weights'")
    if len(weights) != count or sum(weights) <= 0:
        raise UserError(
            f"{path}: 'sampling_weights' must be {count} numbers of at least 0, one per component, not {weights}"
        )
    return dataclasses.replace(mixture, sampling_weights=tuple(weights))


def _non_negative(value: float, where: str) -> float:
    Range(at_least=0, at_most=1e9).check(value, where)
    return value
