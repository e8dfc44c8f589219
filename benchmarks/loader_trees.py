"""Compare the data pipeline of two versions of the code: processor time per sample, and whether data are equal.

    git worktree add ../before COMMIT
    OMP_NUM_THREADS=1 python benchmarks/loader_trees.py --before ../before --modalities 7 21 --repeats 4 1

Each version runs in a process of its own, with the code of this folder (``--now`` names another one) and with that of
``--before``. Both read the same shards. They make the same number of samples in turns; the sums of everything that they
made must be equal. One JSON line per number of modalities and repeats gives samples per second of processor time before
and now, and the quartiles of the ratio over the rounds. Samples are single ones of
``build_wds_fm_pretraining_dataloader``, or with ``--batch_size`` the batches of a training run, with pixels of 8 bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median, quantiles

BENCHMARKS = Path(__file__).resolve().parent


class Version:
    """A process that makes samples with the code in a folder."""

    def __init__(self, tree: Path, *arguments: object):
        paths = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def make(self, count: int) -> tuple[float, str]:
        """Make samples, and return the seconds of processor time and the sum of all samples until now."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        seconds, digest = self._process.stdout.readline().split()
        return float(seconds), digest

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(data: Path, modalities: int, batch_size: int | None) -> None:
    """For each number that is read, make so many samples, and write the seconds and the sum of all samples."""
    import torch
    from loader import TOKENIZER, TOKENS, batches, single_samples

    torch.set_num_threads(1)
    arguments = (data, TOKENIZER, TOKENS[modalities])
    if batch_size:
        loader = batches(*arguments, batch_size=batch_size, num_workers=0, raw_pixels=True)
    else:
        loader = single_samples(*arguments)
    digest = hashlib.sha256()
    for line in sys.stdin:
        seconds = 0.0
        for _ in range(int(line) // (batch_size or 1)):
            start = time.process_time()
            sample = next(loader)
            seconds += time.process_time() - start
            for name, fields in sample.items():
                for key, tensor in fields.items():
                    digest.update(f"{name} {key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.contiguous().numpy())
        print(seconds, digest.hexdigest(), flush=True)


def compare(versions: list[Version], samples: int, rounds: int, warm_up: int) -> dict[str, object]:
    """Let two versions make samples in turns, the second one first in every other round."""
    equal = len({version.make(warm_up)[1] for version in versions}) == 1
    seconds = []
    for turn in range(rounds):
        order = versions if turn % 2 else versions[::-1]
        made = {version: version.make(samples) for version in order}
        equal &= len({digest for _, digest in made.values()}) == 1
        seconds.append([made[version][0] for version in versions])
    before, now = zip(*seconds, strict=True)
    ratios = [a / b for a, b in seconds]
    return {
        "before": round(samples / median(before), 1),
        "now": round(samples / median(now), 1),
        "equal": equal,
        "ratio": [round(ratio, 3) for ratio in (quantiles(ratios, n=4) if rounds > 1 else ratios * 3)],
        "rounds": rounds,
        "samples": samples,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="folder with the other version of the code")
    parser.add_argument("--now", type=Path, default=BENCHMARKS.parent)
    parser.add_argument("--modalities", type=int, nargs="+", default=[7])
    parser.add_argument("--repeats", type=int, nargs="+", default=[4, 1], help="values of wds_n_repeats")
    parser.add_argument("--batch_size", type=int, help="measure batches of this size instead of single samples")
    parser.add_argument("--samples", type=int, default=192, help="number of samples in a turn")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=1920, help="number of samples before the first turn")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--per_shard", type=int, default=100)
    options = parser.parse_args(argv)
    from loader import TOKENIZER, config, write_samples

    with tempfile.TemporaryDirectory() as folder:
        for modalities, repeats in product(options.modalities, options.repeats):
            shards = Path(folder, str(modalities))
            if not shards.exists():
                data_path = write_samples(shards, TOKENIZER, modalities, options.shards, options.per_shard)
            data = config(Path(folder), data_path, modalities, repeats)
            versions = [
                Version(tree.resolve(), data, modalities, options.batch_size or 0)
                for tree in (options.before, options.now)
            ]
            try:
                result = compare(versions, options.samples, options.rounds, options.warm_up)
            finally:
                for version in versions:
                    version.close()
            print(json.dumps({"modalities": modalities, "repeats": repeats} | result), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        data, modalities, batch_size = sys.argv[2:]
        serve(Path(data), int(modalities), int(batch_size) or None)
    else:
        main()
