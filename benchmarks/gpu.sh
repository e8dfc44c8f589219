#!/usr/bin/env bash
# Run all tests and benchmarks that need a GPU, in under 6 minutes and without a network; see benchmarks/gpu.py.
#
#     benchmarks/gpu.sh wheels [PYTHON_VERSION] [FOLDER]   download the packages that a PyTorch image lacks (to wheels/)
#     benchmarks/gpu.sh [OUT]                              run, and write JSON files to OUT (default: $OUT or gpu_results)
#     benchmarks/gpu.sh --toy [OUT]                        run on the CPU at toy size, to test the command
#
# PYTHON is the interpreter that has torch (default: python3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
# Without torch, CUDA and numpy, which the image has. Other packages that it has are not installed again either.
packages=(webdataset braceexpand boto3 botocore s3transfer jmespath python-dateutil six urllib3 einops timm tokenizers
    safetensors tqdm pyyaml huggingface-hub hf-xet httpx2 httpcore2 h11 truststore anyio idna click filelock fsspec
    typing-extensions pytest pytest-xdist execnet pluggy iniconfig packaging pygments hypothesis sortedcontainers
    diffusers importlib-metadata zipp regex requests charset-normalizer certifi pillow)

if [ "${1:-}" = wheels ]; then
    folder=${3:-$root/wheels}
    platforms=()
    for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${name}_x86_64")
    done
    exec "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${2:-3.12}" \
        --implementation cp "${platforms[@]}" -d "$folder" "${packages[@]}"
fi

cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
imports='import boto3, braceexpand, diffusers, einops, fourm.models, pytest, safetensors, timm, tokenizers, torch, torchvision, tqdm, webdataset, yaml'
if ! "$python" -c "$imports" 2>/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    # Install only missing packages, so that none of the image's packages is replaced.
    mapfile -t missing < <("$python" - "$root"/wheels/*.whl <<'PYTHON'
import importlib.metadata, pathlib, sys

normalize = lambda name: name.lower().replace("-", "_").replace(".", "_")
installed = {normalize(package.metadata["Name"] or "") for package in importlib.metadata.distributions()}
wheels = [path for path in map(pathlib.Path, sys.argv[1:]) if path.is_file()]
print(*(path for path in wheels if normalize(path.name.split("-")[0]) not in installed), sep="\n")
PYTHON
    )
    if [ -n "${missing[0]:-}" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${missing[@]}" ||
            echo "gpu.sh: the wheels could not be installed" >&2
        export PYTHONPATH="$PYTHONPATH:$site"
    fi
    "$python" -c "$imports" ||
        echo "gpu.sh: packages are missing; run 'benchmarks/gpu.sh wheels' on a machine with a network" >&2
fi
"$python" benchmarks/gpu.py "$@"
