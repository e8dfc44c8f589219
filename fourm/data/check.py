"""Read every sample of the data sets of a data YAML once, and name each file with which a run would have trouble.

What a run skips and what stops it are both counted and passed over. All pixels are decoded, and the tokens of all stored
crops are checked; crop, flip and the like are drawn once per sample.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.data_config import DatasetConfig, build_sample_transform, load_data_config
from fourm.data.raw_sample import BadSample, OpenFiles
from fourm.data.unified_datasets import errors_name_the_file, open_source
from fourm.utils.errors import DataError
from fourm.utils.options import option, parse_options
from fourm.utils.seeds import generator


@dataclass(frozen=True)
class CheckOptions:
    """What to check."""

    data_config: str = option("data YAML")
    max_samples: int | None = option("samples per data set, from its first on (default: all)", None)


def check(dataset: DatasetConfig, max_samples: int | None = None) -> tuple[int, Counter[str]]:
    """Read the samples of a data set; what is wrong is logged as warnings.

    Returns:
        The number of samples that were read, and of samples with each kind of problem.

    Raises:
        UserError: it cannot be read at all.
    """
    ledger, files = BadSampleLedger(dataset.name, max_bad_fraction=1.0), OpenFiles()
    samples = open_source(dataset, ledger).all(ledger)[:max_samples]
    problems = Counter({key.removeprefix(f"{dataset.name}: "): count for key, count in ledger.collect().items()})
    transform = build_sample_transform(dataset, training=True)
    for sample in tqdm(samples, desc=dataset.name, leave=False, disable=None):
        try:
            with errors_name_the_file(sample):
                transform(sample.values(files, keep_pixels=False), generator("check", sample.key))
        except (BadSample, DataError) as error:
            problems[error.reason if isinstance(error, BadSample) else "broken contract"] += 1
            ledger.warn(f"read {sample.key}", str(error))
    return len(samples), problems


def main(argv: list[str] | None = None) -> int:
    """Check all data sets; 1 if anything is wrong."""
    options = parse_options(CheckOptions, argv, __doc__ or "")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    config = load_data_config(options.data_config, num_input_tokens=1, num_target_tokens=1)
    bad = 0
    for split, datasets in (("train", config.train), ("val", config.val)):
        for dataset in datasets.values():
            total, problems = check(dataset, options.max_samples)
            bad += problems.total()
            found = ", ".join(f"{count} {reason}" for reason, count in problems.items())
            print(f"{split} {dataset.name}: {total} samples read; {found or 'all good'}")
    return int(bad > 0)
