"""Token budgets: how many tokens of a sample each modality gets, as in 4M (arXiv 2312.06647).

The totals are drawn uniformly from their ranges and divided by a Dirichlet distribution that is drawn from a mixture.
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
_MIN_ALPHA = 1e-9
_MAX_CACHED_MIXTURES = 1024  # there may be one for each set of modalities that samples have


@dataclass(frozen=True)
class Budgets:
    """The token budget of each modality of a sample, and the mixture component that they were drawn from."""

    input: dict[str, int]
    target: dict[str, int]
    component: int


@dataclass(frozen=True)
class FixedBudgets:
    """The same budgets for every sample, in place of a :class:`BudgetSampler`."""

    budgets: Budgets
    components: int = 1

    @property
    def targets(self) -> list[str]:
        return [name for name, tokens in self.budgets.target.items() if tokens]

    def draw(self, generator: np.random.Generator, present: Collection[str] | None = None) -> Budgets:
        return self.budgets


class _RestrictedMixture(NamedTuple):
    """The mixture over the modalities that a sample has.

    Attributes:
        names: Names of the modalities.
        alphas: Alphas of inputs and of targets, one array per component; None if a component gives these modalities
            nothing.
        cumulative: Cumulative weights of the components without the last one.
        max_tokens: Maximum tokens of each modality.
        min_tokens: Minimum tokens of each modality.
        is_image: Whether each modality is a grid.
    """

    names: list[str]
    alphas: list[list[np.ndarray | None]]
    cumulative: list[float]
    max_tokens: list[int]
    min_tokens: list[int]
    is_image: list[bool]


class BudgetSampler:
    """Draws :class:`Budgets`.

    Args:
        modalities: Modalities with ``input_alphas`` and ``target_alphas``, one per component; an empty tuple means 0.
        input_tokens_range: Total input tokens of a sample, or the minimum and maximum.
        target_tokens_range: Total target tokens of a sample, or the minimum and maximum.
        max_tries: Maximum draws until every modality has its ``min_tokens``; the last draw is used in any case.
        sampling_weights: Weights of the components; None = equal.

    Attributes:
        components: Number of components of the mixture.
        targets: Names of the modalities that may get target tokens.

    Raises:
        UserError: The settings are inconsistent.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        input_tokens_range: TokensRange,
        target_tokens_range: TokensRange,
        max_tries: int = 100,
        sampling_weights: Sequence[float] | None = None,
    ):
        self._modalities = modalities
        self._ranges = [
            _range(input_tokens_range, "input_tokens_range"),
            _range(target_tokens_range, "target_tokens_range"),
        ]
        self._max_tries = max_tries
        self._alphas = _alphas(modalities)
        self.components = len(self._alphas[0])
        self.targets = [
            name for name, alphas in zip(modalities, self._alphas[1].T, strict=True) if alphas.max() > _MIN_ALPHA
        ]
        weights = np.ones(self.components) if sampling_weights is None else np.asarray(sampling_weights, float)
        if len(weights) != self.components or (weights < 0).any() or not weights.sum() > 0:
            raise UserError(
                f"sampling_weights must be {self.components} numbers of at least 0, one per component of the mixture, "
                f"not {sampling_weights}"
            )
        self._weights = weights
        self._all = frozenset(modalities)
        self._mixtures: dict[frozenset[str], _RestrictedMixture] = {}

    def draw(self, generator: np.random.Generator, present: Collection[str] | None = None) -> Budgets:
        """Draw the budgets of one sample.

        Args:
            generator: Source of randomness.
            present: The modalities that the sample has; None = all. They share the tokens of the missing ones, in a
                component that gives them some. A role (input or target) that none of them has gets no tokens.
        """
        mixture = self._mixture(self._all if present is None else self._all.intersection(present))
        component = bisect(mixture.cumulative, generator.random())
        totals = [int(generator.integers(low, high + 1)) for low, high in self._ranges]
        inputs = self._divide(
            totals[0], mixture.alphas[0][component], mixture.max_tokens, mixture.min_tokens, generator
        )
        # A patch is input or target, but not both; a sequence is split by its sentinels regardless of the budgets.
        remaining = [
            tokens - used if is_image else tokens
            for tokens, used, is_image in zip(mixture.max_tokens, inputs, mixture.is_image, strict=True)
        ]
        targets = self._divide(totals[1], mixture.alphas[1][component], remaining, mixture.min_tokens, generator)
        zeros = dict.fromkeys(self._modalities, 0)
        return Budgets(
            zeros | dict(zip(mixture.names, inputs, strict=True)),
            zeros | dict(zip(mixture.names, targets, strict=True)),
            component,
        )

    def _mixture(self, present: frozenset[str]) -> _RestrictedMixture:
        if present not in self._mixtures:
            if len(self._mixtures) >= _MAX_CACHED_MIXTURES:
                self._mixtures.clear()
            self._mixtures[present] = self._restricted(present)
        return self._mixtures[present]

    def _restricted(self, present: frozenset[str]) -> _RestrictedMixture:
        """Build the mixture over some of the modalities."""
        names = [name for name in self._modalities if name in present]
        columns = [index for index, name in enumerate(self._modalities) if name in present]
        sides: list[list[np.ndarray | None]] = [list(side[:, columns]) for side in self._alphas]
        weights = self._weights
        if present != self._all:
            gives: list[np.ndarray] = [(side[:, columns] > _MIN_ALPHA).max(1, initial=False) for side in self._alphas]
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
        self,
        total: int,
        alphas: np.ndarray | None,
        max_tokens: Sequence[int],
        min_tokens: Sequence[int],
        generator: np.random.Generator,
    ) -> list[int]:
        """Divide at most ``total`` tokens among the modalities. Plain lists are faster than arrays at these sizes."""
        if alphas is None:
            return [0] * len(max_tokens)
        for _ in range(self._max_tries):
            budget = [int(share * total) for share in generator.dirichlet(alphas).tolist()]
            remainder = total - sum(budget)
            if remainder:
                # Fresh draws, so that the remainder never goes to a modality whose alpha is practically 0.
                for winner in generator.dirichlet(alphas, remainder).argmax(1).tolist():
                    budget[winner] += 1
            budget = list(map(min, budget, max_tokens))
            if all(map(ge, budget, min_tokens)):
                break
        return budget


def _range(value: TokensRange, name: str) -> tuple[int, int]:
    low, high = (value, value) if isinstance(value, (int, np.integer)) else value
    if not 0 <= low <= high:
        raise UserError(f"{name} must be a number of tokens or (minimum, maximum), not {value}")
    return int(low), int(high)


def _alphas(modalities: Mapping[str, Modality]) -> list[np.ndarray]:
    """Stack the input and target alphas, (components, modalities) each."""
    lists = [
        {name: np.atleast_1d(np.asarray(modality[key], float)) for name, modality in modalities.items()}
        for key in ("input_alphas", "target_alphas")
    ]
    components = {len(alphas) for side in lists for alphas in side.values()} - {0}
    if len(components) != 1:
        raise UserError(
            "every modality needs input_alphas or target_alphas with one value per component of the mixture, "
            f"but there are lists of {sorted(components)} values"
        )
    zeros = np.zeros(components.pop())
    stacked = [np.stack([alphas if len(alphas) else zeros for alphas in side.values()], axis=1) for side in lists]
    return [np.maximum(side, _MIN_ALPHA) for side in stacked]
