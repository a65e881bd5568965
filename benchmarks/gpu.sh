#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most nine minutes, with no network and nothing installed:
# the tests on the device, compute-sanitizer, the benchmarks, and what they look like.
#
#   benchmarks/gpu.sh          on a machine with a GPU, torch and triton
#   benchmarks/gpu.sh --dry    anywhere: every step, in Triton's interpreter and on the CPU
#
# OUT=folder      where results go: at most eight files (benchmarks/results/gpu)
# PEERS=folder    wheels of the libraries to compare with
# PYTHON=python3  the interpreter that has torch
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 2

dry=
case "${1-}" in
    '') ;;
    --dry) dry=1 ;;
    *) echo "usage: benchmarks/gpu.sh [--dry]; got '$1'" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$PWD/benchmarks" "$site/fastreg_benchmarks" # the name under which it is installed elsewhere
export PYTHONPATH="$site:$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "${PEERS-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$PEERS"/*.whl ||
        echo "the wheels in $PEERS could not be installed: those libraries are left out" >&2
fi

if [ -z "$dry" ]; then
    "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
        { echo "no GPU that torch can use; benchmarks/gpu.sh --dry runs without one" >&2; exit 2; }
    unset TRITON_INTERPRET
    tests=(env FASTREG_TEST_DEVICE=cuda "$python" -m pytest -q -n 8 -p no:cacheprovider tests/kernels
        tests/nn/test_ops.py tests/nn/test_noise.py tests/nn/test_dropout.py tests/nn/test_fused.py tests/optim/test_gpu.py tests/test_random.py tests/benchmarks/test_audit.py)
    chosen=(clip+noise+AdamW+EMA SGD-momentum dropout noise adversarial penalty private ghost)
    suites=(--quick)
else
    tests=(env FASTREG_TEST_DEVICE=cpu TRITON_INTERPRET=1 "$python" -m pytest -q -p no:cacheprovider
        tests/kernels/test_norm.py tests/nn/test_drop_path.py tests/optim/test_gpu.py)
    chosen=(SGD-momentum dropout)
    suites=(--quick --device cpu --suite norm,host)
fi

failed=()
# step NAME SECONDS COMMAND...: run it, keep its output, carry on if it fails.  Interrupted at its limit, so that
# what was measured until then is kept.
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    echo "== $name"
    timeout -s INT -k 10 "$limit" "$@" >"$site/log" 2>&1
    status=$?
    { echo "== $name: exit status $status after $((SECONDS - start)) s"; cat "$site/log"; } >>"$out/log.txt"
    tail -n 15 "$site/log"
    [ $status -eq 0 ] || failed+=("$name ($status)")
}
# sanitize TOOL: the kernels under one of compute-sanitizer's tools; in the dry mode without it.
sanitize() {
    local under=(compute-sanitizer --tool "$1" --error-exitcode 9)
    [ -z "$dry" ] || under=(env TRITON_INTERPRET=1)
    step "$1" 75 "${under[@]}" "$python" -m fastreg_benchmarks.sanitize "${chosen[@]}"
}

: >"$out/log.txt"
[ -n "$dry" ] || step device 10 nvidia-smi
step benchmarks 240 "$python" -m fastreg.cli bench "${suites[@]}" --out "$out"
step tests 130 "${tests[@]}"
sanitize memcheck
sanitize racecheck
step render 30 "$python" -m fastreg_benchmarks.render --only "$out"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" | tee -a "$out/log.txt"
    exit 1
fi
echo "all passed; results in $out" | tee -a "$out/log.txt"
