"""Report the contents of the data sets in a data YAML, and all problems that a run would have with them.

    python -m fourm.tools.check CONFIG [--full] [--json]

Without --full, some samples of some shards are read. All pixels of these samples are decoded, the tokens of all stored
crops are checked, and the samples are masked. Exit status: 0 if all is good, 1 if there are problems, 2 if the data
cannot be checked, with the reason in one line.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from fourm.data.data_config import DatasetConfig
from fourm.data.options import DataOptions
from fourm.data.record_files import local_files
from fourm.tools.inspection import UNKNOWN, Content, DataSlice, Inspector, Report, choose_slices
from fourm.utils.errors import run_cli, sanitize
from fourm.utils.options import option, parse_options
from fourm.utils.plugin import load_plugin
from fourm.utils.urls import redact

_MAX_UNKNOWN_SHARE = 0.05  # of a text's tokens; a larger share means that the vocabulary does not match
_WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class CheckOptions(DataOptions):
    """Options of the check."""

    max_samples: int = option(
        "maximum number of samples to read per data set, from at most 32 of its shards", 1000, at_least=1
    )
    full: bool = option("read every sample of every shard", False)
    num_workers: int = option("reader processes; 0 = read in the main process", _WORKERS, at_least=0, at_most=512)
    json: bool = option("print JSON instead of a table", False)


def check(
    dataset: DatasetConfig, text_tokenizer: str, max_samples: int | None = None, num_workers: int = 0, plugin: str = ""
) -> dict[str, Any]:
    """Read samples of a data set and summarise them.

    Args:
        dataset: The data set.
        text_tokenizer: Path of the vocabulary.
        max_samples: Maximum number of samples to read; None = all.
        num_workers: Reader processes; 0 reads in this process.
        plugin: Module that worker processes import as well.

    Returns:
        The :func:`summary` of the report. For a data set on the hub, ``not_checked`` gives the reason.

    Raises:
        UserError: The data set cannot be read at all.
    """
    if dataset.type == "huggingface" and local_files(dataset.data_path) is None:
        reason = f"{dataset.data_path} is a data set on the hub; none of its records were read"
        return {"dataset": dataset.name, "not_checked": reason, "problems": []}
    slices, shards = choose_slices(dataset, max_samples)
    inspector = functools.partial(Inspector, dataset, text_tokenizer)
    inspector()  # raises errors about settings in this process instead of in a worker
    total = Report()
    with tqdm(total=len(slices), desc=dataset.name, unit=" slices", leave=False, disable=None) as bar:
        for report in _reports(inspector, slices, min(num_workers, len(slices) // 2), plugin):
            total.add(report)
            bar.set_postfix(samples=total.samples, bad=total.bad, refresh=False)
            bar.update()
    return summary(dataset, total, shards)


_inspector: Inspector  # of this worker process


def _start_worker(inspector: functools.partial[Inspector], plugin: str) -> None:
    global _inspector
    load_plugin(plugin)
    torch.set_num_threads(1)
    _inspector = inspector()


def _inspect(data_slice: DataSlice) -> Report:
    return _inspector.inspect(data_slice)


def _reports(
    inspector: functools.partial[Inspector], slices: Sequence[DataSlice], num_workers: int, plugin: str
) -> Iterator[Report]:
    if num_workers < 1:
        yield from map(inspector().inspect, slices)
        return
    with ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=(inspector, plugin)) as pool:
        for future in as_completed([pool.submit(_inspect, data_slice) for data_slice in slices]):
            yield future.result()


def summary(dataset: DatasetConfig, report: Report, shards: int) -> dict[str, Any]:
    """Convert a report to plain values for JSON and the table.

    Args:
        dataset: The data set.
        report: The sum of the reports of all slices.
        shards: Number of shards of the data set, some of which may not have been read.
    """
    for name, content in report.content.items():
        tokens = sum(length * count for length, count in content.lengths.items())
        if content.unknown > _MAX_UNKNOWN_SHARE * tokens:
            problem = f"{content.unknown / tokens:.1%} of its tokens are not in the vocabulary"
            report.problem(name, UNKNOWN, problem, dataset.name, content.unknown)
    samples = round(report.complete * shards / max(report.shards, 1))
    per_sample = {role: report.tokens[role] / max(report.samples - report.bad, 1) for role in ("input", "target")}
    names = report.present
    return {
        "dataset": dataset.name,
        "shards": {"looked_at": report.shards, "all": shards},
        "keys": report.keys,
        "complete_keys": report.complete,
        "samples_read": report.samples,
        "bad_samples": report.bad,
        "modalities": {
            name: {"keys": report.present[name], "missing": report.keys - report.present[name]}
            | _content(report.content.get(name, Content()), dataset, name)
            for name in names
        },
        "epoch": {
            "samples": samples,
            "estimated": report.shards < shards,
            "input_tokens_per_sample": round(per_sample["input"], 1),
            "target_tokens_per_sample": round(per_sample["target"], 1),
            "tokens": round(samples * sum(per_sample.values())),
        },
        "problems": [
            {"modality": modality, "kind": kind, "problem": what, "count": p.count, "examples": p.examples}
            for (modality, kind, what), p in sorted(report.problems.items())
        ],
    }


def _content(content: Content, dataset: DatasetConfig, name: str) -> dict[str, Any]:
    """Summarise the content of a modality's files with the keys that apply to it."""
    entry: dict[str, Any] = {"files": dict(content.files)}
    modality = dataset.modalities.get(name)
    if content.dtypes:
        entry["dtypes"] = dict(content.dtypes)
    if content.crops:
        entry["crops"] = _distribution(content.crops)
    if content.ids and modality is not None:
        assert modality.vocab_size
        limit = modality.vocab_size - modality.vocab_offset
        used = sum(0 <= index < limit for index in content.ids) / limit
        entry["ids"] = {"min": min(content.ids), "max": max(content.ids), "vocabulary": limit, "used": round(used, 4)}
    if content.sizes:
        small = sum(n for size, n in content.sizes.items() if modality and min(size) < (modality.input_size or 0))
        entry["height"] = _distribution(_project(content.sizes, 0))
        entry["width"] = _distribution(_project(content.sizes, 1))
        entry["smaller_than_input"] = round(small / content.sizes.total(), 4)
    if content.lengths and modality is not None:
        tokens = sum(length * count for length, count in content.lengths.items())
        cut = sum(count for length, count in content.lengths.items() if length >= (modality.max_tokens or 0))
        entry["tokens"] = _distribution(content.lengths) | {"limit": modality.max_tokens}
        entry["cut"] = round(cut / content.lengths.total(), 4)
        entry["unknown"] = round(content.unknown / max(tokens, 1), 4)
    return entry


def _project(sizes: Counter[tuple[int, int]], axis: int) -> Counter[int]:
    counts: Counter[int] = Counter()
    for size, count in sizes.items():
        counts[size[axis]] += count
    return counts


def _distribution(counts: Counter[int]) -> dict[str, int]:
    """Return the minimum, median and maximum of counted numbers."""
    remaining = counts.total() / 2
    for value in sorted(counts):
        remaining -= counts[value]
        if remaining <= 0:
            return {"min": min(counts), "median": value, "max": max(counts)}
    raise AssertionError("nothing was counted")


def table(split: str, result: dict[str, Any]) -> str:
    """Format a summary as text."""
    if "not_checked" in result:
        return f"{split} {result['dataset']}: not checked: {result['not_checked']}"
    incomplete = result["keys"] - result["complete_keys"]
    if result["problems"]:
        verdict = f"{result['bad_samples']} bad, see below"
    elif incomplete:
        verdict = f"no problems, but {incomplete:,} are left out because they are incomplete"
    else:
        verdict = "all good"
    lines = [f"{split} {result['dataset']}: {result['samples_read']} samples read; {verdict}"]
    rows = [("modality", "keys", "missing", "files", "content")]
    for name, entry in result["modalities"].items():
        files = " ".join(entry["files"])
        rows.append((name, f"{entry['keys']:,}", f"{entry['missing']:,}", files, _describe_content(entry)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = (row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3].ljust(widths[3]))
        lines.append("  " + "  ".join((*cells, row[4])).rstrip())
    epoch, shards = result["epoch"], result["shards"]
    estimate = f"estimated from {shards['looked_at']} of {shards['all']} shards, " if epoch["estimated"] else ""
    lines.append(
        f"  an epoch: {estimate}{epoch['samples']:,} samples of {epoch['input_tokens_per_sample']:g} input and "
        f"{epoch['target_tokens_per_sample']:g} target tokens, {epoch['tokens']:,} tokens"
    )
    for problem in result["problems"]:
        detail = f" ({problem['problem']})" if problem["problem"] else ""
        lines.append(f"  {problem['count']:,} {problem['kind']}{detail}: {problem['modality']}")
        lines += [f"    {example}" for example in problem["examples"]]
    return "\n".join(lines)


def _describe_content(entry: dict[str, Any]) -> str:
    parts = []
    if "dtypes" in entry:
        parts.append(" ".join(entry["dtypes"]))
    if "crops" in entry:
        parts.append(f"{_range(entry['crops'])} crops")
    if ids := entry.get("ids"):
        parts.append(f"ids {ids['min']} to {ids['max']}, {ids['used']:.0%} of {ids['vocabulary']:,} used")
    if "height" in entry:
        parts.append(f"{_range(entry['height'])} x {_range(entry['width'])} px")
        if entry["smaller_than_input"]:
            parts.append(f"{entry['smaller_than_input']:.1%} smaller than the input")
    if tokens := entry.get("tokens"):
        parts.append(f"{_range(tokens)} tokens (median {tokens['median']}, limit {tokens['limit']})")
        parts.append(f"{entry['cut']:.1%} cut, {entry['unknown']:.1%} unknown")
    return ", ".join(parts)


def _range(spread: dict[str, int]) -> str:
    low, high = spread["min"], spread["max"]
    return f"{low}" if low == high else f"{low}–{high}"


def main(argv: list[str] | None = None) -> int:
    """Check all data sets; return 1 if there are problems and 0 otherwise."""
    options = parse_options(CheckOptions, argv, __doc__ or "", positional=("data_config",))
    config = options.load_data()
    max_samples = None if options.full else options.max_samples
    results = [
        {"split": split} | check(dataset, options.text_tokenizer_path, max_samples, options.num_workers, options.plugin)
        for split, datasets in (("train", config.train), ("val", config.val))
        for dataset in datasets.values()
    ]
    if options.json:
        print(json.dumps(redact(results), indent=2))
    else:
        print(sanitize("\n".join(table(result["split"], result) for result in results)))
    return int(any(result["problems"] for result in results))


if __name__ == "__main__":
    run_cli(main)
