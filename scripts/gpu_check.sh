#!/usr/bin/env bash
# Checks the CUDA operators on this machine's GPU: compiles for it, runs the tests that need one with the portable and with
# the fused kernels, compute-sanitizer where it is installed, and the benchmarks, also after failed tests. The end tells
# what passed, failed or was left out. `bash scripts/gpu_check.sh OUT` writes the tables (JSON, Markdown) and
# gpu-check.log to the folder OUT (default: benchmarks/results).
# Needs no network and no virtual environment, only nvcc and a Python with torch, torchvision, timm, setuptools, ninja and
# pytest (with pytest-xdist it is faster). PYTHON chooses the interpreter, GPU_CHECK_SECONDS how long it may take (470).
set -uo pipefail
out=${1:-$(dirname "${BASH_SOURCE[0]}")/../benchmarks/results}
out=$(mkdir -p "$out" && cd "$out" && pwd) || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
# torch.compile would start a pool of processes beside each of those that run tests.
export PYTHONPATH=. PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=1 PATH="$PATH:/usr/local/cuda/bin"
deadline=${GPU_CHECK_SECONDS:-470}
output=$(mktemp)
trap 'rm -f "$output"' EXIT
failed=0
summary=()

note() { # NAME VERDICT REMARK
    summary+=("$(printf '%-24s %-8s %s' "$1" "$2" "$3")")
    [ "$2" != FAILED ] || failed=1
}

# stage NAME SECONDS COMMAND...: run it, for so long at most, and note how it ended. Where it fails with a message that
# `unfit` matches, the machine is at fault: that counts as left out. `found` matches what a slow tool says of an error:
# stopped before it said so, it has not failed.
stage() {
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
        note "$name" skipped "found nothing in $limit s, and was not done"
    elif ((status == 124 || status == 137)); then
        note "$name" FAILED "was stopped after $limit s"
    else
        note "$name" FAILED "$last"
    fi
    return "$status"
}

tests() { # NAME SECONDS KERNELS OTHERS
    # cuBLAS adds in a fixed order only with a workspace of fixed size.
    stage "$1" "$2" env DCN_PLUGIN_CUDA_KERNELS="$3" CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=1 \
        "$python" -m pytest -q -m cuda -k "not kernels_$4" --tb=short --maxfail=100 -p no:cacheprovider \
        ${parallel[@]+"${parallel[@]}"} tests/ops tests/test_contracts.py tests/test_detection_models.py
}

sanitizer() { # TOOL OPTIONS...
    local tool=$1
    local unfit='Device not supported|before first instrumented API call|nable to attach|Failed to (attach|connect)'
    local chosen='small and (channels_last and bfloat16 or NCHW and float32) and not float16-float32'
    chosen+=' or tile_size and channels_last and bfloat16'
    local found='^========= +(Invalid|Misaligned|Out-of-range|(Error|Warning): (Race|Potential))|^FAILED'
    shift
    if ! command -v compute-sanitizer >/dev/null; then
        note "$tool" skipped "compute-sanitizer is not on PATH"
        return
    fi
    # Each tensor is an allocation of its own, so that what lies beyond its end belongs to nobody.
    stage "$tool" 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=1 \
        compute-sanitizer --tool "$tool" "$@" --kernel-name kns=3dcn --launch-timeout 0 --error-exitcode 99 \
        "$python" -m pytest -q -m cuda --tb=short -p no:cacheprovider tests/ops/test_cuda.py \
        -k "$chosen"
}

benchmark() { # FAMILY SECONDS OPTIONS...
    local family=$1 limit=$2
    shift 2
    stage "benchmark $family${*:+ $*}" "$limit" \
        "$python" benchmarks/run.py --device cuda --family "$family" --out "$out" "$@"
}

check() {
    local gpu status
    gpu=$("$python" scripts/gpu_capabilities.py) || return 1
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$gpu}
    parallel=()
    if "$python" -c 'import xdist' 2>/dev/null; then
        parallel=(-n "$("$python" -c 'import os; print(max(1, min(8, (os.cpu_count() or 1) // 2)))')")
    fi

    if stage build 200 env DCN_PLUGIN_CUDA=1 "$python" setup.py -q build_ext --inplace; then
        stage environment 60 "$python" -m dcn_plugin.collect_env
        tests "tests, portable kernels" 110 portable fused
        tests "tests, fused kernels" 110 fused portable
        sanitizer memcheck --report-api-errors no
        sanitizer racecheck
        benchmark deform_conv2d 140
        status=$?
        # The fused kernels may have broken the device for their process; the portable ones then still have figures.
        if ((status == 70)) && benchmark deform_conv2d 80 --kernels portable; then
            rm -f "$out/deform_conv2d-cuda.md"
        fi
        benchmark ms_deform_attn 60
        benchmark deform_aggregate2d 40
        benchmark models 80
        benchmark roi_pool 50
    fi

    printf '\n=== summary: %s, compiled for %s, %s s\n' "$("$python" -c 'import torch; print(torch.cuda.get_device_name())')" \
        "$TORCH_CUDA_ARCH_LIST" "$SECONDS"
    printf '%s\n' "${summary[@]}"
    return "$failed"
}

check 2>&1 | tee "$out/gpu-check.log"
exit "${PIPESTATUS[0]}"
