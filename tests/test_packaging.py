"""Building and installing: what sdist and wheel hold, one statement of each version, and plain words on failure."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from packaging.requirements import Requirement
from toolchain import ROOT, TORCH_FLOOR, gencode, glibc, wheel_platform

from dcn_plugin import _extension

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COPIED = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "csrc", "dcn_plugin", "scripts")
PYTHON = ("dcn_plugin", "scripts/toolchain")
PAGE = ("explore.css", "explore.html", "explore.js", "points.js")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a build reads, in a place whose name asks for quoting."""
    copy = tmp_path / "a $place with: spaces"
    copy.mkdir()
    ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


def run(command, cwd, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def backend(hook, cwd, out, **environment):
    """Call the build backend as pip does; return what it made."""
    code = f"from setuptools import build_meta; print('made:', build_meta.{hook}({str(out)!r}))"
    done = run([sys.executable, "-c", code], cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / re.findall("made: (.+)", done.stdout)[0]


def test_floor_of_torch_is_stated_once():
    """In pyproject.toml's dependencies; the build reads it there, and the libraries carry it along."""
    (floor,) = map(Requirement, PYPROJECT["project"]["dependencies"])
    assert str(floor) == f"torch>={TORCH_FLOOR[0]}.{TORCH_FLOOR[1]}"
    assert _extension.info()["torch_floor"] == next(iter(floor.specifier)).version
    assert "torch" in PYPROJECT["build-system"]["requires"]  # whose age the toolchain judges
    again = re.compile(rf"(torch|FLOOR)\W+{TORCH_FLOOR[0]}\W+{TORCH_FLOOR[1]}\b")
    for path in (ROOT / "setup.py", *(ROOT / "scripts").rglob("*.*"), *(ROOT / "dcn_plugin").rglob("*.py")):
        assert path.suffix not in (".py", ".sh") or not again.search(path.read_text()), path


def test_floor_of_torch_is_what_the_oldest_python_tests():
    pins = [Requirement(pin) for pin in PYPROJECT["dependency-groups"]["tested"]]
    old, new = (
        next(next(iter(pin.specifier)).version for pin in pins if pin.name == "torch" and pin.marker.evaluate(python))
        for python in ({"python_version": "3.10"}, {"python_version": "3.13"})
    )
    assert tuple(map(int, old.split(".")[:2])) == TORCH_FLOOR
    assert f"set -- 3.10:{old} 3.13:{new}\n" in (ROOT / "scripts/check_abi.sh").read_text()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_tested_versions_are_exact_and_above_the_floors(python):
    pins = {}
    for pin in map(Requirement, PYPROJECT["dependency-groups"]["tested"]):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name not in pins and [s.operator for s in pin.specifier] == ["=="], f"{pin} on {python}"
            pins[pin.name] = next(iter(pin.specifier)).version
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *PYPROJECT["build-system"]["requires"]]
    # Tools, and the peers of the benchmarks, are not part of what works together.
    apart = ("dev", "benchmark")
    wanted += [
        need for extra, needs in project["optional-dependencies"].items() if extra not in apart for need in needs
    ]
    for need in map(Requirement, wanted):
        wanted_here = need.marker is None or need.marker.evaluate({"python_version": python})
        if need.name != "dcn_plugin" and wanted_here:
            assert need.name in pins, f"{need.name} is not in the group tested"
            assert need.specifier.contains(pins[need.name]), f"{need} but {pins[need.name]} is tested"


def test_architectures():
    listed, flags = gencode("", ["75", "80", "86", "89", "90", "100", "103", "110", "120", "121"])
    assert listed == ["7.5", "8.0", "9.0", "10.0", "11.0", "12.0+PTX"]
    assert (
        flags[0] == "-gencode=arch=compute_75,code=sm_75" and flags[-1] == "-gencode=arch=compute_120,code=compute_120"
    )
    assert gencode("", ["50", "75", "80", "90"])[0] == ["7.5", "8.0", "9.0+PTX"]
    listed, flags = gencode("8.0; 9.0a+PTX", ["80", "90"])
    assert listed == ["8.0", "9.0a+PTX"]
    assert [flag.rpartition("=")[2] for flag in flags] == ["sm_80", "sm_90a", "compute_90a"]
    for wrong in ("13.7", "sm_80", "8"):
        with pytest.raises(ValueError, match=f"TORCH_CUDA_ARCH_LIST holds '{wrong}'.*8.0, 12.0"):
            gencode(wrong, ["80", "120"])


def test_sdist_holds_the_sources(checkout, tmp_path):
    with tarfile.open(backend("build_sdist", checkout, tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    python = {str(path.relative_to(ROOT)) for part in PYTHON for path in (ROOT / part).rglob("*.py")}
    page = {f"dcn_plugin/visualize/page/{name}" for name in PAGE}
    assert sources | python | page | {"setup.py", "pyproject.toml", "LICENSE", "dcn_plugin/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.json"))]


def test_wheel_from_the_sdist_works(checkout, tmp_path):
    """Compiled without optimisation and CUDA, for speed; imported by a process that sees nothing else of ours."""
    with tarfile.open(backend("build_sdist", checkout, tmp_path)) as archive:
        top = archive.getnames()[0].split("/")[0]
        archive.extractall(checkout, filter="data")
    environment = {"DCN_PLUGIN_CUDA": "0", "CXXFLAGS": "-O0", "MAX_JOBS": "2"}
    wheel = backend("build_wheel", checkout / top, tmp_path, **environment)
    assert re.fullmatch(r"dcn_plugin-[\d.]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    held = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert {"dcn_plugin/_C.so", "dcn_plugin/_build_info.json", "dcn_plugin/py.typed"} <= held
    assert {f"dcn_plugin/visualize/page/{name}" for name in PAGE} <= held
    assert "dcn_plugin/_C_cuda.so" not in held and {name.split("/")[0].split("-")[0] for name in held} == {"dcn_plugin"}
    info = json.loads((site / "dcn_plugin/_build_info.json").read_text())
    assert info["torch"] == torch.__version__ and info["cuda"] is None
    assert info["without_cuda_because"] == "DCN_PLUGIN_CUDA=0"
    code = """
import torch, dcn_plugin
x, weight, offset = torch.rand(1, 2, 5, 5), torch.rand(3, 2, 3, 3), torch.zeros(1, 18, 3, 3)
torch.testing.assert_close(dcn_plugin.ops.deform_conv2d(x, offset, weight), torch.nn.functional.conv2d(x, weight))
print(dcn_plugin.__file__)
"""
    done = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))


# setup.py run as pip runs it, in an environment that lacks the modules named.
WITHOUT = """
import importlib.util as util, runpy, sys
find = util.find_spec
util.find_spec = lambda name, *package: None if name in {without!r} else find(name, *package)
sys.argv = ["setup.py", *{arguments!r}]
runpy.run_path("setup.py", run_name="__main__")
"""


def failing_build(cwd, arguments, without=(), **environment):
    code = WITHOUT.format(without=without, arguments=arguments)
    done = run([sys.executable, "-c", code], cwd, **environment)
    assert done.returncode != 0
    message = done.stderr + done.stdout
    assert "dcn_plugin cannot be built: " in message and "To mend it: " in message and "Traceback" not in message
    return message


METADATA = ["-q", "dist_info"]
BUILD = ["-q", "build_ext"]


def test_without_torch(checkout):
    message = failing_build(checkout, METADATA, without=("torch",))
    assert "torch is not installed" in message and "pip install 'torch>=2.11'" in message


def fake_torch(folder, version, cuda):
    package = folder / "site" / "torch"
    (package / "include/torch/csrc/stable").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('only looked at')")
    (package / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return str(package.parent)


def test_torch_too_old(checkout, tmp_path):
    message = failing_build(checkout, METADATA, PYTHONPATH=fake_torch(tmp_path, "2.9.1+cpu", None))
    assert "torch 2.9.1+cpu is installed, but 2.11 or newer is needed" in message


@pytest.mark.parametrize("compiler", [{"CXX": "/nowhere/c++"}, {"PATH": "", "CXX": ""}], ids=["CXX", "PATH"])
def test_without_compiler(checkout, compiler):
    message = failing_build(checkout, METADATA, **compiler)
    assert (
        "CXX is '/nowhere/c++'" if compiler["CXX"] else "no C++ compiler"
    ) in message and "apt install g++" in message


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA is built on Linux only")
def test_cuda_of_another_major(checkout, tmp_path):
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.1'\n")
    nvcc.chmod(0o755)
    environment = {"PYTHONPATH": fake_torch(tmp_path, "2.12.0+cu130", "13.0"), "CUDA_HOME": str(toolkit)}
    message = failing_build(checkout, BUILD, DCN_PLUGIN_CUDA="1", **environment)
    assert "nvcc is CUDA 12.4 while torch 2.12.0+cu130 was built for CUDA 13.0" in message


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DCN_PLUGIN_CUDA": "1", "CUDA_HOME": "/nowhere"}, "CUDA_HOME is /nowhere, which holds no bin/nvcc"),
        ({"DCN_PLUGIN_CUDA": "yes"}, "DCN_PLUGIN_CUDA is 'yes'"),
    ],
)
def test_cuda_switch(checkout, environment, expected):
    if sys.platform != "linux" and "CUDA_HOME" in environment:
        pytest.skip("CUDA is built on Linux only")
    assert expected in failing_build(checkout, BUILD, **environment)


def test_without_sources(checkout):
    shutil.rmtree(checkout / "csrc")
    assert "there are no sources" in failing_build(checkout, BUILD, DCN_PLUGIN_CUDA="0")


def test_without_ninja(checkout):
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    message = failing_build(checkout, BUILD, without=("ninja",), PATH="", CXX=compiler, DCN_PLUGIN_CUDA="0")
    assert "ninja is not installed" in message and "pip install ninja" in message


def put_into_wheel(path, **changes):
    """A wheel with the libraries of this checkout, and what they say of themselves."""
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(_extension.CPU_LIBRARY, "dcn_plugin/_C.so")
        wheel.writestr("dcn_plugin/_build_info.json", json.dumps(_extension.info() | changes))
    return str(path)


INPLACE = ["setup.py", "-q", "build_ext", "--inplace"]


def test_libraries_of_a_wheel_are_taken_without_a_compiler(checkout, tmp_path):
    wheel = put_into_wheel(tmp_path / "some.whl")
    done = run([sys.executable, *INPLACE], checkout, WHEEL=wheel, CXX="/nowhere/c++", PATH="")
    assert done.returncode == 0, done.stderr
    assert (checkout / "dcn_plugin/_C.so").read_bytes() == _extension.CPU_LIBRARY.read_bytes()
    assert not (checkout / "dcn_plugin/_C_cuda.so").exists()
    (checkout / "csrc/core/sampling.h").write_text("// another\n")
    done = run([sys.executable, *INPLACE], checkout, WHEEL=wheel)
    assert done.returncode == 1 and "WHEEL: the sources of " in done.stderr and "unset WHEEL to compile" in done.stderr


@pytest.mark.parametrize(("name", "value"), [("version", "0.0.1"), ("platform", "linux riscv64"), ("sources", None)])
def test_a_wheel_that_does_not_fit_is_refused(checkout, tmp_path, name, value):
    wheel = put_into_wheel(tmp_path / "some.whl", **{name: value})
    done = run([sys.executable, *INPLACE], checkout, WHEEL=wheel)
    assert done.returncode == 1 and f"WHEEL: the {name} of {wheel} is {value}, and here " in done.stderr
    assert not (checkout / "dcn_plugin/_C.so").exists()


@pytest.mark.parametrize("content", [None, b"", b"text", "empty"])
def test_what_is_no_wheel_is_refused(checkout, tmp_path, content):
    path = tmp_path / "some.whl"
    if content == "empty":
        zipfile.ZipFile(path, "w").close()
    elif content is not None:
        path.write_bytes(content)
    done = run([sys.executable, *INPLACE], checkout, WHEEL=str(path))
    assert done.returncode == 1 and f"WHEEL: {path} is no wheel of dcn_plugin (" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("lost", ["_C.so", "_build_info.json", "names", "bytes"])
def test_a_wheel_with_a_part_missing_changes_nothing(checkout, tmp_path, lost):
    path = tmp_path / "some.whl"
    info = "[]" if lost == "names" else json.dumps(_extension.info())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in (("_C.so", b"library " * 99), ("_build_info.json", info)):
            if name != lost:
                wheel.writestr(f"dcn_plugin/{name}", content)
    if lost == "bytes":
        whole = bytearray(path.read_bytes())
        start = 30 + len("dcn_plugin/_C.so")
        whole[start : start + 8] = b"\xff" * 8
        path.write_bytes(whole)
    (checkout / "dcn_plugin/_C.so").write_bytes(b"before")
    done = run([sys.executable, *INPLACE], checkout, WHEEL=str(path))
    assert done.returncode == 1 and f"WHEEL: {path} is no wheel of dcn_plugin (" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert (checkout / "dcn_plugin/_C.so").read_bytes() == b"before"
    assert not (checkout / "dcn_plugin/_build_info.json").exists()


def test_libraries_for_another_glibc_get_no_name_that_promises_more(checkout, tmp_path):
    wheel = put_into_wheel(tmp_path / "some.whl", glibc=None)
    done = run([sys.executable, *INPLACE], checkout, WHEEL=wheel, DCN_PLUGIN_GLIBC="2.28")
    assert done.returncode == 1 and f"WHEEL: the glibc of {wheel} is None, and here 2.28 is needed" in done.stderr
    wheel = put_into_wheel(tmp_path / "some.whl", glibc="2.28")
    done = run([sys.executable, *INPLACE], checkout, WHEEL=wheel, DCN_PLUGIN_GLIBC="2.28")
    assert done.returncode == 0, done.stderr


def test_metadata_needs_no_compiler_where_a_wheel_has_the_libraries(checkout, tmp_path):
    place = tmp_path / "metadata"
    place.mkdir()
    where = dict(CXX="/nowhere/c++", PATH="")
    backend("prepare_metadata_for_build_wheel", checkout, place, WHEEL=put_into_wheel(tmp_path / "some.whl"), **where)
    assert list(place.glob("*.dist-info/METADATA"))


def test_glibc_of_machines_without_a_known_loader():
    with pytest.raises(SystemExit, match="x86_64 and aarch64, and this machine is riscv64"):
        glibc._loader("riscv64")


def test_wheels_for_an_older_glibc_are_named_so(checkout, monkeypatch):
    assert wheel_platform("x86_64") is None
    monkeypatch.setenv("DCN_PLUGIN_GLIBC", "2.28")
    assert wheel_platform("x86_64") == "manylinux_2_28_x86_64"
    assert wheel_platform("aarch64") == "manylinux_2_28_aarch64"
    monkeypatch.setenv("DCN_PLUGIN_GLIBC", "2.\u0662\u0668")
    with pytest.raises(SystemExit, match="no version of glibc"):
        wheel_platform("x86_64")
    monkeypatch.setenv("DCN_PLUGIN_GLIBC", "2.28; rm")
    message = failing_build(checkout, BUILD, DCN_PLUGIN_CUDA="0")
    assert "DCN_PLUGIN_GLIBC is '2.28; rm', which is no version of glibc" in message


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_script_parses(script):
    assert run(["bash", "-n", str(script)], ROOT).stderr == ""


def fake_python(folder, body):
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("lack", ["python", "recent python", "venv", "compiler"])
def test_commands_name_what_the_machine_lacks(tmp_path, lack):
    environment = {"DCN_PLUGIN_VENV": str(tmp_path / "venv"), "PYTHON": sys.executable}
    if lack == "python":
        environment["PYTHON"] = "/nowhere/python3"
        expected = "which does not exist"
    elif lack == "recent python":
        environment["PYTHON"] = fake_python(tmp_path, "exit 1")
        expected = "not a Python >= 3.10"
    elif lack == "venv":
        body = f'case "$2" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"'
        environment["PYTHON"] = fake_python(tmp_path, body)
        expected = "apt install python3-venv"
    else:
        environment["CXX"] = "/nowhere/c++"
        expected = "no C++ compiler was found (/nowhere/c++)"
    for script in ("quickstart.sh", "test.sh"):
        done = run(["bash", str(ROOT / "scripts" / script)], tmp_path, **environment)
        assert done.returncode == 1 and expected in done.stderr and "To mend it: " in done.stderr
        assert not (tmp_path / "venv").exists()


def test_ci_runs_exactly_the_documented_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("bash ")] == ["bash scripts/test.sh"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_version_is_stated_once():
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert importlib.util.find_spec("dcn_plugin._version") is not None
    sources = [ROOT / "setup.py", *(ROOT / "dcn_plugin").rglob("*.py")]
    found = [p for p in sources if re.search(r"^__version__ = ", p.read_text(), re.M)]
    assert found == [ROOT / "dcn_plugin" / "_version.py"]
