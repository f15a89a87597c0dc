"""The rules of docs/architecture.md that a reader could break without a test noticing: who may know whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dcn_plugin import layers

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dcn_plugin"
CSRC = ROOT / "csrc"

# Part -> the parts of dcn_plugin that it may import; what else it may import besides torch and the standard library.
MAY_IMPORT = {
    "_version": ("", ""),
    "_config": ("", "timm"),
    "_extension": ("_version", ""),
    "collect_env": ("_version _extension", ""),
    "reference": ("reference", ""),
    "ops": ("ops reference _extension", ""),
    "layers": ("layers ops reference", ""),
    "_folding": ("", ""),
    "inference": ("layers", ""),
    "convert": ("_config _folding layers ops", ""),
    "_weight_files": ("", "safetensors"),
    "_unpickling": ("_weight_files", ""),
    "checkpoint": ("_unpickling _weight_files layers", ""),
    "flops": ("layers ops", "mmengine"),
    "visualize": ("visualize layers", "numpy matplotlib"),
    "models": ("models convert checkpoint layers ops _config registry", "timm mmengine"),
    "mm": ("mm checkpoint layers _config", "timm mmengine numpy"),
    # Detectors and segmenters are torchvision's; they alone import it.
    "detection": ("detection mm layers ops reference _config", "timm torchvision"),
    "segmentation": ("segmentation detection _config", "torchvision"),
    # MMEngine asks for detection's layer by name; it is imported then.
    "registry": ("mm detection layers flops", "mmengine mmcv"),
    # What stands in for other packages calls them, too.
    # ultralytics and rfdetr are taken by name alone, so they need no word here.
    "integrations": (
        "integrations ops layers mm reference _config _version",
        "torchvision transformers mmcv mmengine numpy",
    ),
    "export": (
        "export models detection segmentation convert checkpoint layers ops reference _config",
        "timm torchvision safetensors onnxruntime openvino ncnn pnnx executorch",
    ),
    "finetune": (
        "finetune export detection segmentation models convert checkpoint visualize layers _config",
        "timm mmengine pytorch_lightning torchmetrics torchvision sklearn numpy PIL rich",
    ),
    # The plug is imported in the program's process, by what Python imports there first; these two know no torch.
    "_startup": ("", ""),
    "__main__": ("_startup integrations", ""),
    "__init__": ("_version layers ops reference checkpoint convert inference", ""),
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Return the absolute names of the modules that a file imports, wherever in the file."""
    package = ["dcn_plugin", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import ops` names a module of ours; `from x import name` names x.
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "dcn_plugin" else {module}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"dcn_plugin.{part} has no row in MAY_IMPORT: say what it may import"
    ours, others = (set(names.split()) for names in MAY_IMPORT[part])
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "dcn_plugin":
            assert (rest or ["__init__"])[0] in ours, f"{part} may not import {name}"
        else:
            assert top in others | {"torch"} | sys.stdlib_module_names, f"{part} may not import {name}"


# Private modules that other parts build on: checks, the rule of layouts, which transforms are at work, which gradients.
SHARED = {"ops._check", "ops._exporters", "ops._layout", "ops._operator", "ops._transforms", "reference._dense"}


def private_modules(path: Path) -> set[str]:
    """Return the private modules of other parts that a file imports, by their names in the package."""
    part = part_of(path)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = ["dcn_plugin", *path.relative_to(PACKAGE).parts[:-1]]
            module = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")][1:]
            for names in (module, *([*module, alias.name] for alias in node.names)):
                name = ".".join(filter(None, names[:2]))
                if name.partition("._")[2] and (PACKAGE / f"{name.replace('.', '/')}.py").exists():
                    found |= {name} if names[0] != part else set()
    return found


def test_parts_keep_their_private_modules_to_themselves():
    found = {str(path): names for path in PACKAGE.rglob("*.py") if (names := private_modules(path))}
    assert {path: names - SHARED for path, names in found.items() if names - SHARED} == {}
    assert set().union(*found.values()) == SHARED, "SHARED lists what nobody imports"


def test_imports_within_the_package_are_relative():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level or node.module.partition(".")[0] != "dcn_plugin", f"{path}:{node.lineno}"


# Who may know whom inside dcn_plugin.finetune: each what stands before it, and no task another one.
TASKS = ("classification", "detection", "segmentation")
FINETUNE = (
    "command_line", "images", "masks", "streams", "folders", "digits", "scenes", "classes", "photos", "transforms",
    "freezing", "data", "seeded", "writer", "guard", "callbacks", "module", "task", *TASKS, "run", "__init__",
)  # fmt: skip


@pytest.mark.parametrize("path", sorted((PACKAGE / "finetune").rglob("*.py")), ids=lambda path: path.stem)
def test_fine_tuning_knows_nothing_of_the_tasks_above_it(path):
    part = path.relative_to(PACKAGE / "finetune").parts[0].removesuffix(".py")
    assert part in FINETUNE, f"dcn_plugin.finetune.{part} has no place in FINETUNE: say what may know it"
    before = {*FINETUNE[: FINETUNE.index(part)], part} - ({*TASKS} - {part} if part in TASKS else set())
    inside = [name.split(".")[2:] for name in imports_of(path) if name.startswith("dcn_plugin.finetune")]
    assert {name[0] for name in inside if name} <= before
    assert part == "run" or [] not in inside, "only run.py imports the tasks by `from . import`"


def includes_of(path: Path) -> list[tuple[str, bool]]:
    """Return what a C++ file includes, with whether it is one of ours, as a path below csrc."""
    included = re.findall(r'^\s*#\s*include\s+(?:"(.+?)"|<(.+?)>)', path.read_text(), re.M)
    found = []
    for quoted, _ in included:
        if quoted:
            beside = (path.parent / quoted).resolve()
            target = beside if beside.exists() else (CSRC / quoted).resolve()
            found.append((str(target.relative_to(CSRC)), True))
    return found + [(name, False) for _, name in included if name]


SOURCES = sorted(path for path in CSRC.rglob("*.*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))
# Layers of csrc, and the files of an operator's folder, from the bottom: each may include what stands before it.
LAYERS = ["core", "runtime", "ops"]
OF_OPERATOR = [
    "arguments.h",
    "bodies.h",
    "depthwise_bodies.h",
    "index.h",
    "portable.h",
    ("cpu", "cuda"),
    "operator.h",
    "registration",
]


def place_in_operator(path: str) -> tuple[str, int, str]:
    """Return the operator that a file below csrc/ops belongs to, its rank in OF_OPERATOR, and the device's folder."""
    operator, first, *rest = Path(path).parts[1:]
    registration = first in (f"{operator}.cpp", f"{operator}.cu")
    for rank, name in enumerate(OF_OPERATOR):
        if (rest and first in name) or first == name or (registration and name == "registration"):
            return operator, rank, first if rest else ""
    raise AssertionError(f"{path}: an operator's folder has {OF_OPERATOR}")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_point_one_way(path):
    here = path.relative_to(CSRC).as_posix()
    layer = here.split("/")[0]
    for name, ours in includes_of(path):
        if ours:
            assert LAYERS.index(name.split("/")[0]) <= LAYERS.index(layer), f"{here} may not include {name}"
        elif name.startswith(("torch/", "ATen/", "c10/")):
            assert layer == "runtime", f"only csrc/runtime includes torch, not {here}"
            assert name.startswith(("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/"))


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if CSRC / "ops" in p.parents], ids=lambda path: str(path.relative_to(CSRC))
)
def test_includes_within_an_operator_point_one_way(path):
    here = path.relative_to(CSRC).as_posix()
    operator, rank, device = place_in_operator(here)
    for name, ours in includes_of(path):
        if not ours or not name.startswith("ops/"):
            continue
        other, below, folder = place_in_operator(name)
        assert other == operator, f"{here}: {name} belongs to another operator; what both need goes to core or runtime"
        # Files of one rank are those of a device, which knows no other device.
        assert below < rank or (below == rank and device and folder == device), f"{here} may not include {name}"
        # A path of its own does without the portable one; paths.h chooses between them.
        assert name != f"ops/{operator}/portable.h" or path.name in ("paths.h", f"{operator}.cu"), here


def test_one_sampler():
    """Whoever interpolates has to take a floor; only the two samplers do, and R-FCN's pooling, for its whole pixels."""
    takes_floor = re.compile(r"\bfloorf?\s*\(|\.floor_?\(|grid_sample|rounding_mode=.floor")
    files = sorted(CSRC.rglob("*.*")) + [
        p for part in ("ops", "layers", "reference") for p in PACKAGE.glob(f"{part}/*.py")
    ]
    found = [path.relative_to(ROOT).as_posix() for path in files if takes_floor.search(path.read_text())]
    assert found == [
        "csrc/core/roi_geometry.h", "csrc/core/sampling.h",
        "dcn_plugin/reference/bilinear.py", "dcn_plugin/reference/roi_pool.py",
    ]  # fmt: skip


# Attributes that tell one kind of layer from another; the contract of layers/sampling.py is what others ask.
OF_A_KIND = (
    "bound conv_offset deformable displacement_scale gamma mask_activation mask_fc modulated offset_bound "
    "offset_branches offset_fc offset_groups offset_scale offsets output_size padding4 part_size spatial_scale window"
).split()
KINDS = (*layers.LAYERS, "OffsetConv", "Branched", "MultiScaleDeformRoIPool", "PSRoIMaps")


def texts(tree: ast.Module) -> list[ast.Constant]:
    """Return the strings that a module computes with, its docstrings left out."""
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    return [
        n for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is str and id(n) not in documents
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers_are_known_by_their_contract(path):
    if part_of(path) == "layers":
        return
    assert not asks_for_a_kind(ast.parse(path.read_text()))


def asks_for_a_kind(tree: ast.Module) -> list[str]:
    """Return where code knows a layer by a name, an attribute, a class or a private part of it."""
    found = [
        f"line {node.lineno}: the name {node.value!r}"
        for node in texts(tree)
        if re.search("conv_offset|offset_fc|mask_fc", node.value)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.search(r"(^|\.)layers(\.|$)", node.module or ""):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            private = [name for name in names if name.startswith("_")]
            found += [f"line {node.lineno}: the private {name}" for name in private]
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1):
            continue
        asked = node.args[1]
        if node.func.id in ("getattr", "hasattr") and isinstance(asked, ast.Constant) and asked.value in OF_A_KIND:
            found.append(f"line {node.lineno}: the attribute {asked.value!r}")
        if node.func.id in ("isinstance", "issubclass"):
            names = {n.id if isinstance(n, ast.Name) else getattr(n, "attr", "") for n in ast.walk(asked)}
            found += [f"line {node.lineno}: the class {name}" for name in sorted(names & set(KINDS))]
    return found


@pytest.mark.parametrize(
    "code",
    [
        'any("conv_offset" in name for name in names)',
        'hasattr(layer, "gamma")',
        'getattr(layer, "modulated", False)',
        "isinstance(layer, (nn.Conv2d, layers.DeformConv2d))",
        "issubclass(kind, OffsetConv)",
        "from ..layers.conv import _pair",
        "from ..layers._start import ZeroLinear",
        "from ..layers import _start",
    ],
)
def test_what_asks_for_a_kind_is_found(code):
    assert len(asks_for_a_kind(ast.parse(code))) == 1


def test_library_code_is_silent():
    prints = re.compile(r"\bprintf\s*\(|std::c(out|err)")
    assert [p.name for p in CSRC.rglob("*.*") if prints.search(p.read_text())] == []
    for part in ("ops", "layers", "reference", "models"):
        for path in PACKAGE.glob(f"{part}/*.py"):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


def test_nothing_is_registered_over_something_else():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "force":
                assert not (isinstance(node.value, ast.Constant) and node.value.value is True), path


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_paths_of_one_machine():
    folders = "|".join(("home", "root", "work", "Users", "mnt", "data1"))
    absolute = re.compile(rf"(?<![\w.>\])}}*~$-])/(?:{folders})/\w")
    for path in tracked_files():
        if path.suffix not in (".json", ".png", ".svg", ".pt", ".safetensors"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not absolute.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def python_in_shell(text: str) -> list[str]:
    """Return what a shell script feeds to an interpreter beyond a line: ruff and mypy do not look there."""
    documents = re.findall(r"^.*(?<!<)<<-?\s*[\\'\"]?[A-Za-z_].*$", text, re.M)
    return documents + [code for _, code in re.findall(r"\s-c\s+(['\"])(.*?)\1", text, re.S) if "\n" in code]


def test_shell_scripts_hold_no_python():
    """Those in findings/ do: each is a report to another project, which has to be a single file."""
    shell = [p for p in tracked_files() if p.suffix == ".sh" or p.read_bytes().startswith(b"#!/usr/bin/env bash")]
    assert {"setup_env.sh", "gpu_check.sh", "run"} <= {path.name for path in shell}
    ours = [path for path in shell if path.parent != ROOT / "findings"]
    assert {path.name: found for path in ours if (found := python_in_shell(path.read_text()))} == {}
    assert python_in_shell("exec python - \"$1\" <<'END'\nimport os\nEND\n") == ["exec python - \"$1\" <<'END'"]
    assert python_in_shell("x=$(python -c 'import os\nprint(os)')") == ["import os\nprint(os)"]
    assert python_in_shell("""python -c 'print(1 << 2)'; read -r a <<<"$b"; ((c << 2))\n""") == []


def test_no_large_files():
    large = [str(path.relative_to(ROOT)) for path in tracked_files() if path.stat().st_size > 2**20]
    assert large == []
