"""Stage 5: check that the model is better than knowing how often each token occurs.

The baseline is the entropy of a modality's token distribution over exactly the targets that the validation loss is
computed on. It is the lowest loss of any predictor that uses the same distribution for all targets of a modality. What
the model gains over it comes from the rest of the sample, mostly from other modalities, and from the positions of the
targets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fourm.data.data_config import load_data_config
from fourm.data.modality_info import Modality
from fourm.data.unified_datasets import build_eval_loader
from fourm.utils.config import load_yaml
from fourm.utils.files import atomic_path

MUST_LEARN = ("tok_depth", "tok_normal", "tok_semseg", "caption", "det")
# A loss that is lower than the entropy by this number of nats is clearly below it, as it is a mean of over 1 000
# targets. Not a ratio: it would ask more of a modality whose tokens tell more of what cannot be predicted.
CLEAR_GAIN = 0.3


@dataclass(frozen=True)
class ModalityResult:
    """A row of the table, with loss and entropy in nats per token."""

    modality: str
    targets: int
    entropy: float
    loss: float

    @property
    def ratio(self) -> float:
        return self.loss / self.entropy

    @property
    def is_clear(self) -> bool:
        return self.entropy - self.loss >= CLEAR_GAIN

    @property
    def verdict(self) -> str:
        if self.is_clear:
            return "clearly below"
        return "below" if self.ratio < 1 else "NOT below"


def token_entropy(tokens: np.ndarray) -> float:
    """Return the entropy in nats of the empirical distribution of ``tokens``."""
    counts = np.unique(tokens, return_counts=True)[1]
    probabilities = counts / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def target_tokens(entry: dict[str, Any], modality: Modality) -> np.ndarray:
    """Return the target tokens that enter the loss; in sequences, each valid token predicts the next one."""
    tokens = np.asarray(entry["tensor"]).reshape(len(entry["tensor"]), -1)
    valid = ~np.asarray(entry["target_mask"], bool)
    if modality.type == "img":
        return tokens[valid]
    return tokens[:, 1:][valid[:, :-1] & valid[:, 1:]]


def entropies(run: Path) -> dict[str, tuple[float, int]]:
    """Return modality → entropy and number of the target tokens in the fixed-budget validation of a run."""
    config = load_yaml(run / "config.yaml")
    budget = {key: config[key] for key in ("num_input_tokens", "num_target_tokens")}
    (dataset,) = load_data_config(config["data_config"], **budget).val.values()
    inputs, targets = config["fixed_eval_input_tokens"], config["fixed_eval_target_tokens"]
    loader = build_eval_loader(
        dataset,
        config["text_tokenizer_path"],
        batch_size=config["fixed_eval_batch_size"],
        num_workers=0,
        rank=0,
        world_size=1,
        seed=config["seed"],
        input_tokens_range=(inputs, inputs),
        target_tokens_range=(targets, targets),
    )
    parts: dict[str, list[np.ndarray]] = {name: [] for name in dataset.out_domains}
    for batch in loader:
        for name, tokens in parts.items():
            tokens.append(target_tokens(batch.mod_dict[name], dataset.modalities[name]))
    joined = {name: np.concatenate(tokens) for name, tokens in parts.items()}
    return {name: (token_entropy(tokens), len(tokens)) for name, tokens in joined.items()}


def read_log(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read a run's log: training lines, and evaluations with fixed budgets as ``{"step", "per_modality", …}``."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    fixed = [
        {"step": line["step"], **result}
        for line in lines
        for kinds in line.get("eval", {}).values()
        if (result := kinds.get("fixed"))
    ]
    return training, fixed


def table(losses: dict[str, float], entropy: dict[str, tuple[float, int]]) -> list[ModalityResult]:
    """Return one row per modality, beginning with those that must be learned."""
    names = sorted(entropy, key=lambda name: (not _must_learn(name), name))
    return [ModalityResult(name, entropy[name][1], entropy[name][0], losses[name]) for name in names]


def passed(results: list[ModalityResult]) -> bool:
    return all(result.is_clear for result in results if _must_learn(result.modality))


def _must_learn(modality: str) -> bool:
    return modality.split("@")[0] in MUST_LEARN


def markdown(results: list[ModalityResult]) -> str:
    """Format the results as a table."""
    head = ("modality", "targets", "entropy of its tokens", "validation loss", "loss / entropy", "verdict")
    rows = [
        (r.modality, f"{r.targets}", f"{r.entropy:.3f}", f"{r.loss:.3f}", f"{r.ratio:.2f}", r.verdict) for r in results
    ]
    return aligned(head, rows, left=(0, 5))


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Format a Markdown table that is also readable in a terminal; the columns ``left`` are left-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        inner = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(inner)} |"

    rule = "|".join("-" * (w + 1) + ("-" if i in left else ":") for i, w in enumerate(widths))
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


def write(out: Path, results: list[ModalityResult], facts: dict[str, Any], text: str) -> None:
    """Write ``report.json`` with the results and ``facts``, and ``report.md`` with ``text``."""
    modalities = [asdict(result) | {"ratio": result.ratio, "verdict": result.verdict} for result in results]
    with atomic_path(out / "report.json") as path:
        path.write_text(json.dumps({"modalities": modalities, "passed": passed(results), **facts}, indent=2) + "\n")
    with atomic_path(out / "report.md") as path:
        path.write_text(text)
