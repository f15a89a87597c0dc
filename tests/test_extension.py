"""The compiled libraries: what they ask of a machine, and what is said when they do not load."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcn_plugin import _extension, collect_env

PACKAGE = Path(_extension.__file__).parent


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Point the loader at libraries in tmp_path instead of the package's."""
    for name in ("CPU_LIBRARY", "CUDA_LIBRARY", "BUILD_INFO"):
        monkeypatch.setattr(_extension, name, tmp_path / getattr(_extension, name).name)
    return tmp_path


def failure() -> str:
    with pytest.raises(_extension.ExtensionError) as raised:
        _extension.load.__wrapped__()
    return str(raised.value)


def test_loaded_and_described():
    _extension.load()
    info = _extension.info()
    assert info["version"] == _extension.__version__
    assert _extension.cuda_built() == (info["cuda"] is not None)
    assert (info["cuda"] is None) == bool(info["without_cuda_because"])


def test_cuda_library_is_built_where_nvcc_fits():
    """CI compiles the CUDA code whenever it can: a build that left it out has to have a reason."""
    if not _extension.cuda_built():
        assert re.search("nvcc|CUDA", _extension.info()["without_cuda_because"])


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
@pytest.mark.parametrize("library", [_extension.CPU_LIBRARY, _extension.CUDA_LIBRARY], ids=["cpu", "cuda"])
def test_library_asks_only_for_torch_and_the_system(library):
    """No Python symbol, no path of the machine that built it, no version of CUDA's runtime: hence one file for all."""
    if not library.is_file():
        pytest.skip("CUDA was not built")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert not re.search("RPATH|RUNPATH", dynamic)
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    system = {
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "libc.so.6",
        "libdl.so.2",
        "librt.so.1",
        "libpthread.so.0",
    }
    ours = {"libtorch_cpu.so", "libtorch_cuda.so"} if library == _extension.CUDA_LIBRARY else {"libtorch_cpu.so"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= system | ours
    symbols = subprocess.run(
        ["readelf", "--dyn-syms", "-W", library], capture_output=True, text=True, check=True
    ).stdout
    undefined = re.findall(r"UND (\S+)", symbols)
    assert not [name for name in undefined if re.match(r"_?Py[A-Z_]", name)]
    # C++ symbols of torch would tie the file to one version of it; the stable ABI is C.
    assert not [name for name in undefined if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]


def test_missing_library(elsewhere):
    message = failure()
    assert str(elsewhere / "_C.so") in message and "not compiled" in message
    assert f"{shlex.quote(sys.executable)} -m pip install --no-build-isolation" in message


def test_damaged_library(elsewhere):
    (elsewhere / "_C.so").write_bytes(b"not a library")
    message = failure()
    assert "damaged, or was built for another kind of machine" in message and "To mend it" in message


def test_library_that_does_not_fit_torch(elsewhere):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source = elsewhere / "unfit.cpp"
    source.write_text('extern "C" int torch_of_the_far_future(); int unfit() { return torch_of_the_far_future(); }')
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", elsewhere / "_C.so"], check=True)
    info = {"torch": "9.9.9", "platform": "linux x86_64"}
    _extension.BUILD_INFO.write_text(json.dumps(info))
    message = failure()
    assert "does not fit the running torch" in message and "torch_of_the_far_future" in message
    assert "Built on torch 9.9.9" in message and f"running torch is {torch.__version__}" in message


@pytest.mark.parametrize(
    ("loader_says", "meaning"),
    [
        ("/lib/libc.so.6: version `GLIBC_2.99' not found (required by _C.so)", "built on a newer system"),
        ("libtorch_cuda.so: cannot open shared object file: No such file or directory", "does not contain the library"),
        ("_C.so: cannot open shared object file: Permission denied", "refuses the file"),
    ],
)
def test_loader_messages_are_explained(loader_says, meaning):
    message = _extension._explain(_extension.CPU_LIBRARY, OSError(loader_says))
    assert meaning in message and loader_says in message and "To mend it" in message


def test_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    message = failure()
    assert "needs torch 2.11 or newer, but torch 2.9.1+cpu is running" in message and "pip install -U" in message


def test_installed_package_is_told_to_install_again(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path / "site-packages" / "dcn_plugin")
    assert "--force-reinstall" in _extension.rebuild_command()
    assert _extension.rebuild_command(cuda=True).startswith("DCN_PLUGIN_CUDA=1 ")


@pytest.mark.parametrize("state", ["missing", "damaged"])
def test_cuda_library_that_does_not_load_leaves_the_cpu_alone(tmp_path, state):
    """In a process of its own, since the first call on a CUDA tensor is answered by a registration that stays."""
    package = shutil.copytree(PACKAGE, tmp_path / "dcn_plugin", ignore=shutil.ignore_patterns("_C_cuda.so"))
    if state == "damaged":
        (package / "_C_cuda.so").write_bytes(b"not a library")
    code = """
import torch
torch.version.cuda = "13.0"
import dcn_plugin
from dcn_plugin import _extension
assert _extension.__file__.startswith({place!r})
x, weight, offset = torch.ones(1, 2, 4, 4), torch.ones(2, 2, 1, 1), torch.zeros(1, 2, 4, 4)
dcn_plugin.ops.deform_conv2d(x, offset, weight).sum()
op, cuda = torch.ops.dcn_plugin.deform_conv2d.default, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    op.redispatch(cuda, x, offset, weight, None, None, [1, 1], [0, 0, 0, 0], [1, 1])
except RuntimeError as error:
    print(error)
"""
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    command = [sys.executable, "-c", code.format(place=str(tmp_path))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"missing": "without CUDA", "damaged": "damaged"}[state] in done.stdout
    assert "DCN_PLUGIN_CUDA=1" in done.stdout


def test_report_names_what_a_bug_report_needs():
    report = collect_env.report()
    for needed in ("dcn_plugin: 0.", "python: ", f"torch: {torch.__version__.split('+')[0]}", "timm: ", "compiler: "):
        assert needed in report
    for needed in (str(_extension.CPU_LIBRARY), "built cuda: ", "loaded: yes"):
        assert needed in report


BROKEN = {
    "operators": "operators failed: ExtensionError",
    "torch": "torch failed: ImportError: libtorch.so: cannot open",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_report_on_a_broken_installation(tmp_path, broken):
    """What does not depend on the broken part is told all the same: torch's own report needs torch to be whole."""
    shutil.copytree(PACKAGE, tmp_path / "dcn_plugin", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if broken == "torch":
        (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open')")
    command = [sys.executable, "-m", "dcn_plugin.collect_env"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=""))
    assert done.returncode == 0, done.stderr
    for told in (str(tmp_path), BROKEN[broken], f"torch: {torch.__version__.split('+')[0]}", "compiler: ", "python: "):
        assert told in done.stdout
