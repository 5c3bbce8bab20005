#!/bin/sh
# Everything that needs an NVIDIA GPU, in under eight minutes and without a network: `make gpu`.
#
#     build      the extension in place, for this machine's processor alone
#     tests      every Triton and CUDA kernel on the GPU against float64, and tensors of more than 2^31 elements
#     hopper     the same of attention's forward in CUDA for Hopper, which is off unless it is asked for
#     sanitizer  compute-sanitizer's memcheck and racecheck over small cases
#     benchmarks against the other ways to compute the same; full sizes, each checked against float64 before it is timed;
#                with that kernel once more (hopper.md), where its tests have passed
#
# Results go to benchmarks/results/<device>/: JSON, tables, charts, and the logs of the first three steps. A step that fails
# does not keep the others from running; the exit status is that of all of them.
#
# PYTHON is an interpreter that has a torch for GPUs, triton, pytest, hypothesis, pybind11, ninja, rich and matplotlib.
# SECONDS_A_CASE (0.3) is the time spent on timing a case.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

device=$("$python" -c "
import torch
assert torch.cuda.is_available(), 'torch finds no GPU'
print(torch.cuda.get_device_name().lower().replace(' ', '-'))") || exit 1
results=benchmarks/results/$device
mkdir -p "$results"
failed=""

step() { # step NAME COMMAND…: runs it into a log, and remembers a failure
    name=$1
    shift
    begin=$(date +%s)
    if "$@" >"$results/$name.log" 2>&1; then outcome=passed; else outcome=FAILED failed="$failed $name"; fi
    echo "$name: $outcome in $(($(date +%s) - begin)) s; $(tail -n 1 "$results/$name.log")"
}

# Several processes compile kernels at once where pytest-xdist is there.
parallel=$("$python" -c "import xdist; print('-n 8')" 2>/dev/null)

step build env FASTATTN_CPU_ISAS="$("$python" -c "
flags = open('/proc/cpuinfo').read()
print('avx512,avx512_bf16,amx' if 'amx_bf16' in flags else 'avx512,avx512_bf16' if 'avx512_bf16' in flags else 'avx512' if 'avx512bw' in flags else 'avx2')")" \
    "$python" setup.py -q build_ext --inplace

# shellcheck disable=SC2086
step tests env FASTATTN_TEST_EXAMPLES="${FASTATTN_TEST_EXAMPLES:-10}" "$python" -m pytest -q -p no:cacheprovider $parallel \
    tests/test_gpu.py tests/test_triton_*.py tests/test_cuda_*.py --deselect tests/test_triton_budgets.py

# A barrier that is never reached would hang: hence the time limit.
hopper() { env FASTATTN_HOPPER_ATTENTION=1 timeout 90 "$@"; }
step hopper hopper "$python" -m pytest -q -x -p no:cacheprovider tests/test_cuda_attention.py

for tool in memcheck racecheck; do
    # Without torch's caching, an access beyond a tensor leaves its allocation, and memcheck sees it.
    step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTATTN_TEST_EXAMPLES=1 timeout 120 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "$python" -m pytest -q -x -p no:cacheprovider tests/test_triton_norms.py tests/test_cuda_norms.py \
        tests/test_cuda_attention_with_kvcache.py -k numerics_rule
done

benchmark() { # benchmark NAME OP…: no OP for all of them
    name=$1
    shift
    "$python" -m fastattn bench "$@" --device cuda --seconds "${SECONDS_A_CASE:-0.3}" \
        --json "$results/$name.json" --markdown "$results/$name.md" --plot "$results/charts/$name" || failed="$failed $name"
}
begin=$(date +%s)
benchmark results
case "$failed" in *hopper*) ;; *) FASTATTN_HOPPER_ATTENTION=1 benchmark hopper attention ;; esac
echo "benchmarks: $(($(date +%s) - begin)) s; $results/results.md"

if [ -n "$failed" ]; then
    echo "failed:$failed" >&2
    exit 1
fi
