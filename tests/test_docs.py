"""The documents tell the truth: their Python blocks run, their links and paths exist, their tables hold."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dcn_plugin
from dcn_plugin import layers, ops

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = ("timm", "mmengine", "pytorch_lightning", "torchmetrics", "sklearn", "matplotlib", "torchvision")
# Document whose Python blocks run -> what they need besides torch.
EXECUTED = {
    "README.md": FRAMEWORKS,
    "docs/operators.md": ("timm", "matplotlib"),
    "docs/examples.md": FRAMEWORKS,
    "docs/timm.md": ("timm", "safetensors"),
    "docs/video.md": (),
    "docs/detr.md": ("timm", "transformers"),
    "docs/mmengine.md": ("timm", "mmengine", "mmcv"),
    "docs/finetune.md": FRAMEWORKS,
    "docs/explore.md": ("timm", "matplotlib"),
    "docs/detection.md": (*FRAMEWORKS, "pycocotools"),
    "docs/segmentation.md": FRAMEWORKS,
    "docs/export.md": ("timm", "onnxscript", "onnxruntime", "torchvision"),
    "docs/migrating.md": ("timm", "mmengine", "torchvision"),
}
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("csrc/*.md")})
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())

# What some documents' examples read, made where they run. Weights are views of one number, so the files are small.
CHECKPOINTS = """
import json, sys, torch
from pathlib import Path

def zeros(shape):
    return torch.zeros(1).expand(shape) if shape else torch.tensor(0)

shapes = json.loads(Path(sys.argv[2]).read_text())["shapes"]
backbone = {f"backbone.{name}": zeros(shape) for name, shape in shapes.items()}
torch.save({"meta": {}, "state_dict": backbone | {"rpn_head.conv.weight": zeros([1])}}, "mmdet_detector.pth")
chengdazhi = {name.replace("conv_offset", "conv_offset_mask"): value for name, value in backbone.items()}
torch.save({"meta": {}, "state_dict": chengdazhi}, "chengdazhi_detector.pth")

RENAMES = [
    ("layer1", "res2"), ("layer2", "res3"), ("layer3", "res4"), ("layer4", "res5"), ("bn1", "conv1.norm"),
    ("bn2", "conv2.norm"), ("bn3", "conv3.norm"), ("downsample.0", "shortcut"), ("downsample.1", "shortcut.norm"),
    ("conv2.conv_offset", "conv2_offset"),
]

def detectron2(name):
    for old, new in RENAMES:
        name = name.replace(old, new)
    return "backbone.bottom_up." + ("stem." + name if name.startswith("conv1") else name)

model = {detectron2(name): zeros(shape) for name, shape in shapes.items() if "num_batches" not in name}
torch.save({"model": model}, "detectron2_model.pth")
"""
PHOTOS = """
from pathlib import Path
from PIL import Image

for split in ("train", "val"):
    for number, name in enumerate(("cat", "dog")):
        folder = Path("pets", split, name)
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 40), (60 * i, 100 * number, 0)).save(folder / f"{i}.png")
"""
FILES = {"docs/migrating.md": CHECKPOINTS, "docs/finetune.md": PHOTOS}

RUN = """
import sys
exec(compile(open("program.txt").read(), sys.argv[1], "exec"), {"__name__": "__main__"})
"""


def blocks(path: Path) -> list[tuple[int, str, str]]:
    """Fenced blocks of a document: line of the first line inside (from 0), info string, text."""
    found, lines = [], path.read_text().splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("``"):
            continue
        if start is None:
            start = number
        else:
            found.append((start + 1, lines[start][3:].strip(), "\n".join(lines[start + 1 : number])))
            start = None
    assert start is None, f"{path}:{start}: this block is not closed"
    return found


@pytest.mark.parametrize("name", EXECUTED)
def test_python_blocks_run_in_order(name, tmp_path):
    """One fresh interpreter a document; an error's traceback points at the document's own line."""
    missing = [module for module in EXECUTED[name] if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    path = ROOT / name
    program: list[str] = []
    for line, info, text in blocks(path):
        if info == "python":
            program += [""] * (line - len(program)) + text.splitlines()
    assert program
    for folder in ("configs", "scripts", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    env = dict(os.environ, PYTHONPATH=str(Path(dcn_plugin.__file__).parents[1]), MPLBACKEND="Agg", HF_HUB_OFFLINE="1")
    env.setdefault("OMP_NUM_THREADS", "1")  # small problems: more threads only wait for one another
    (tmp_path / "program.txt").write_text("\n".join(program))
    (tmp_path / "run.py").write_text(FILES.get(name, "") + RUN)
    arguments = [str(path), str(ROOT / "tests/data/mmdet_resnet50_dcnv2.json")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "run.py", *arguments],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    for file in tmp_path.rglob("*.pth"):
        file.unlink()
    assert done.returncode == 0, done.stderr[-4000:]


@each_document
def test_python_blocks_that_are_not_run_are_python(path):
    for line, info, text in blocks(path):
        if info.split()[:1] == ["python"]:
            assert info in ("python", "python no-run"), f"{path.name}:{line}: {info}"
            ast.parse(text, filename=f"{path.name}:{line}")


def anchors(path: Path) -> set[str]:
    """The anchors GitHub gives to a document's headings."""
    titles = re.findall(r"^#+ +(.+?) *$", re.sub(r"^``.*?^``", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_links_lead_somewhere(path):
    text = re.sub(r"^``.*?^``", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{path.name}: {target} does not exist"
        if anchor:
            assert anchor in anchors(place), f"{path.name}: {target}: no such heading"


@each_document
def test_paths_in_the_text_exist(path):
    """Whatever reads like a path of this repository is one; globs and placeholders have to match something."""
    text = re.sub(r"\]\([^)]*\)", "", path.read_text())
    tops = "csrc|dcn_plugin|configs|scripts|tests|docs|benchmarks"
    for name in re.findall(rf"(?<![\w/.\-])((?:{tops})/[\w./*<>{{}},\-]*[\w>}}*/])", text):
        if "<" in name or "{" in name:
            continue
        assert list(ROOT.glob(name.rstrip("/"))), f"{path.name}: {name} does not exist"


@each_document
def test_table_cells_hold_one_short_sentence(path):
    """What is longer stands in a paragraph or a list below the table."""
    text = re.sub(r"^``.*?^``", "", path.read_text(), flags=re.M | re.S)
    for row in re.findall(r"^\|.*", re.sub(r"`[^`\n]*`|tests/[\w/.:]+|\]\([^)]*\)", "x", text), re.M):
        for cell in row.replace(r"\|", "").split("|"):
            assert len(cell.strip()) <= 110 and not re.search(r"[.;] ", cell.strip()), f"{path.name}: {cell}"


def sources() -> dict[str, str]:
    """Documents and whatever has messages, docstrings or comments."""
    folders = ("dcn_plugin", "docs", "scripts", "benchmarks", "configs", "csrc")
    found = [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    endings = {".md", ".py", ".sh", ".cff", ".yml", ".h", ".cpp", ".cu", ".cuh"}
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in found if path.suffix in endings}


def test_every_advice_works_from_a_clone():
    """No index has this package: what is to be installed is `.`, with its extras, in a clone."""
    extras = set(
        re.findall(
            r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-")[2].partition("\n[")[0], re.M
        )
    )
    advised = set()
    for name, text in sources().items():
        assert not re.search(r"pip install[^\n]* '?dcn_plugin\b", text), name
        advised |= set(re.findall(r"install [^\n]*'\.\[(\w+)\]'", text))
    assert {"finetune", "detection", "onnx", "visualize", "benchmark", "docs"} <= advised <= extras


def test_citations_name_this_version():
    version = dcn_plugin.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()


def test_pictures_are_small():
    for path in (ROOT / "docs/images").iterdir():
        assert path.stat().st_size < 150_000, path.name


def test_every_layer_is_documented():
    """As every operator is (test_every_operator.py), and the one function that is none."""
    text = (ROOT / "docs/operators.md").read_text()
    assert "\n## kernels_used\n" in text
    table = text.partition("## All operators")[2]
    for name in layers.LAYERS:
        assert f"| `{name}` |" in text and f"`{name}`" in table, name


def test_guarantees_name_tests_that_exist():
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", (ROOT / "docs/guarantees.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"def {test or 'test_'}" in (ROOT / file).read_text(), (file, test)


def test_floor_and_tested_versions_stand_in_pyproject_alone():
    versions = set(re.findall(r"==([\d.]+)", (ROOT / "pyproject.toml").read_text()))
    for path in map(
        ROOT.joinpath, {*EXECUTED} - {"docs/operators.md"}
    ):  # that names the version of mmcv it was read in
        text = re.sub(r"mmengine 0\.10\.7|MMEngine 0\.10\.7", "", path.read_text())
        assert not versions & set(re.findall(r"\b\d+\.\d+\.\d+\b", text)), path.name


def docstrings() -> list[tuple[str, str, set[str]]]:
    """Place, text and parameters of every docstring of the package (a class has those of its constructor)."""
    found = []
    for path in sorted((ROOT / "dcn_plugin").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                place = f"{path.relative_to(ROOT)}: {getattr(node, 'name', '')}"
                inner = [n for n in getattr(node, "body", []) if getattr(n, "name", "") == "__init__"]
                function = node if isinstance(node, ast.FunctionDef) else (inner or [None])[0]
                found.append(
                    (place, text, {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)} if function else set())
                )
    assert len(found) > 500
    return found


def test_docstrings_have_one_markup():
    """Markdown, as the site and `help()` show it: single backticks, no roles or directives, `Example:` with `>>>`."""
    for place, text, parameters in docstrings():
        assert "``" not in text and not re.search(
            r":(class|func|meth|mod|attr|math|ref|data):`|^\s*\.\. \w|::$", text, re.M
        ), place
        for below in re.findall(r"^ *Examples?:(.*\n?.*)", text, re.M):
            assert re.match(r"\n +>>> ", below), f"{place}: an example begins with >>> below the line `Example:`"
        arguments = re.search(r"^Args:\n((?:(?: .*)?\n?)*)", text, re.M)
        for names in re.findall(
            r"^    (\w+(?:(?:, | \.\. )\w+)*):", arguments[1] if arguments and parameters else "", re.M
        ):
            named = set(re.split(r", | \.\. ", names))
            assert named <= parameters, f"{place}: {named - parameters} are no parameters"


def doctested() -> list[str]:
    found = pkgutil.walk_packages(dcn_plugin.__path__, "dcn_plugin.")
    return ["dcn_plugin", *(module.name for module in found if not module.name.rpartition(".")[2].startswith("_C"))]


@pytest.mark.parametrize("name", doctested())
def test_examples_in_docstrings(name, imports_everything):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert not (error.name or "").startswith("dcn_plugin"), error
        pytest.skip(f"needs {error.name}")
    assert doctest.testmod(module).failed == 0


# The table "Differences from torchvision" of docs/operators.md, row by row: (here, torchvision).


def at(function, y: float, x: float = 1.0, pixel: float = 1.0) -> tuple[float, list[float]]:
    """Value and gradient (dy, dx) of one tap that reads a 4x4 map of ones, `pixel` at (1, 1), at (y, x)."""
    image = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    image[0, 0, 1, 1] = pixel
    offset = torch.tensor([y, x], dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_()
    out = function(image, offset, torch.ones(1, 1, 1, 1, dtype=torch.float64), stride=(4, 4))
    out.sum().backward()
    return out.item(), offset.grad.flatten().tolist()


def call(function, dtype: torch.dtype, offset: torch.dtype, **options) -> Tensor:
    torch.manual_seed(0)
    return function(
        torch.randn(1, 4, 6, 6).to(dtype), torch.randn(1, 18, 6, 6).to(offset), torch.randn(4, 4, 3, 3).to(dtype),
        **dict(dict(padding=(1, 1)), **options),
    )  # fmt: skip


def raises(function, *args, **kwargs) -> bool:
    try:
        function(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError):
        return True
    return False


def test_differences_from_torchvision():
    theirs, here = pytest.importorskip("torchvision").ops.deform_conv2d, ops.deform_conv2d
    nan, inf = float("nan"), float("inf")
    assert at(here, -1.0) == (0, [0, 0]) and at(theirs, -1.0) == (0, [1, 0])
    assert at(here, inf) == (0, [0, 0]) and at(theirs, inf)[0] == 0 and str(nan) in map(str, at(theirs, inf)[1])
    assert at(here, 0.0, 1.0, nan)[0] == 1 and str(at(theirs, 0.0, 1.0, nan)[0]) == "nan"

    half, single = torch.bfloat16, torch.float32
    assert call(here, half, half).dtype == half and raises(call, theirs, half, half)
    assert call(here, torch.float16, single).dtype == torch.float16 and raises(call, theirs, torch.float16, single)
    with torch.autocast("cpu", half):
        assert call(here, single, half).dtype == half and raises(call, theirs, single, half)
    four = dict(padding=(1, 1, 1, 1))
    assert call(here, single, single, **four).shape[-2:] == (6, 6) and raises(call, theirs, single, single, **four)

    def last(function) -> bool:
        image = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
        out = function(image, torch.zeros(1, 18, 4, 4), torch.randn(4, 4, 3, 3))
        return out.is_contiguous(memory_format=torch.channels_last)

    assert last(here) and not last(theirs)

    def twice(function) -> None:
        image = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
        out = function(image, torch.rand(1, 2, 4, 4).double(), torch.ones(1, 1, 1, 1).double())
        (grad,) = torch.autograd.grad(out.square().sum(), image, create_graph=True)
        grad.sum().backward()

    twice(here)
    assert raises(twice, theirs)

    def of(function):
        offset, weight = torch.rand(1, 2, 4, 4), torch.ones(1, 1, 1, 1)
        return lambda image: function(image, offset, weight)

    x = torch.rand(1, 1, 4, 4)
    torch.func.grad(lambda t: of(here)(t).sum())(x)
    assert raises(torch.func.grad(lambda t: of(theirs)(t).sum()), x)
    assert torch.func.jvp(of(here), (x,), (x,))[1].any()
    assert raises(torch.func.jvp, of(theirs), (x,), (x,)) or not torch.func.jvp(of(theirs), (x,), (x,))[1].any()
