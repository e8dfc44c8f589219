"""Run the tests and benchmarks that need a GPU, each in a process with its own time limit; see ``gpu.sh``.

Each step writes ``OUT/NAME.json`` with its command, exit status and seconds, the JSON objects that it printed
(``results``), and the end of its output if it failed (``error``). A failed step does not stop the others. The exit
status is 0 if no step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEP = ["benchmarks/train_step.py"]
ON_GPU = ["--device", "cuda", "--dtype", "bfloat16"]
FULL_STEP = [*STEP, "--tokens", "128", *ON_GPU]
BASE, LARGE = ["--model", "base", "--batch_size", "128"], ["--model", "large", "--batch_size", "32"]
LONG, SHORT = ["--rounds", "3", "--steps", "10"], ["--rounds", "2", "--steps", "5"]
TOY_STEP = [*STEP, "--toy", "--batch_size", "2", "--tokens", "32", "--rounds", "1", "--dtype", "bfloat16"]
ALONE = ["--no_baseline"]
RESIDUALS = ["--residual_dtype", "float32", "bfloat16"]
ABLATIONS = ["--padding", "0", "0.1", "--without"]
ATTENTION = ["benchmarks/decoder_attention.py"]
GENERATE = ["benchmarks/generate.py", "--no_plain", "--only", "guided", "--repeats", "1"]
TOKENIZERS = ["benchmarks/image_tokenizers.py", "--no_plain", "--rounds", "1"]
FULL_TOKENIZERS = ["--batch_size", "32", "--steps", "50", "--repeats", "3", *ON_GPU]
TOY_TOKENIZERS = ["--toy", "--batch_size", "2"]
TESTS = ["-m", "pytest", "-m", "gpu", "-rfE", "-p", "no:cacheprovider"]
TOY_TESTS = ["tests/train/test_gpu.py"]

ENVIRONMENT = """
import json, os, platform, torch
cuda = torch.cuda.is_available()
p = torch.cuda.get_device_properties(0) if cuda else None
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "cpus": os.cpu_count(),
    "cudnn": torch.backends.cudnn.version() if cuda else None, "nccl": torch.cuda.nccl.version() if cuda else None,
    "gpu": p.name if p else None, "gpu_memory": p.total_memory if p else None, "gpus": torch.cuda.device_count(),
    "gpu_tests": "run" if cuda else "are skipped",
}))
if not cuda and os.environ.get("GPU_NEEDED"):
    raise SystemExit("torch finds no GPU")
"""


def steps(toy: bool, out: Path) -> dict[str, tuple[int, list[str]]]:
    """Return step name → time limit in seconds and arguments of Python. All steps together take at most 358 seconds."""
    base, short_base, short_large = (
        TOY_STEP if toy else [*FULL_STEP, *options] for options in (BASE + LONG, BASE + SHORT, LARGE + SHORT)
    )
    model = ["--toy"] if toy else ["--model", "fm_base_12e_12d_swiglu_nobias", *ON_GPU]
    trace = ["--trace", str(out.resolve() / "trace" / "trace.json")]
    return {
        "environment": (15, ["-c", ENVIRONMENT]),
        "step_eager": (55, [*short_base, *ABLATIONS]),
        "step_compiled": (75, [*base, *ALONE, *RESIDUALS, "--compile", *trace]),
        "step_muon": (25, [*base, *ALONE, "--opt", "muon"]),
        "step_large": (38, [*short_large, *ALONE, "--compile", "--residual_dtype", "bfloat16"]),
        "step_fsdp": (25, [*base, *ALONE, "--fsdp"]),
        "decoder_attention": (20, [*ATTENTION, *(["--toy"] if toy else ON_GPU)]),
        "generation": (30, [*GENERATE, *model]),
        "tokenizers": (35, [*TOKENIZERS, *(TOY_TOKENIZERS if toy else FULL_TOKENIZERS)]),
        "tests": (40, [*TESTS, *(TOY_TESTS if toy else marked_tests())]),
    }


def marked_tests() -> list[str]:
    """List the files with tests for a GPU; the others may import packages that its machine does not have."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def run(command: list[str], limit: float) -> dict[str, Any]:
    """Run a step's process, which is killed at the time limit together with all its child processes."""
    start = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    timed_out = False
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    report: dict[str, Any] = {"status": process.returncode, "seconds": round(time.monotonic() - start, 2)}
    report["results"] = [value for line in out.splitlines() if (value := _parse_object(line)) is not None]
    if timed_out or process.returncode:
        reason = f"stopped after {limit:g} seconds\n" if timed_out else ""
        report["error"] = reason + (err[-3000:] + out[-3000:])
    elif not report["results"]:
        report["output"] = out[-1000:]
    return report


def _parse_object(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", nargs="?", default=os.environ.get("OUT") or "gpu_results", help="folder for the JSON files"
    )
    parser.add_argument("--toy", action="store_true", help="run on the CPU at toy size")
    parser.add_argument("--only", nargs="+", help="names of the steps to run")
    options = parser.parse_args()
    if not options.toy:
        os.environ["GPU_NEEDED"] = "1"
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for name, (limit, arguments) in steps(options.toy, out).items():
        if options.only and name not in options.only:
            continue
        command = [sys.executable, *arguments]
        limit *= 2 if options.toy else 1  # a busy CPU takes long to import everything
        report = {"name": name, "toy": options.toy, "command": arguments} | run(command, limit)
        (out / f"{name}.json").write_text(json.dumps(report, indent=2))
        failures += "error" in report
        print(f"{name}: {'FAILED' if 'error' in report else 'done'} in {report['seconds']} s", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
