#!/usr/bin/env bash
# Everything that needs a GPU, in under 6 minutes and without a network: benchmarks/gpu.py says what, and writes JSON files.
#
#     benchmarks/gpu.sh wheels [PYTHON_VERSION] [FOLDER]   fetch, where there is a network, what a PyTorch image lacks (wheels/)
#     benchmarks/gpu.sh [OUT]                              measure; OUT is $OUT or gpu_results unless given
#     benchmarks/gpu.sh --toy [OUT]                        the same on the CPU at toy size, to try the command
#
# PYTHON: the interpreter that has torch (python3).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
# No torch, CUDA or numpy: the image has its own. What it has besides is not installed again.
packages=(webdataset braceexpand boto3 botocore s3transfer jmespath python-dateutil six urllib3 einops timm tokenizers
    safetensors tqdm pyyaml huggingface-hub hf-xet httpx2 httpcore2 h11 truststore anyio idna click filelock fsspec
    typing-extensions pytest pytest-xdist execnet pluggy iniconfig packaging pygments hypothesis sortedcontainers)

if [ "${1:-}" = wheels ]; then
    folder=${3:-$here/wheels}
    platforms=()
    for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${name}_x86_64")
    done
    exec "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${2:-3.12}" \
        --implementation cp "${platforms[@]}" -d "$folder" "${packages[@]}"
fi

cd "$here"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
imports='import boto3, braceexpand, einops, fourm.models, pytest, safetensors, timm, tokenizers, torch, torchvision, tqdm, webdataset, yaml'
if ! "$python" -c "$imports" 2>/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    # Only what is not there: none of the image's own packages is replaced.
    mapfile -t missing < <("$python" - "$here"/wheels/*.whl <<'PYTHON'
import importlib.metadata, pathlib, sys

plain = lambda name: name.lower().replace("-", "_").replace(".", "_")
known = {plain(found.metadata["Name"] or "") for found in importlib.metadata.distributions()}
wheels = [path for path in map(pathlib.Path, sys.argv[1:]) if path.is_file()]
print(*(path for path in wheels if plain(path.name.split("-")[0]) not in known), sep="\n")
PYTHON
    )
    if [ -n "${missing[0]:-}" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${missing[@]}" ||
            echo "gpu.sh: the wheels could not be installed" >&2
        export PYTHONPATH="$PYTHONPATH:$site"
    fi
    "$python" -c "$imports" ||
        echo "gpu.sh: packages are missing; run 'benchmarks/gpu.sh wheels' where there is a network" >&2
fi
"$python" benchmarks/gpu.py "$@"
