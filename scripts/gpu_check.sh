#!/usr/bin/env bash
# Checks the CUDA operators on this machine's GPU, in stages that are a call of their own each:
#
#   bash scripts/gpu_check.sh build       compiles for the GPU at hand; the other stages need it
#   bash scripts/gpu_check.sh tests       the tests that need a GPU: all of them with the portable kernels, then those that the
#                                         choice of kernels changes with the fused ones
#   bash scripts/gpu_check.sh bench       the benchmarks, also after failed tests
#   bash scripts/gpu_check.sh memcheck    compute-sanitizer on small problems, where it is installed
#   bash scripts/gpu_check.sh racecheck   the same for races in shared memory, on the fused kernels of 16-bit types
#   bash scripts/gpu_check.sh             all of them, in this order
#
# A stage takes at most GPU_CHECK_SECONDS (470), and may be run again. A second argument, or the only one if it is no stage,
# is the folder of results (default: benchmarks/results): gpu-check.log, to which every call adds, the tables (JSON,
# Markdown), and for each stage that tests failed-STAGE.txt, which has the name of each failed test as soon as it has
# failed, and running-STAGE.txt, the tests that an interrupted stage was in. The end tells what passed, failed or was left out.
# Exit status: 0 if all passed, 1 if something failed, 3 if nothing failed and something was left out.
#
# Needs no network and no virtual environment, only nvcc and a Python with torch, torchvision, timm, ninja and pytest (with
# pytest-xdist it is faster). PYTHON chooses the interpreter. docs/gpu-runbook.md says what to do with the results.
set -uo pipefail
case ${1:-} in
    build | tests | bench | memcheck | racecheck) stages=("$1") && shift ;;
    *) stages=(build tests bench memcheck racecheck) ;;
esac
out=${1:-$(dirname "${BASH_SOURCE[0]}")/../benchmarks/results}
out=$(mkdir -p "$out" && cd "$out" && pwd) || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
# torch.compile would start a pool of processes beside each of those that run tests.
export PYTHONPATH=.:scripts PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=1 PATH="$PATH:/usr/local/cuda/bin"
output=$(mktemp)
trap 'rm -f "$output"' EXIT
seconds=${GPU_CHECK_SECONDS:-470}
failed=0 skipped=0
summary=()

note() { # NAME VERDICT REMARK
    local line
    line=$(printf '%-24s %-8s %s' "$1" "$2" "$3")
    summary+=("$line")
    printf -- '--- %s\n' "$line"
    [ "$2" != FAILED ] || failed=1
    [ "$2" != skipped ] || skipped=1
}

# What a test that was stopped, or that ended its process, was.
running() {
    [ -n "${GPU_CHECK_RUNNING:-}" ] && [ -s "$GPU_CHECK_RUNNING" ] && echo "; in $(paste -sd ' ' "$GPU_CHECK_RUNNING")"
}

# step NAME SECONDS COMMAND...: run it, for so long at most, and note how it ended. Where it fails with a message that
# `unfit` matches, the machine is at fault: that counts as left out. `found` matches what a slow tool says of an error:
# stopped before it said so, it has not failed.
step() {
    local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) status last
    shift 2
    printf '\n=== %s\n' "$name"
    if ((left < 10)); then
        note "$name" skipped "no time was left"
        return 1
    fi
    ((limit < left)) || limit=$left
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$output"
    status=${PIPESTATUS[0]}
    last="$((SECONDS - begin)) s; $(grep -v '^[[:space:]]*$' "$output" | tail -n 1 | cut -c 1-160)"
    if ((status == 0)); then
        note "$name" passed "$last"
    elif [ -n "${unfit:-}" ] && grep -qE "$unfit" "$output"; then
        note "$name" skipped "$(grep -m 1 -E "$unfit" "$output" | cut -c 1-160)"
    elif ((status == 124 || status == 137)) && [ -n "${found:-}" ] && ! grep -qE "$found" "$output"; then
        note "$name" skipped "found nothing in $limit s, and was not done$(running)"
    elif ((status == 124 || status == 137)); then
        note "$name" FAILED "was stopped after $limit s$(running)"
    else
        note "$name" FAILED "$last$(running)"
    fi
    return "$status"
}

# For each stage that tests: where failed tests are named as they fail, and the one that runs (scripts/gpu_check_tests.py).
start_tests() { # STAGE
    export GPU_CHECK_FAILED="$out/failed-$1.txt" GPU_CHECK_RUNNING="$out/running-$1.txt"
    : >"$GPU_CHECK_FAILED"
    : >"$GPU_CHECK_RUNNING"
    # cuBLAS adds in a fixed order only with a workspace of fixed size.
    export CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=1
}

stage_build() {
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" scripts/gpu_capabilities.py)} DCN_PLUGIN_CUDA=1 \
        step build "$seconds" "$python" scripts/build_in_place.py &&
        step environment 60 "$python" -m dcn_plugin.collect_env
}

stage_tests() {
    local parallel=() kernels limit=$((seconds * 6 / 10))
    if "$python" -c 'import xdist' 2>/dev/null; then
        parallel=(-n "$("$python" -c 'import os; print(max(1, min(8, (os.cpu_count() or 1) // 2)))')")
    fi
    start_tests tests
    for kernels in portable fused; do
        step "tests, $kernels kernels" "$limit" env DCN_PLUGIN_CUDA_KERNELS="$kernels" GPU_CHECK_KERNELS="$kernels" \
            "$python" -m pytest -q -m cuda --tb=short --maxfail=100 -p no:cacheprovider -p gpu_check_tests \
            ${parallel[@]+"${parallel[@]}"} tests/ops tests/test_contracts.py tests/test_detection_models.py
        limit=$seconds
    done
}

sanitizer() { # TOOL TESTS OPTIONS...
    local tool=$1 chosen=$2
    local unfit='Device not supported|before first instrumented API call|nable to attach|Failed to (attach|connect)'
    local found='^========= +(Invalid|Misaligned|Out-of-range|(Error|Warning): (Race|Potential))|^FAILED'
    shift 2
    if ! command -v compute-sanitizer >/dev/null; then
        note "$tool" skipped "compute-sanitizer is not on PATH"
        return
    fi
    start_tests "$tool"
    # Each tensor is an allocation of its own, so that what lies beyond its end belongs to nobody.
    step "$tool" "$seconds" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" "$@" --kernel-name kns=3dcn --launch-timeout 0 --error-exitcode 99 \
        "$python" -m pytest -q -m cuda --tb=short -p no:cacheprovider -p gpu_check_tests tests/ops/test_cuda.py \
        -k "$chosen"
}

# Of 16-bit types one is enough: kernels differ in a conversion. `small` problems are of every operator, `tile_size` of
# every shape of the fused forward.
stage_memcheck() {
    local chosen='small and (channels_last and bfloat16 or NCHW and float32) and not float16-float32'
    sanitizer memcheck "$chosen or tile_size and channels_last and bfloat16" --report-api-errors no
}
stage_racecheck() {
    GPU_CHECK_KERNELS=fused sanitizer racecheck 'channels_last and bfloat16 and (small and real_sizes or tile_size)'
}

benchmark() { # FAMILY SECONDS OPTIONS...
    local family=$1 limit=$2
    shift 2
    step "benchmark $family${*:+ $*}" "$limit" \
        "$python" benchmarks/run.py --device cuda --family "$family" --out "$out" "$@"
}

stage_bench() {
    local status
    benchmark deform_conv2d $((seconds * 35 / 100))
    status=$?
    # The fused kernels may have broken the device for their process; the portable ones then still have figures.
    if ((status == 70)) && benchmark deform_conv2d $((seconds * 17 / 100)) --kernels portable; then
        rm -f "$out/deform_conv2d-cuda.md"
    fi
    benchmark ms_deform_attn $((seconds * 15 / 100))
    benchmark deform_aggregate2d $((seconds * 12 / 100))
    benchmark models $((seconds * 20 / 100))
    benchmark roi_pool $((seconds * 14 / 100))
}

check() {
    local stage about
    about=$("$python" scripts/gpu_capabilities.py --describe) || return 1
    printf '\n##### %s: %s\n' "$(date -u '+%Y-%m-%d %H:%M UTC')" "${stages[*]}"
    printf '%s; %s; %s\n' "$about" "$(nvcc --version 2>&1 | grep -o 'release.*' || echo 'no nvcc')" \
        "commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
    trap 'note "${stage:-start}" FAILED "was interrupted$(running)"; tell; exit 130' INT TERM
    for stage in "${stages[@]}"; do
        deadline=$((SECONDS + seconds))
        if [ "$stage" != build ] && ! "$python" scripts/gpu_capabilities.py --built; then
            note "$stage" FAILED "the operators are not built for this GPU"
            continue
        fi
        "stage_$stage"
    done
    tell
    ((failed == 0)) || return 1
    ((skipped == 0)) || return 3
}

tell() {
    printf '\n=== summary of %s: %s\n' "${stages[*]}" "$about"
    printf '%s\n' ${summary[@]+"${summary[@]}"}
}

check 2>&1 | tee -a "$out/gpu-check.log"
exit "${PIPESTATUS[0]}"
