"""Any-to-any generation: a chain of targets, each conditioned on the inputs and earlier targets.

Call ``GenerationSampler(model).generate(batch, schedule)`` with a batch from :mod:`fourm.generation.batch_entries` and
a schedule from :mod:`fourm.generation.schedules`. The steps themselves are in :mod:`fourm.generation.steps`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from fourm.data.collate import ModDict
from fourm.data.modality_info import as_modality
from fourm.generation.batch_entries import emptied, init_empty_target_modality, merged, sentinels_of
from fourm.generation.halton import halton_orders
from fourm.generation.packed_linear import PackedLinears
from fourm.generation.schedules import GenerationSchedule, check_schedule
from fourm.generation.steps import SCHEMES, Conditions, Entry, StepOptions
from fourm.generation.token_sampling import SampleNoise, Seed, TokenSampler, sample_seeds
from fourm.models.fourm import FourM
from fourm.utils.errors import UserError
from fourm.utils.tokenizer.special_tokens import EOS_ID

TextTokenizer = Tokenizer | str | Path | None


class GenerationSampler(nn.Module):
    """Generates with a model.

    All methods take these arguments:

    * ``mod_dict``: maps each modality to its tensor, input_mask and target_mask; it is not changed. In an image target,
      the positions that are targets and not inputs are generated; in a sequence, the text that its sentinels stand for.
      A target that is not in the batch starts empty.
    * ``schedule``: from :func:`fourm.generation.schedules.build_chained_generation_schedules`
    * ``top_k``, ``top_p``: see :class:`TokenSampler`
    * ``text_tokenizer``: the text vocabulary, or its path; needed if it does not have the usual 200 sentinels
    * ``verbose``: show a progress bar
    * ``seed``: a number (sample b of the batch uses ``seed + b``), one number per sample, or a ``torch.Generator``; a
      sample depends only on its own seed, not on the rest of the batch

    Args:
        model: The model; it is used in evaluation mode.
        dtype: Autocast precision, e.g. ``torch.bfloat16``; None disables autocast.
        cuda_graphs: Replay the steps of sequences as a CUDA graph. Sequences then stay in the batch until all are
            finished. This has not been measured yet, and on a CPU it only costs time.
    """

    def __init__(self, model: FourM, dtype: torch.dtype | None = None, cuda_graphs: bool = False):
        super().__init__()
        self.model, self.dtype, self.cuda_graphs = model, dtype, cuda_graphs
        self._packed = PackedLinears()

    def generate(
        self,
        mod_dict: ModDict,
        schedule: GenerationSchedule,
        top_k: int | float = 0.0,
        top_p: float = 0.0,
        text_tokenizer: TextTokenizer = None,
        verbose: bool = False,
        seed: Seed = None,
    ) -> dict[str, dict[str, Any]]:
        """Generate the targets of the schedule.

        Returns:
            The batch with the generated targets as inputs: ``tensor`` where ``input_mask`` is False.

        Raises:
            UserError: If the schedule does not fit the model or the batch.
        """
        return _last(mod_dict, self.generate_iter(mod_dict, schedule, top_k, top_p, text_tokenizer, verbose, seed))

    def generate_iter(
        self,
        mod_dict: ModDict,
        schedule: GenerationSchedule,
        top_k: int | float = 0.0,
        top_p: float = 0.0,
        text_tokenizer: TextTokenizer = None,
        verbose: bool = False,
        seed: Seed = None,
    ) -> Iterator[dict[str, dict[str, Any]]]:
        """Generate like :meth:`generate`, but yield a new batch after every step."""
        self._check(mod_dict, schedule)
        sampler = TokenSampler(top_k, top_p)
        return self._follow(mod_dict, [mod_dict], schedule, sampler, text_tokenizer, verbose, seed)

    def generate_multi_guided(
        self,
        uncond_dict: ModDict,
        cond_dicts: Sequence[ModDict],
        schedule: GenerationSchedule,
        top_k: int | float = 0.0,
        top_p: float = 0.0,
        text_tokenizer: TextTokenizer = None,
        verbose: bool = False,
        seed: Seed = None,
    ) -> dict[str, dict[str, Any]]:
        """Generate with guidance by several conditions: logits = uncond + Σ w_i·(cond_i − uncond).

        Args:
            uncond_dict: The batch without conditions, from which guidance leads away; it also contains the targets.
            cond_dicts: The same batch with one condition each.
            schedule: ``cfg_scale`` is one weight for all conditions, or one per condition; negative weights lead away
                from a condition. Of ``cfg_cond_domains``, only targets of the schedule are emptied.

        Returns:
            ``uncond_dict`` with the generated targets.

        Raises:
            UserError: If there are no conditions, or the schedule does not fit the model or the batches.
        """
        if not cond_dicts:
            raise UserError("generate_multi_guided: guidance needs at least one condition, but cond_dicts is empty")
        targets = {step["target_domain"] for step in schedule if "target_domain" in step}
        steps = [
            {**step, "cfg_cond_domains": [d for d in step.get("cfg_cond_domains", ()) if d in targets]}
            for step in schedule
        ]
        self._check(uncond_dict, steps, cond_dicts)
        sampler = TokenSampler(top_k, top_p)
        return _last(uncond_dict, self._follow(uncond_dict, cond_dicts, steps, sampler, text_tokenizer, verbose, seed))

    def generate_sam_dense(
        self,
        mod_dict: ModDict,
        schedule: GenerationSchedule,
        text_tokenizer: TextTokenizer,
        batch_size: int = 16,
        key: str = "sam_instance",
        top_k: int | float = 0.0,
        top_p: float = 0.0,
        verbose: bool = False,
        seed: Seed = None,
    ) -> dict[str, dict[str, Any]]:
        """Generate several answers for one image, each for its own query points, and join them into one sequence.

        Args:
            mod_dict: A batch of one sample. ``key`` may have several rows, each with its own query points.
            batch_size: Answers generated at a time. If ``key`` has one row, whose points the model chooses, this is
                also the total number of answers.
            key: The modality of the answers.

        Returns:
            The batch of one sample; ``key`` contains all answers in a row, closed by a single [EOS].

        Raises:
            UserError: If ``key`` is not in the batch, or the schedule does not fit the model or the batch.
        """
        if key not in mod_dict:
            raise UserError(f"generate_sam_dense: the batch has no '{key}'")
        rows = len(mod_dict[key]["tensor"])
        copies = batch_size if rows == 1 else rows
        seeds = sample_seeds(seed, copies)
        batch = _map(mod_dict, lambda value: value.expand(copies, *value.shape[1:]))
        joined: list[int] = []
        for start in range(0, copies, batch_size):
            part = slice(start, start + batch_size)
            chunk = _map(batch, itemgetter(part))
            result = self.generate(chunk, schedule, top_k, top_p, text_tokenizer, verbose, seeds[part])
            for ids, mask in zip(result[key]["tensor"], result[key]["input_mask"], strict=True):
                joined += [token for token in ids[~mask].tolist() if token != EOS_ID]
        first = _map(result, itemgetter(slice(1)))
        return {**first, key: merged([[*joined, EOS_ID]], [[]], [], result[key]["tensor"].device)}

    def _check(self, batch: ModDict, schedule: GenerationSchedule, cond_dicts: Sequence[ModDict] = ()) -> None:
        """Check that the schedule fits the model and the batches.

        Raises:
            UserError: If it does not.
        """
        info, decoders = self.model.modality_info, self.model.decoder_embeddings
        check_schedule(schedule, {name: info[name] for name in decoders}, multi=bool(cond_dicts))
        for part in (batch, *cond_dicts):
            for name in sorted(part.keys() & info.keys()):
                if not {"tensor", "input_mask", "target_mask"} <= part[name].keys():
                    raise UserError(f"{name}: its masks are missing; add them with init_full_input_modality")
        sizes = {len(entry["tensor"]) for part in (batch, *cond_dicts) for entry in part.values()}
        if len(sizes) != 1:
            raise UserError(f"every modality must have the same number of samples, at least one, not {sorted(sizes)}")
        known = set(batch)
        for step in schedule:
            target, scale = step["target_domain"], step.get("cfg_scale", 1.0)
            for name in step.get("cfg_cond_domains", ()):
                if name not in known or name not in self.model.encoder_embeddings:
                    raise UserError(
                        f"schedule: cfg_cond_domains of {target} contains '{name}', which is not among the inputs"
                    )
            if isinstance(scale, Sequence) and len(scale) != max(len(cond_dicts), 1):
                raise UserError(f"schedule: cfg_scale {scale} of {target} must have a weight for each condition")
            if info[target]["type"] != "img" and len(sentinels_of(as_modality(target, info[target]))) < 2:
                raise UserError(f"{target}: its codes leave no room for sentinels; raise vocab_offset and vocab_size")
            if info[target]["type"] == "img" and target in batch:
                tokens, positions = batch[target]["input_mask"].shape[1], decoders[target].num_positions
                if tokens != positions:
                    raise UserError(f"{target}: the batch has {tokens} tokens, the model {positions} positions")
            known.add(target)

    def _follow(
        self,
        uncond: ModDict,
        conds: Sequence[ModDict],
        schedule: GenerationSchedule,
        sampler: TokenSampler,
        text_tokenizer: TextTokenizer,
        verbose: bool,
        seed: Seed,
    ) -> Iterator[dict[str, dict[str, Any]]]:
        """Decode one target after another under weighted conditions; this covers all schemes, guided or not.

        Guidance leads away from ``uncond`` with its ``cfg_cond_domains`` emptied, and towards ``conds``.
        """
        num_samples = len(next(iter(uncond.values()))["tensor"])
        noise = SampleNoise(sample_seeds(seed, num_samples))
        batches = [dict(uncond), *map(dict, conds)]
        self._packed.check()
        with tqdm(total=len(schedule), disable=not verbose) as progress:
            for target, steps in itertools.groupby(schedule, key=lambda step: step["target_domain"]):
                for entry in self._decode_target(target, list(steps), batches, sampler, noise, text_tokenizer):
                    batches = [{**batch, target: entry} for batch in batches]
                    progress.update()
                    yield {name: dict(value) for name, value in batches[0].items()}

    def _decode_target(
        self,
        target: str,
        steps: Sequence[Mapping[str, Any]],
        batches: Sequence[dict[str, Any]],
        sampler: TokenSampler,
        noise: SampleNoise,
        text_tokenizer: TextTokenizer,
    ) -> Iterator[Entry]:
        """Decode one target, and yield its entry after each of its steps.

        Args:
            batches: The unconditional inputs and the conditions, which may have tokens of the target.
        """
        model, info = self.model, self.model.modality_info
        modality = as_modality(target, info[target])
        max_tokens = max(model.decoder_embeddings[target].num_positions, modality.max_tokens or 0)
        start, tensor = batches[0], next(iter(batches[0].values()))["tensor"]
        if target not in start:
            length = max_tokens if modality.type == "img" else max_tokens + 1  # a sequence also has [S_1] as its input
            start = init_empty_target_modality(start, info, target, len(tensor), length, tensor.device)
        entry, order = dict(start[target]), None
        if any(step["scheme"] == "halton" for step in steps):
            order = halton_orders(model.decoder_embeddings[target].grid, noise.uniform()).to(tensor.device)
        sentinels = [] if modality.type == "img" else sentinels_of(modality, text_tokenizer)
        by_guidance = partial(_guidance, count=len(batches) - 1)
        for (weights, domains), group in itertools.groupby(steps, key=by_guidance):
            given = [{**batch, target: entry} for batch in batches]
            inputs = [emptied(given[0], info, domains), *given[1:]]
            with self.running(), torch.inference_mode():
                weighted = [(weight, batch) for weight, batch in zip(weights, inputs, strict=True) if weight]
                conditions = Conditions(model, weighted)
            for step in group:
                options = StepOptions(
                    target,
                    step["num_tokens"],
                    step["temperature"],
                    sampler,
                    noise,
                    sentinels,
                    max_tokens,
                    order,
                    self.cuda_graphs,
                )
                with self.running():
                    entry = SCHEMES[step["scheme"]](conditions, entry, options)
                yield entry

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the model in evaluation mode and at the requested precision."""
        training = self.model.training
        if training:
            self.model.eval()
        device = self.model.mask_token.device.type
        try:
            with torch.autocast(device, self.dtype, enabled=self.dtype is not None), self._packed.applied(self.model):
                yield
        finally:
            if training:
                self.model.train()


def _guidance(step: Mapping[str, Any], count: int) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Return the weights of the unconditional inputs and of ``count`` conditions, and the domains to empty."""
    scale = step.get("cfg_scale", 1.0)
    weights = tuple(map(float, scale)) if isinstance(scale, Sequence) else (float(scale),) * count
    return (1 - sum(weights), *weights), tuple(step.get("cfg_cond_domains", ()))


def _last(mod_dict: ModDict, results: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    result = {name: dict(entry) for name, entry in mod_dict.items()}
    for result in results:  # noqa: B007
        pass
    return result


def _map(batch: ModDict, change: Callable[[Tensor], Tensor]) -> dict[str, dict[str, Tensor]]:
    return {name: {key: change(value) for key, value in entry.items()} for name, entry in batch.items()}
