"""Mask a sample: choose which tokens the model sees and which it predicts, as in 4M (arXiv 2312.06647).

Masks are True where a token is masked, as everywhere. All randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fourm.data.budgets import Budgets, BudgetSampler, FixedBudgets, TokensRange
from fourm.data.modality_info import Modality, as_modality
from fourm.data.span_masking import (
    KEEP_SCHEMES,
    cut_target,
    draw_kept,
    keep_probability,
    masked_row,
    padded,
    run_starts,
    sequence_row,
)
from fourm.utils.errors import DataError, UnreadableValue, UserError
from fourm.utils.tokenizer import TextEncoder, split_spans
from fourm.utils.tokenizer.special_tokens import EOS_ID, sentinel_id
from fourm.utils.tokenizer.text_tokenizer import UnreadableText

__all__ = ["Budgets", "Masking", "TransferMasking", "UnifiedMasking"]

_log = logging.getLogger(__name__)
Masked = dict[str, np.ndarray]


class Masking:
    """Masks samples of any modalities: {modality: {tensor, input_mask, target_mask, decoder_attention_mask}}.

    Integer codes (``seq_token``) need no text vocabulary. Their ids below ``vocab_offset`` follow the layout of the
    text vocabulary: padding 0, [EOS] 3, sentinels from 4 on. If ``vocab_offset`` is too small for sentinels, kept codes
    are the input and dropped codes the target, without a mark of where these belong.

    Args:
        modality_info: Name → entry of the modality table, with ``input_alphas``, ``target_alphas`` and, for sequences,
            ``keep`` (random, all or binary): one value per component of the mixture.
        text_tokenizer: The vocabulary or its path; required only for modalities of type ``seq``.
        budgets: Source of the token budgets.

    Raises:
        UserError: The settings are inconsistent.
    """

    def __init__(
        self,
        modality_info: Mapping[str, Mapping[str, Any]],
        text_tokenizer: Tokenizer | str | Path | None,
        budgets: BudgetSampler | FixedBudgets,
    ):
        self.modality_info = {name: as_modality(name, entry) for name, entry in modality_info.items()}
        self._text = None if text_tokenizer is None else TextEncoder(text_tokenizer)
        for modality in self.modality_info.values():
            self._check(modality, is_target=modality.name in budgets.targets)
        self._sentinels = {name: self._find_sentinels(modality) for name, modality in self.modality_info.items()}
        self._budgets = budgets
        for name, modality in self.modality_info.items():
            if len(modality.keep) not in (0, budgets.components):
                raise UserError(
                    f"modality {name}: keep needs one value per component of the mixture, {budgets.components}, "
                    f"not {len(modality.keep)}"
                )

    def __call__(self, sample: Mapping[str, Any], generator: np.random.Generator | None = None) -> dict[str, Masked]:
        """Draw budgets and apply them. Vectors are padded to length L; without a generator, the randomness is fresh."""
        generator = generator or np.random.default_rng()
        masked = self.apply(sample, self.draw_budgets(generator, sample), generator)
        for name, row in masked.items():
            if self.modality_info[name].type == "seq_emb":
                row["tensor"] = padded(row["tensor"], len(row["input_mask"]))
        return masked

    def draw_budgets(self, generator: np.random.Generator, present: Collection[str] | None = None) -> Budgets:
        """Draw the token budget of each modality, for the modalities that are ``present`` (None: all)."""
        return self._budgets.draw(generator, present)

    def apply(self, sample: Mapping[str, Any], budgets: Budgets, generator: np.random.Generator) -> dict[str, Masked]:
        """Mask each modality of ``sample`` that is in ``modality_info``, and leave out the others.

        Args:
            sample: Values by modality. img: pixels (C, H, W) or ids (L,) or (h, w). seq: a string, or chunks as a list
                of strings. seq_token: ids. seq_emb: vectors (L, D).
            budgets: Budgets of the sample.
            generator: Source of randomness.

        Returns:
            Numpy arrays without a batch dimension. Ids are int64, and masks are bool of length L: the grid's number of
            tokens, or (max_tokens + 1)·2 for sequences. Vectors include only those that are input; collation pads them
            to L with zeros.

        Raises:
            DataError: A value violates the contract of its modality; the message begins with ``modality NAME:``.
            UnreadableValue: A text cannot be tokenized; the message begins alike.
        """
        masked = {}
        for name, modality in self.modality_info.items():
            if name in sample:
                try:
                    masked[name] = self._mask(modality, sample[name], budgets, generator)
                except DataError as error:
                    raise DataError(f"modality {name}: {error}", name, str(error)) from error
                except UnreadableText as error:
                    raise UnreadableValue(f"modality {name}: {error}", name, str(error)) from error
        return masked

    def _mask(self, modality: Modality, value: Any, budgets: Budgets, generator: np.random.Generator) -> Masked:
        n_in, n_out = budgets.input[modality.name], budgets.target[modality.name]
        if modality.type == "img":
            return _mask_image(_image_value(modality, value), modality, n_in, n_out, generator)
        assert modality.max_tokens is not None
        scheme = modality.keep[budgets.component] if modality.keep else "random"
        probability = keep_probability(scheme, generator)
        if modality.type == "seq_emb":
            vectors = np.asarray(value)[: modality.max_tokens]
            kept = draw_kept(np.ones(len(vectors), np.int64), probability, n_in, generator)
            gaps = run_starts(kept)
            used = (kept | gaps) & (n_in > 0)
            inputs = vectors[used]
            inputs = inputs.astype(np.float32) if inputs.dtype == np.float16 else inputs
            inputs[gaps[used]] = 0
            return sequence_row(inputs, [], n_in, modality.max_tokens)
        if not n_in and not n_out:  # frequent, and needs no tokenization
            return sequence_row([], [], 0, modality.max_tokens)
        ids, lengths = self.encode(modality, value)
        kept = draw_kept(lengths, probability, n_in, generator)
        spans = split_spans(ids, kept.tolist(), self._sentinels[modality.name])
        targets = cut_target(spans, n_out, generator)
        return sequence_row(spans.inputs if n_in else [], targets, n_in, modality.max_tokens)

    def encode(self, modality: Modality, value: Any) -> tuple[list[int], np.ndarray]:
        """Return the ids (n,) of a sequence with [EOS] at the end, and the lengths (u,) of its units."""
        return self._text_units(modality, value) if modality.type == "seq" else self._codes(modality, value)

    def _text_units(self, modality: Modality, value: Any) -> tuple[list[int], np.ndarray]:
        """Return the ids of a text with [EOS] at the end, and the lengths of the units: tokens or chunks."""
        assert self._text and modality.max_tokens
        if isinstance(value, str):
            ids = [*self._text(value, modality.max_tokens), self._text.eos_id][: modality.max_tokens]
            return ids, np.ones(len(ids), np.int64)
        if not isinstance(value, (list, tuple)) or not all(isinstance(chunk, str) for chunk in value):
            raise DataError(f"expected a string or a list of strings, not {value!r:.80}")
        chunks, room = [], modality.max_tokens - 1
        for chunk in map(self._text, value):
            if len(chunk) <= room:
                chunks.append(chunk)
                room -= len(chunk)
        chunks.append([self._text.eos_id])
        return sum(chunks, []), np.array([len(chunk) for chunk in chunks])

    def _codes(self, modality: Modality, value: Any) -> tuple[list[int], np.ndarray]:
        """Return the ids of integer codes with [EOS] at the end if their vocabulary has one; each id is a unit."""
        ids = (_checked_ids(modality, value).ravel() + modality.vocab_offset).tolist()
        if self._sentinels[modality.name] is not None:
            ids.append(EOS_ID)
        ids = ids[: modality.max_tokens]
        return ids, np.ones(len(ids), np.int64)

    def _find_sentinels(self, modality: Modality) -> Sequence[int] | None:
        """Return the ids that may mark dropped tokens; None if there are none in the vocabulary of the modality."""
        if modality.type == "seq":
            assert self._text
            return self._text.sentinels
        sentinels = range(sentinel_id(1), sentinel_id(_max_sentinels(modality)) + 1)
        return sentinels if modality.type == "seq_token" and sentinels.stop <= modality.vocab_offset else None

    def _check(self, modality: Modality, is_target: bool) -> None:
        """Raise a :class:`UserError` if the modality cannot be masked; warn if the model cannot tell what is masked."""
        where = f"modality {modality.name}"
        if not modality.max_tokens:
            raise UserError(
                f"{where}: its number of tokens is unknown; set max_tokens (for a grid, input_size and patch_size)"
            )
        for scheme in modality.keep:
            if scheme not in KEEP_SCHEMES:
                raise UserError(f"{where}: keep must be one of {', '.join(KEEP_SCHEMES)}, not '{scheme}'")
        max_sentinels = _max_sentinels(modality)
        if modality.type == "seq_token" and is_target and self._find_sentinels(modality) is None:
            _log.warning(
                "%s: vocab_offset %d leaves no room for sentinels, so the model cannot tell which codes are missing, "
                "and the first target is given to it; set vocab_offset to at least %d and raise vocab_size by as much",
                where,
                modality.vocab_offset,
                sentinel_id(max_sentinels) + 1,
            )
        if modality.type != "seq":
            return
        if self._text is None:
            raise UserError(f"{where}: a text needs a vocabulary; pass text_tokenizer")
        if modality.vocab_size is not None and self._text.vocab_size > modality.vocab_size:
            raise UserError(
                f"{where}: the text vocabulary has {self._text.vocab_size} ids, but vocab_size is {modality.vocab_size}"
            )
        if len(self._text.sentinels) < max_sentinels:
            raise UserError(
                f"{where}: max_tokens {modality.max_tokens} needs {max_sentinels} sentinels, but the text vocabulary "
                f"has {len(self._text.sentinels)}; lower max_tokens"
            )


def _max_sentinels(modality: Modality) -> int:
    """Return the number of sentinels if every other token is dropped, with the final one."""
    assert modality.max_tokens
    return (modality.max_tokens + 1) // 2 + 1


class UnifiedMasking(Masking):
    """Masks samples for pre-training, with budgets from a mixture of Dirichlet distributions.

    Args:
        modality_info, text_tokenizer: See :class:`Masking`.
        input_tokens_range: Total input tokens of a sample, or the minimum and maximum.
        target_tokens_range: Total target tokens of a sample, or the minimum and maximum.
        max_tries: Maximum draws of budgets until every modality has its ``min_tokens``.
        sampling_weights: Weights of the components of the mixture; None = equal.

    Raises:
        UserError: The settings are inconsistent.
    """

    def __init__(
        self,
        modality_info: Mapping[str, Mapping[str, Any]],
        text_tokenizer: Tokenizer | str | Path | None,
        input_tokens_range: TokensRange,
        target_tokens_range: TokensRange,
        max_tries: int = 100,
        sampling_weights: Sequence[float] | None = None,
    ):
        modalities = {name: as_modality(name, entry) for name, entry in modality_info.items()}
        budgets = BudgetSampler(modalities, input_tokens_range, target_tokens_range, max_tries, sampling_weights)
        super().__init__(modalities, text_tokenizer, budgets)


class TransferMasking(Masking):
    """Masks samples for fine-tuning on a task: some modalities are input and others are target, with all their tokens.

    Args:
        modality_info: See :class:`Masking`; alphas are ignored.
        text_tokenizer: See :class:`Masking`.
        input_modalities: Names of the input modalities.
        target_modalities: Names of the target modalities, none of which is an input.
        input_tokens_range: Maximum input tokens that the model uses of a sample, or a range that ends with it; None =
            all.
        target_tokens_range: Maximum target tokens that the model uses of a sample, or such a range; None = all.

    Raises:
        UserError: The settings are inconsistent, or the model would not use all tokens.
    """

    def __init__(
        self,
        modality_info: Mapping[str, Mapping[str, Any]],
        text_tokenizer: Tokenizer | str | Path | None,
        input_modalities: Sequence[str],
        target_modalities: Sequence[str],
        input_tokens_range: TokensRange | None = None,
        target_tokens_range: TokensRange | None = None,
    ):
        both = sorted({*input_modalities} & {*target_modalities})
        if both:
            raise UserError(f"modality {both[0]}: it is input and target, but must be only one of them in a task")
        entries = {}
        for name in (*input_modalities, *target_modalities):
            entry = as_modality(name, modality_info[name])
            entries[name] = replace(entry, keep=() if entry.type == "img" else ("all",))
        inputs = {name: entries[name].max_tokens or 0 for name in input_modalities}
        targets = {name: entries[name].max_tokens or 0 for name in target_modalities}
        # Two sentinels enclose a target sequence, and each token predicts the next: one slot more than tokens.
        sequences = {name for name in targets if entries[name].type != "img"}
        with_sentinels = {name: count + 2 if name in sequences else count for name, count in targets.items()}
        slots = {name: count + 1 if name in sequences else count for name, count in targets.items()}
        nothing = dict.fromkeys(entries, 0)
        budgets = Budgets(
            nothing | inputs,
            nothing | with_sentinels,
            component=0,
        )
        super().__init__(entries, text_tokenizer, FixedBudgets(budgets))
        _check_budget("input", inputs, input_tokens_range)
        _check_budget("target", slots, target_tokens_range)


def _check_budget(role: str, needed: Mapping[str, int], tokens_range: TokensRange | None) -> None:
    """Reject a token range that would cut off tokens, such as the lower part of every image."""
    if tokens_range is None:
        return
    limit = tokens_range if isinstance(tokens_range, int) else max(tokens_range)
    total = sum(needed.values())
    if total > limit:
        counts = ", ".join(f"{name} {count}" for name, count in needed.items())
        raise UserError(
            f"'masking' transfer: all tokens of a sample are used, up to {total} as {role} ({counts}), but "
            f"num_{role}_tokens is {limit}; set num_{role}_tokens to {total}"
        )


def _image_value(modality: Modality, value: Any) -> np.ndarray:
    if modality.is_pixels:
        return np.asarray(value)
    ids = _checked_ids(modality, value)
    if ids.size != modality.max_tokens:
        raise DataError(f"expected {modality.max_tokens} tokens, found {ids.size}")
    return ids


def _checked_ids(modality: Modality, value: Any) -> np.ndarray:
    """Return int64 ids after checking their range, because on a GPU an out-of-range index fails without naming it."""
    ids = np.asarray(value)
    if ids.dtype.kind not in "iu":
        raise DataError(f"expected token ids, not values of type {ids.dtype}")
    ids = ids.astype(np.int64, copy=False)
    if modality.vocab_size is not None:
        limit = modality.vocab_size - modality.vocab_offset
        # As an unsigned number, a negative id is huge, so one pass finds both kinds.
        if ids.size and np.maximum.reduce(ids.view(np.uint64), axis=None) >= limit:
            raise DataError(f"token id {ids[(ids < 0) | (ids >= limit)][0]} lies outside the vocabulary of {limit}")
    return ids


def _mask_image(
    tensor: np.ndarray, modality: Modality, n_in: int, n_out: int, generator: np.random.Generator
) -> Masked:
    """Mask a grid: the first tokens of a random permutation are input, and the next ones target."""
    assert modality.max_tokens
    input_mask, target_mask, attention = masked_row(modality.max_tokens)
    if n_in or n_out:
        order = generator.permutation(modality.max_tokens)
        input_mask[order[:n_in]] = False
        target_mask[order[n_in : n_in + n_out]] = False
        attention[target_mask.argmin()] = n_out  # set only at the first target: all targets attend to each other
    return {
        "tensor": tensor,
        "input_mask": input_mask,
        "target_mask": target_mask,
        "decoder_attention_mask": attention,
    }
