# Sourced by quickstart.sh and test.sh: the virtual environment .venv with the tested versions (the group `tested` of
# pyproject.toml) and the compiled operators. What is up to date already is left alone. Afterwards the working
# directory is the repository's root and `python` is the environment's.
#
# PYTHON chooses the interpreter; DCN_PLUGIN_VENV the folder; WHEEL a wheel whose libraries are taken, so that nothing is compiled;
# what scripts/toolchain reads (DCN_PLUGIN_CUDA, CXX, ...) holds too.
# shellcheck shell=bash

fail() {
    printf '\n%s: %s\n  To mend it: %s\n' "${0##*/}" "$1" "$2" >&2
    exit 1
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
unset PYTHONHOME PYTHONPATH # either would bring packages of another Python into the environment
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0

recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null 2>&1 || fail "PYTHON is '$PYTHON', which does not exist." "set it to a Python >= 3.10."
        recent_enough "$PYTHON" || fail "PYTHON is '$PYTHON', which is not a Python >= 3.10." "set it to one."
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if recent_enough "$candidate"; then
            PYTHON=$candidate
            return
        fi
    done
    fail "no Python >= 3.10 was found (python3, python3.10 ... python3.14)." \
        "install one (Debian, Ubuntu: 'apt install python3 python3-venv'), or set PYTHON to it."
}

find_compiler() {
    local candidate
    [ -z "${WHEEL:-}" ] || return 0 # which holds what would be compiled
    for candidate in ${CXX:-c++ g++ clang++}; do
        if command -v "$candidate" >/dev/null 2>&1; then return; fi
    done
    fail "no C++ compiler was found (${CXX:-c++, g++, clang++})." \
        "install one (Debian, Ubuntu: 'apt install g++'; Fedora: 'dnf install gcc-c++'; macOS: 'xcode-select --install'), or set CXX to it."
}

# What the environment was made from: it is made anew when this changes.
fingerprint() {
    local python
    python=$("$1" -c 'import sys, sysconfig; print(sys.version_info[:3], sysconfig.get_platform())') || return
    echo "$PWD $python $(cksum <pyproject.toml)"
}

make_environment() {
    local venv=$1 quiet=()
    "$PYTHON" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        fail "$PYTHON comes without the modules venv and ensurepip." \
            "install them (Debian, Ubuntu: 'apt install python3-venv'), or set PYTHON to a complete Python."
    if [ ! -x "$venv/bin/python" ] || [ "$(python_of "$venv/bin/python")" != "$(python_of "$PYTHON")" ]; then
        echo "Making the virtual environment $venv ..."
        "$PYTHON" -m venv --clear "$venv" || fail "the virtual environment could not be made." "see the message above."
    fi
    [ -t 1 ] || quiet=(-qq) # progress bars are for people
    echo "Installing the tested versions of torch, timm, mmengine, lightning, ... (the first time, about 3 GB of downloads) ..."
    # The pip that comes with Python 3.10 to 3.12 does not know dependency groups.
    "$venv/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --upgrade 'pip>=25.1' &&
        "$venv/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --group tested ||
        fail "pip could not install the packages." "see its message above; then run this command again, it goes on from there."
}

python_of() { "$1" -c 'import sys; print(sys.version_info[:3])' 2>/dev/null; }

# A library for the GPU at hand compiles in a fraction of the time that one for every GPU takes. Without a GPU, one
# architecture shows that the code compiles.
choose_architectures() {
    local found
    [ -z "${TORCH_CUDA_ARCH_LIST:-}" ] || return 0
    found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd ';' -) || found=""
    export TORCH_CUDA_ARCH_LIST="${found:-8.0+PTX}"
}

prepare() {
    local venv=${DCN_PLUGIN_VENV:-.venv} stamp
    find_python
    find_compiler
    stamp=$(fingerprint "$PYTHON") || fail "$PYTHON does not run." "set PYTHON to a working Python >= 3.10."
    if [ "$(cat "$venv/dcn_plugin.stamp" 2>/dev/null)" != "$stamp" ] || ! recent_enough "$venv/bin/python"; then
        make_environment "$venv"
    fi
    venv=$(cd "$venv" && pwd)
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
    choose_architectures
    python setup.py -q build_ext --inplace || exit
    if [ "$(cat "$venv/dcn_plugin.stamp" 2>/dev/null)" != "$stamp" ]; then
        python -m pip install --quiet --no-build-isolation --no-deps -e . ||
            fail "pip could not install dcn_plugin into $venv." "see its message above."
        echo "$stamp" >"$venv/dcn_plugin.stamp"
    fi
}

prepare
