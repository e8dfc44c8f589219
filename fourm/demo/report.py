"""Stage 5: is the model better than knowing how often each token occurs?

The yardstick is the entropy of a modality's token distribution over exactly the targets that the validation loss is
computed on. It is the lowest loss of any predictor that gives all targets of a modality the same distribution; what the
model gains over it comes from the rest of the sample, mostly other modalities, and from where a target lies.
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
CLEAR = (
    0.9  # a loss at most this share of the entropy is clearly below it: a tenth of a nat or more, on over 1 000 targets
)


@dataclass(frozen=True)
class Line:
    """One modality of the table; loss and entropy in nats per token."""

    modality: str
    targets: int
    entropy: float
    loss: float

    @property
    def ratio(self) -> float:
        return self.loss / self.entropy

    @property
    def verdict(self) -> str:
        return "clearly below" if self.ratio <= CLEAR else "below" if self.ratio < 1 else "NOT below"


def token_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the empirical distribution of ``tokens``."""
    counts = np.unique(tokens, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def target_tokens(entry: dict[str, Any], modality: Modality) -> np.ndarray:
    """The tokens of a batch's ``modality`` that the loss counts; in sequences each valid token predicts the next one."""
    tokens = np.asarray(entry["tensor"]).reshape(len(entry["tensor"]), -1)
    valid = ~np.asarray(entry["target_mask"], bool)
    if modality.type == "img":
        return tokens[valid]
    return tokens[:, 1:][valid[:, :-1] & valid[:, 1:]]


def entropies(run: Path) -> dict[str, tuple[float, int]]:
    """Modality → entropy and number of the target tokens in the fixed-budget validation of a run."""
    config = load_yaml(run / "config.yaml")
    budget = {key: config[key] for key in ("num_input_tokens", "num_target_tokens")}
    (dataset,) = load_data_config(config["data_config"], **budget).val.values()
    inputs, targets = config["fixed_eval_input_tokens"], config["fixed_eval_target_tokens"]
    loader = build_eval_loader(
        dataset, config["text_tokenizer_path"], batch_size=config["fixed_eval_batch_size"], num_workers=0, rank=0,
        world_size=1, seed=config["seed"], input_tokens_range=(inputs, inputs), target_tokens_range=(targets, targets),
    )  # fmt: skip
    found: dict[str, list[np.ndarray]] = {name: [] for name in dataset.out_domains}
    for batch in loader:
        for name, tokens in found.items():
            tokens.append(target_tokens(batch.mod_dict[name], dataset.modalities[name]))
    joined = {name: np.concatenate(tokens) for name, tokens in found.items()}
    return {name: (token_entropy(tokens), len(tokens)) for name, tokens in joined.items()}


def read_log(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The run's log: training lines, and evaluations with fixed budgets as ``{"step", "per_modality", …}``."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    fixed = [
        {"step": line["step"], **result}
        for line in lines
        for kinds in line.get("eval", {}).values()
        if (result := kinds.get("fixed"))
    ]
    return training, fixed


def table(losses: dict[str, float], entropy: dict[str, tuple[float, int]]) -> list[Line]:
    """One line per modality, those that must be learned first."""
    rank = lambda name: (not _must_learn(name), name)  # noqa: E731
    return [Line(name, entropy[name][1], entropy[name][0], losses[name]) for name in sorted(entropy, key=rank)]


def passed(lines: list[Line]) -> bool:
    return all(line.ratio <= CLEAR for line in lines if _must_learn(line.modality))


def _must_learn(modality: str) -> bool:
    return modality.split("@")[0] in MUST_LEARN


def markdown(lines: list[Line]) -> str:
    """The table, aligned, so that it reads well in a terminal too."""
    head = ("modality", "targets", "entropy of its tokens", "validation loss", "loss / entropy", "verdict")
    rows = [
        (m.modality, f"{m.targets}", f"{m.entropy:.3f}", f"{m.loss:.3f}", f"{m.ratio:.2f}", m.verdict) for m in lines
    ]
    return aligned(head, rows, left=(0, 5))


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """A table that reads well in a terminal too; the columns ``left`` are words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        inner = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(inner)} |"

    rule = "|".join("-" * (w + 1) + ("-" if i in left else ":") for i, w in enumerate(widths))
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


def write(out: Path, lines: list[Line], facts: dict[str, Any], text: str) -> None:
    """``report.json`` with ``facts``, and ``report.md`` with ``text``."""
    modalities = [asdict(line) | {"ratio": line.ratio, "verdict": line.verdict} for line in lines]
    with atomic_path(out / "report.json") as path:
        path.write_text(json.dumps({"modalities": modalities, "passed": passed(lines), **facts}, indent=2) + "\n")
    with atomic_path(out / "report.md") as path:
        path.write_text(text)
