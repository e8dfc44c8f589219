"""How many tokens of a sample each modality gets (method sections 5.1 to 5.3).

The totals are uniform in their ranges; a Dirichlet distribution, drawn from a mixture, divides them.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import ge
from typing import NamedTuple

import numpy as np

from fourm.data.modality_info import Modality
from fourm.utils.errors import UserError

TokensRange = int | Sequence[int]
_SMALLEST_ALPHA = 1e-9
_MIXTURES = 1024  # that are kept; there may be one for each set of modalities that a sample has


@dataclass(frozen=True)
class Budgets:
    """Tokens that each modality of a sample may use, and the component of the mixture that they were drawn from."""

    input: dict[str, int]
    target: dict[str, int]
    component: int


class _RestrictedMixture(NamedTuple):
    """The mixture over the modalities that a sample has.

    Attributes:
        alphas: of inputs and of targets, an array per component; None: it gives nothing to any of the modalities.
        cumulative: weights of the components, but for the last.
        most, least: tokens of each modality.
    """

    names: list[str]
    alphas: list[list[np.ndarray | None]]
    cumulative: list[float]
    most: list[int]
    least: list[int]
    is_image: list[bool]


class BudgetSampler:
    """Draws :class:`Budgets`.

    Args:
        modalities: with ``input_alphas`` and ``target_alphas``, one per component; none = 0.
        input_tokens_range, target_tokens_range: total of a sample, or the lowest and highest one.
        max_tries: draws until every modality has its ``min_tokens``; the last one stands in any case.
        sampling_weights: of the components; None = equal.

    Attributes:
        components: of the mixture.

    Raises:
        UserError: settings that do not fit together.
    """

    def __init__(
        self, modalities: Mapping[str, Modality], input_tokens_range: TokensRange, target_tokens_range: TokensRange,
        max_tries: int = 100, sampling_weights: Sequence[float] | None = None,
    ):  # fmt: skip
        self._modalities = modalities
        self._ranges = [
            _range(input_tokens_range, "input_tokens_range"), _range(target_tokens_range, "target_tokens_range")
        ]  # fmt: skip
        self._max_tries = max_tries
        self._alphas = _alphas(modalities)
        self.components = components = len(self._alphas[0])
        weights = np.ones(components) if sampling_weights is None else np.asarray(sampling_weights, float)
        if len(weights) != components or (weights < 0).any() or not weights.sum() > 0:
            raise UserError(
                f"sampling_weights must be {components} numbers of at least 0, one per component of the mixture, "
                f"not {sampling_weights}"
            )
        self._weights = weights
        self._all = frozenset(modalities)
        self._mixtures: dict[frozenset[str], _RestrictedMixture] = {}

    def draw(self, generator: np.random.Generator, present: Collection[str] | None = None) -> Budgets:
        """Budgets of one sample.

        Args:
            present: the modalities that the sample has; None = all. They share what the others would have got, in a
                component that gives them something, and a role that none of them has gets nothing.
        """
        mixture = self._mixture(self._all if present is None else self._all.intersection(present))
        component = bisect(mixture.cumulative, generator.random())
        totals = [int(generator.integers(low, high + 1)) for low, high in self._ranges]
        inputs = self._divide(totals[0], mixture.alphas[0][component], mixture.most, mixture.least, generator)
        # A patch is input or target, not both; a sequence is split by its sentinels, whatever the budgets.
        left = [most - used * image for most, used, image in zip(mixture.most, inputs, mixture.is_image, strict=True)]
        targets = self._divide(totals[1], mixture.alphas[1][component], left, mixture.least, generator)
        nothing = dict.fromkeys(self._modalities, 0)
        return Budgets(
            nothing | dict(zip(mixture.names, inputs, strict=True)),
            nothing | dict(zip(mixture.names, targets, strict=True)),
            component,
        )

    def _mixture(self, present: frozenset[str]) -> _RestrictedMixture:
        if present not in self._mixtures:
            if len(self._mixtures) >= _MIXTURES:
                self._mixtures.clear()
            self._mixtures[present] = self._restricted(present)
        return self._mixtures[present]

    def _restricted(self, present: frozenset[str]) -> _RestrictedMixture:
        """The mixture over some modalities."""
        names = [name for name in self._modalities if name in present]
        columns = [index for index, name in enumerate(self._modalities) if name in present]
        sides: list[list[np.ndarray | None]] = [list(side[:, columns]) for side in self._alphas]
        weights = self._weights
        if present != self._all:
            gives: list[np.ndarray] = [
                (side[:, columns] > _SMALLEST_ALPHA).max(1, initial=False) for side in self._alphas
            ]
            for useful in (gives[0] & gives[1], gives[1], gives[0]):
                if (weights * useful).any():
                    weights = weights * useful
                    break
            sides = [
                [alphas if some else None for alphas, some in zip(side, gives_some, strict=True)]
                for side, gives_some in zip(sides, gives, strict=True)
            ]
        modalities = [self._modalities[name] for name in names]
        return _RestrictedMixture(
            names,
            sides,
            (weights.cumsum() / weights.sum())[:-1].tolist(),
            [int(modality["max_tokens"]) for modality in modalities],
            [modality.min_tokens or 0 for modality in modalities],
            [modality.type == "img" for modality in modalities],
        )

    def _divide(
        self, total: int, alphas: np.ndarray | None, most: Sequence[int], least: Sequence[int], generator: np.random.Generator
    ) -> list[int]:  # fmt: skip
        """Tokens of each modality, at most ``total`` together. Plain lists: for so few numbers they beat arrays."""
        if alphas is None:
            return [0] * len(most)
        for _ in range(self._max_tries):
            budget = [int(share * total) for share in generator.dirichlet(alphas).tolist()]
            if left := total - sum(budget):
                # Fresh draws, so that what is left over never goes to a modality whose alpha is practically 0.
                for winner in generator.dirichlet(alphas, left).argmax(1).tolist():
                    budget[winner] += 1
            budget = list(map(min, budget, most))
            if all(map(ge, budget, least)):
                break
        return budget


def _range(value: TokensRange, name: str) -> tuple[int, int]:
    low, high = (value, value) if isinstance(value, (int, np.integer)) else value
    if not 0 <= low <= high:
        raise UserError(f"{name} must be a number of tokens or (lowest, highest), not {value}")
    return int(low), int(high)


def _alphas(modalities: Mapping[str, Modality]) -> list[np.ndarray]:
    """Input and target alphas, (components, modalities) each."""
    lists = [
        {name: np.atleast_1d(np.asarray(modality[key], float)) for name, modality in modalities.items()}
        for key in ("input_alphas", "target_alphas")
    ]
    components = {len(alphas) for side in lists for alphas in side.values()} - {0}
    if len(components) != 1:
        raise UserError(
            "every modality needs input_alphas or target_alphas, as many as the mixture has components; "
            f"found lists of {sorted(components)} entries"
        )
    none = np.zeros(components.pop())
    stacked = [np.stack([alphas if len(alphas) else none for alphas in side.values()], axis=1) for side in lists]
    return [np.maximum(side, _SMALLEST_ALPHA) for side in stacked]
