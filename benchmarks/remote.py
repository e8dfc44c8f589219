"""Compare the loader's speed on shards in a slow S3 store with that on the same shards on a local disk.

    OMP_NUM_THREADS=1 python benchmarks/remote.py

It starts an S3 server behind a proxy that delays each request (by 20 ms), and loads from both sources alternately, each
time with an empty cache. It prints a JSON line per round, and one with the medians: samples/s of both and their ratio.
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

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the servers, which the tests use too
from tests.data.object_store import BUCKET, ObjectStore

PROXY = """
import sys, time
from tests.data.object_store import FaultyProxy
proxy = FaultyProxy(int(sys.argv[1]), lambda *_: time.sleep(float(sys.argv[2])))
print(proxy.endpoint, flush=True)
proxy.serve_forever()
"""


def measure(data: Path, remote: RemoteOptions, batches: int, batch_size: int, warm_up: int) -> dict[str, float]:
    """Measure the loader.

    Returns:
        ``samples_per_s`` and ``samples_per_cpu_s``; ``waiting``, the fraction of the wall-clock time that it waited for
        tars; ``fetching``, the fraction of the CPU time that its download threads used; and ``tars``, the number of
        downloads.
    """
    loader = iter(
        build_train_loader(
            load_data_config(data, num_input_tokens=128, num_target_tokens=128, remote=remote),
            TOKENIZER,
            batch_size=batch_size,
            batches_per_epoch=10**9,
            num_workers=0,
            rank=0,
            world_size=1,
            seed=0,
            raw_pixels=True,
        )
    )
    for _ in range(warm_up):
        next(loader)
    tars = _count_cached(remote)
    TIMES.clear()
    clocks = time.perf_counter, time.process_time, time.thread_time
    starts = [clock() for clock in clocks]
    for _ in range(batches):
        next(loader)
    seconds, cpu_seconds, loading = (clock() - start for clock, start in zip(clocks, starts, strict=True))
    return {
        "samples_per_s": round(batches * batch_size / seconds, 1),
        "samples_per_cpu_s": round(batches * batch_size / cpu_seconds, 1),
        "waiting": round(TIMES["waiting"] / seconds, 4),
        "fetching": round(1 - loading / cpu_seconds, 4),
        "tars": _count_cached(remote) - tars,
    }


def _count_cached(remote: RemoteOptions) -> int:
    return len(list(Path(remote.cache_dir).glob("*-*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.02, help="delay of each request in seconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--warm_up", type=int, default=48, help="batches before the measurement, to fill the buffers")
    parser.add_argument("--shards", type=int, default=80, help="number of shards; enough that most draws are new ones")
    parser.add_argument("--different", type=int, default=2, help="number of distinct shards; the others are copies")
    parser.add_argument("--per_shard", type=int, default=1000)
    parser.add_argument(
        "--checksums",
        choices=["CRC32", "SHA1", "SHA256"],
        help="checksum of the store besides MD5; with boto3, S3 has CRC32",
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
        for modality, index in itertools.product(shards.iterdir(), range(options.different, options.shards)):
            source = modality / f"shard-{index % options.different:05d}.tar"
            shutil.copyfile(source, modality / f"shard-{index:05d}.tar")
        data_path = data_path.replace(f"{options.different - 1:05d}", f"{options.shards - 1:05d}")
        local_data = config(local, data_path, 7, repeats=1)
        remote_data = config(remote, data_path.replace(str(shards), f"s3://{BUCKET}"), 7, repeats=1)
        store = ObjectStore(shards, options.checksums)
        command = [sys.executable, "-c", PROXY, str(store.port), str(options.delay)]
        proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        try:
            assert proxy.stdout
            endpoint = proxy.stdout.readline().strip()
            rounds = []
            for number in range(options.rounds):
                speeds = {}
                for name, data in (("local", local_data), ("remote", remote_data)):
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
