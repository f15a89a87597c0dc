"""Linking for systems whose C library is older than this one's, as wheels for everybody need.

What a library asks of glibc depends on the files that it is linked with. ziglang (PyPI) carries stand-ins for those of
every version, without code; everything else is done by the usual compiler, so that the code is that of any other build.
The C++ library goes inside, as older systems lack what is new in it: only C symbols cross the stable ABI.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .find import Compiler, fail, output_of

# In the order of the linker: the C library, which calls for the rest where something asks for it.
_LIBC = "GROUP ( libc.so.6 {rest} AS_NEEDED ( libpthread.so.0 libdl.so.2 librt.so.1 {loader} ) )\n"
# The C++ library asks whether there are other threads, of a C library that can tell. An older one cannot: assume so.
_SINGLE_THREADED = 'char __libc_single_threaded __attribute__((visibility("hidden"))) = 0;\n'


def oldest_glibc() -> str | None:
    """Return the version of glibc that a build is for: DCN_PLUGIN_GLIBC, such as 2.28; None: this machine's."""
    version = os.environ.get("DCN_PLUGIN_GLIBC") or None
    if version is not None and not re.fullmatch(r"2\.[0-9]+", version):
        fail(f"DCN_PLUGIN_GLIBC is '{version}', which is no version of glibc.", "write e.g. DCN_PLUGIN_GLIBC=2.28.")
    return version


def wheel_platform(machine: str) -> str | None:
    """Return the platform tag of such a build's wheel."""
    version = oldest_glibc()
    return version and f"manylinux_{version.replace('.', '_')}_{machine}"


def link_flags(folder: Path, compiler: Compiler) -> list[str]:
    """Return what the compiler's command for linking needs, after the objects; nothing for this machine's glibc."""
    version = oldest_glibc()
    if version is None:
        return []
    place = folder / f"glibc-{version}"
    if not (place / "libc.so").exists():
        _stand_ins(place, version, compiler)
    return ["-static-libstdc++", "-Wl,--gc-sections", "-Wl,--exclude-libs,ALL", f"-L{place}", str(place / "single.o")]


def _stand_ins(place: Path, version: str, compiler: Compiler) -> None:
    machine, made = platform.machine(), place.with_name(f"{place.name}.new")
    names = _loader(machine)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    (made / "single.c").write_text(_SINGLE_THREADED)
    single = [str(made / "single.c"), "-o", str(made / "single.o")]
    subprocess.run([*compiler.command, "-x", "c", "-O2", "-fPIC", "-c", *single], check=True)
    # It writes its stand-ins to its cache as it links for the first time.
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{version}"]
    caches = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), str(made / "cache"))
    environment = {**os.environ, **caches, "PYTHONPATH": os.environ.get("DCN_PLUGIN_ZIG", "")}
    command = [*zig, "-shared", str(made / "single.o"), "-o", str(made / "empty.so")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        fail(f"ziglang says: {said}", f"`{sys.executable} -m pip install ziglang`, or unset DCN_PLUGIN_GLIBC.")
    for file in (made / "cache").glob("o/*/lib*.so.*"):
        shutil.copy2(file, made)
    shutil.rmtree(made / "cache")
    loader, rest = (output_of([*compiler.command, f"-print-file-name={name}"]) for name in names)
    (made / "libc.so").write_text(_LIBC.format(loader=(loader or "").strip(), rest=(rest or "").strip()))
    (made / "libm.so").write_text("GROUP ( libm.so.6 )\n")
    shutil.rmtree(place, ignore_errors=True)
    made.rename(place)


def _loader(machine: str) -> tuple[str, str]:
    """Return the name of the dynamic loader, and of what every version of glibc puts into programs themselves."""
    loaders = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
    if machine not in loaders:
        fail(f"DCN_PLUGIN_GLIBC is for {' and '.join(loaders)}, and this machine is {machine}.", "unset it.")
    return loaders[machine], "libc_nonshared.a"
