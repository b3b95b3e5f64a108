#!/usr/bin/env bash
# Everything that only a GPU can answer, in one command that needs no network and takes under nine minutes on an H100:
#     benchmarks/gpu_kit.sh [--out FOLDER] [--minutes 9] [--steps NAME ...]
#     benchmarks/gpu_kit.sh --device cpu --tiny      checks the kit itself, without a GPU
# For a machine that lacks some packages, first, where there is a network and an environment by `make env`:
#     benchmarks/gpu_kit.sh carry [--python 3.12]    downloads wheels into build/wheels; bring them along
# Nothing is installed into the machine's Python: what it lacks goes into build/gpu_site (or GPU_KIT_SITE).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
if [ "${1:-}" = carry ]; then
    exec "$PYTHON" benchmarks/wheels.py "$@"
fi
site="${GPU_KIT_SITE:-$PWD/build/gpu_site}"
"$PYTHON" benchmarks/wheels.py install "$site" || echo "the carried wheels could not be installed; going on without"
export PYTHONPATH="$PWD:$site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" benchmarks/gpu_kit.py "$@"
