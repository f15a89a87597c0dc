#!/usr/bin/env bash
# Whether one built wheel serves other Pythons and other versions of torch. The wheel is built once, by PYTHON (default
# python3, with torch, setuptools, wheel and ninja). Its libraries may ask for torch's C interface, the C and the C++ library,
# nothing else. Then it is installed beside each given pair of Python and torch, where the tests of the operators run
# against it. Default: the floor on the oldest Python, and the tested torch on a newer one:
#     bash scripts/check_abi.sh 3.10:2.11.0 3.13:2.15.0
# WHEEL names one that is there already, as from scripts/wheel.sh; then nothing is built.
# Every environment is a download of torch, and is deleted afterwards. The interpreters (python3.10, ...) come from PATH;
# PYTHONS names folders to look in before, separated by colons. Everything made lies below build/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
builder=${PYTHON:-python3}
PATH="${PYTHONS:+$PYTHONS:}$PATH"
[ $# -gt 0 ] || set -- 3.10:2.11.0 3.13:2.15.0

fail() {
    printf '\n%s: %s\n  To mend it: %s\n' "${0##*/}" "$1" "$2" >&2
    exit 1
}

for pair in "$@"; do
    [[ $pair =~ ^3\.[0-9]+:[0-9]+\.[0-9]+ ]] || fail "'$pair' is no pair of versions." "write e.g. 3.10:2.11.0."
    "python${pair%%:*}" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "python${pair%%:*} does not run, or comes without venv." "install it, or name its folder in PYTHONS."
done
command -v readelf >/dev/null || fail "there is no readelf on PATH." "install binutils."

work=$(mkdir -p build && mktemp -d "$root/build/abi.XXXXXX")
trap 'rm -rf "$work"' EXIT

if [ -n "${WHEEL:-}" ]; then
    [ -f "$WHEEL" ] || fail "WHEEL is '$WHEEL', which is no file." "name one, or unset it to build."
    cp "$WHEEL" "$work/"
else
    echo "== building the wheel ($("$builder" -c 'import platform, torch; print("Python", platform.python_version() + ", torch", torch.__version__)'))"
    "$builder" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" .
fi
wheel=$(echo "$work"/*.whl)
"$builder" -m zipfile -e "$wheel" "$work/content"

# What a library leaves for others to define, without the symbols that carry a version of glibc, libstdc++ or libgcc.
foreign_symbols() {
    readelf --dyn-syms -W "$1" |
        awk '$7 == "UND" && $5 != "WEAK" && $8 != "" && $8 !~ /@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$/ { print $8 }' | sort -u
}
newest() { readelf --dyn-syms -W "$1" | grep -oE "@$2_[0-9.]+" | cut -d_ -f2 | sort -uV | tail -1 | grep . || echo inside; }
for library in "$work"/content/dcn_plugin/_C*.so; do
    foreign_symbols "$library" >"$work/symbols"
    [ -s "$work/symbols" ] || fail "${library##*/} asks nothing of torch, which cannot be." "see whether readelf can read it."
    if unstable=$(grep -vE '^(aoti_torch_|torch_)[a-z0-9_]+$' "$work/symbols"); then
        fail "${library##*/} asks for symbols outside torch's stable C interface:"$'\n'"$unstable" "see rule 4 of CONTRIBUTING.md."
    fi
    echo "   ${library##*/}: $(wc -l <"$work/symbols") symbols of torch's C interface;" \
        "glibc $(newest "$library" GLIBC) or newer, libstdc++ $(newest "$library" GLIBCXX)"
done

# The tests lie apart from the sources, so that the installed package is what they import. Left out: what reads the
# sources, and the kernels that are compiled for the tests.
mkdir "$work/checked"
cp -r tests pyproject.toml "$work/checked/"
rm -rf "$work"/checked/tests/emulation "$work"/checked/tests/ops/test_emulated_*.py
sum_of() { sha256sum "$1" | cut -d' ' -f1; }
built=$(sum_of "$work/content/dcn_plugin/_C.so")

check() { # PYTHON TORCH
    local venv=$work/venv python=$work/venv/bin/python found
    rm -rf "$venv"
    "python$1" -m venv "$venv" || return
    "$python" -m pip install --quiet "torch==$2" "numpy" "pytest>=8" "hypothesis" "setuptools" || return
    "$python" -m pip install --quiet --no-deps --no-index "$wheel" || return
    cd "$work/checked" || return
    "$python" "$root/scripts/check_abi_wheel.py" || return
    found=$(sum_of "$("$python" -c 'from dcn_plugin import _extension; print(_extension.CPU_LIBRARY)')") || return
    [ "$found" = "$built" ] || { echo "   _C.so is another file: $found" && return 1; }
    "$python" -m pytest -q -p no:cacheprovider tests/ops tests/test_contracts.py tests/fuzz
}

failed=()
for pair in "$@"; do
    echo "== Python ${pair%%:*}, torch ${pair#*:}"
    (check "${pair%%:*}" "${pair#*:}") || failed+=("$pair")
done
[ ${#failed[@]} -eq 0 ] || fail "the wheel fails with ${failed[*]}." "see above."
echo "== one _C.so, sha256 $built, serves $*"
