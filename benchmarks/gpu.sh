#!/usr/bin/env bash
# Everything that needs a GPU, in stages, on a machine with torch and triton, no network and nothing installed.
#
#   benchmarks/gpu.sh [STAGE ...]   smoke tests bench, or those named: also tune counters sanitize
#   benchmarks/gpu.sh --dry         a little of every stage, anywhere
#
# benchmarks/GPU.md tells what to carry there and what to type; --help lists stages and options.
#
# OUT=folder      where results go (benchmarks/results/gpu, dry ones runs/gpu-dry); with results of the same
#                 machine and kernels in it, the stages go on from there
# CARRY=file      what `python -m fastreg_benchmarks.pack` has compiled (benchmarks/results/.carry/triton.tar.gz)
# PEERS=folder    wheels of the libraries to compare with
# PYTHON=python3  the interpreter that has torch
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
carry=${CARRY:-benchmarks/results/.carry/triton.tar.gz}
found="import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('torch', 'triton', 'pytest'))))"
if ! "$python" -c "$found"; then # which imports none of them: that takes seconds
    echo "$python lacks torch, triton or pytest: set PYTHON to an interpreter that has them" >&2
    exit 2
fi
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
    mkdir -m 700 "$TRITON_CACHE_DIR" 2>/dev/null
    # What is in there is run.
    if [ -L "$TRITON_CACHE_DIR" ] || [ ! -d "$TRITON_CACHE_DIR" ] || [ ! -O "$TRITON_CACHE_DIR" ] ||
        [ -n "$(find "$TRITON_CACHE_DIR" -maxdepth 0 -perm /022)" ]; then
        echo "$TRITON_CACHE_DIR is not a folder that you alone can write to, and what is in it is run: remove it," \
            "have its owner remove it, or set TRITON_CACHE_DIR to a folder of yours and compile kernels there" >&2
        exit 2
    fi
    (umask 022 && tar -xz --no-same-owner --no-same-permissions -f "$carry" -C "${TRITON_CACHE_DIR%/*}") ||
        echo "$carry could not be unpacked: kernels are compiled here" >&2
fi

"$python" -m fastreg_benchmarks.gpu ${OUT:+--out "$OUT"} "$@"
