"""The loader's speed with shards in an S3 store that is slow to answer, beside that with the same shards on disk.

    OMP_NUM_THREADS=1 python benchmarks/remote.py

Starts an S3 server and a process before it that lets each request wait (20 ms). Loads from both sources by turns, each time
with an empty cache, and prints a JSON line per round and one with the medians: samples/s of both and their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from loader import TIMES, TOKENIZER, config, timed, write_samples

from fourm.data import shard_cache
from fourm.data.data_config import load_data_config
from fourm.data.shard_cache import RemoteOptions
from fourm.data.unified_datasets import build_train_loader
from fourm.utils.errors import run_cli

sys.path.insert(0, str(Path(__file__).parent.parent))  # the servers are those of the tests
from tests.data.object_store import BUCKET, ObjectStore

PROXY = """
import sys, time
from tests.data.object_store import FaultyProxy
proxy = FaultyProxy(int(sys.argv[1]), lambda *_: time.sleep(float(sys.argv[2])))
print(proxy.endpoint, flush=True)
proxy.serve_forever()
"""


def measure(data: Path, remote: RemoteOptions, batches: int, batch_size: int, warm_up: int) -> dict[str, float]:
    """Samples/s, also per second of CPU time; shares of the time on the clock that the loader waited for tars, and of the
    CPU time that fetching them took, in threads of its own; how many came."""
    loader = iter(
        build_train_loader(
            load_data_config(data, num_input_tokens=128, num_target_tokens=128, remote=remote), TOKENIZER,
            batch_size=batch_size, batches_per_epoch=10**9, num_workers=0, rank=0, world_size=1, seed=0, raw_pixels=True,
        )
    )  # fmt: skip
    for _ in range(warm_up):
        next(loader)
    before = _fetched(remote)
    TIMES.clear()
    clocks = time.perf_counter, time.process_time, time.thread_time
    start = [clock() for clock in clocks]
    for _ in range(batches):
        next(loader)
    seconds, cpu_seconds, loading = (clock() - begin for clock, begin in zip(clocks, start, strict=True))
    return {
        "samples_per_s": round(batches * batch_size / seconds, 1),
        "samples_per_cpu_s": round(batches * batch_size / cpu_seconds, 1),
        "waiting": round(TIMES["waiting"] / seconds, 4),
        "fetching": round(1 - loading / cpu_seconds, 4),
        "tars": _fetched(remote) - before,
    }


def _fetched(remote: RemoteOptions) -> int:
    return len(list(Path(remote.cache_dir).glob("*-*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds that each request waits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--warm_up", type=int, default=48, help="batches before, in which the shuffle buffers fill")
    parser.add_argument("--shards", type=int, default=80, help="so many that most are new when they are drawn")
    parser.add_argument(
        "--different", type=int, default=2, help="shards that are written; the others are copies of them"
    )
    parser.add_argument("--per_shard", type=int, default=1000)
    parser.add_argument(
        "--checksums",
        choices=["CRC32", "SHA1", "SHA256"],
        help="that the store has beside MD5; boto3 gives CRC32 to S3",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    timed(shard_cache, "_arrived", "waiting")
    os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
    with tempfile.TemporaryDirectory() as folder:
        shards, local, remote = (Path(folder) / name for name in ("shards", "local", "remote"))
        for path in (shards, local, remote):
            path.mkdir()
        data_path = write_samples(shards, TOKENIZER, 7, options.different, options.per_shard)
        for folder, index in itertools.product(shards.iterdir(), range(options.different, options.shards)):
            shutil.copyfile(folder / f"shard-{index % options.different:05d}.tar", folder / f"shard-{index:05d}.tar")
        data_path = data_path.replace(f"{options.different - 1:05d}", f"{options.shards - 1:05d}")
        on_disk = config(local, data_path, 7, repeats=1)
        in_store = config(remote, data_path.replace(str(shards), f"s3://{BUCKET}"), 7, repeats=1)
        store = ObjectStore(shards, options.checksums)
        command = [sys.executable, "-c", PROXY, str(store.port), str(options.delay)]
        proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        try:
            assert proxy.stdout
            endpoint = proxy.stdout.readline().strip()
            rounds = []
            for number in range(options.rounds):
                speeds = {}
                for name, data in (("local", on_disk), ("remote", in_store)):
                    stores = RemoteOptions(endpoint, cache_dir=f"{folder}/cache-{number}")
                    speeds[name] = measure(data, stores, options.batches, options.batch_size, options.warm_up)
                rounds.append(speeds)
                print(json.dumps(speeds), flush=True)
        finally:
            proxy.kill()
            store.kill()
    ratios = {
        key: round(statistics.median(speeds["remote"][key] / speeds["local"][key] for speeds in rounds), 3)
        for key in ("samples_per_s", "samples_per_cpu_s")
    }
    shares = {key: statistics.median(speeds["remote"][key] for speeds in rounds) for key in ("waiting", "fetching")}
    print(json.dumps({"delay_ms": 1000 * options.delay, "remote / local": ratios, **shares}))


if __name__ == "__main__":
    run_cli(main)
