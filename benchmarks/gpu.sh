#!/usr/bin/env bash
# Everything that needs a GPU, in stages, on a machine with torch and triton, no network and nothing installed.
#
#   benchmarks/gpu.sh [STAGE ...]   smoke tests bench, or those named: also tune counters sanitize
#   benchmarks/gpu.sh --dry         a little of every stage, anywhere
#
# benchmarks/GPU.md tells what to carry there and what to type; --help lists stages and options.
#
# OUT=folder      where results go (benchmarks/results/gpu); with results in it, the stages go on from there
# CARRY=file      what `python -m fastreg_benchmarks.pack` has compiled (benchmarks/results/.carry/triton.tar.gz)
# PEERS=folder    wheels of the libraries to compare with
# PYTHON=python3  the interpreter that has torch
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
carry=${CARRY:-benchmarks/results/.carry/triton.tar.gz}
site=$(mktemp -d) || exit 2
trap 'rm -rf "$site"' EXIT
ln -s "$PWD/benchmarks" "$site/fastreg_benchmarks" # the name under which it is installed elsewhere
export PYTHONPATH="$site:$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "${PEERS-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$PEERS"/*.whl ||
        echo "the wheels in $PEERS could not be installed: those libraries are left out" >&2
fi
if [ -z "${TRITON_CACHE_DIR-}" ] && [ -f "$carry" ]; then
    export TRITON_CACHE_DIR=/tmp/fastreg-triton # where it was made: Triton writes absolute paths into it
    tar -xzf "$carry" -C /tmp || echo "$carry could not be unpacked: kernels are compiled here" >&2
fi

"$python" -m fastreg_benchmarks.gpu --out "${OUT:-benchmarks/results/gpu}" "$@"
