"""The stand-in for mmcv's compiled module: what it lets import, what it leaves alone, and that it goes away."""

from importlib.util import find_spec
from pathlib import Path

import pytest

for _name in ("mmcv", "mmengine", "timm", "torchvision"):
    pytest.importorskip(_name)

# What the codes below begin with; packages of other people warn in many ways.
START = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
from importlib.util import find_spec

def fails(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return error.name == "mmcv._ext"
    return False

def build(kind):
    from mmengine.registry import MODELS
    import torch
    torch.manual_seed(0)
    layer = MODELS.build(dict(type=kind, in_channels=4, out_channels=6, kernel_size=3, padding=1, deform_groups=2))
    torch.nn.init.normal_(layer.conv_offset.weight)
    return layer

"""
INSTALL = "from dcn_plugin.integrations import mmcv as stand_in\nreport = stand_in.install()\n"


@pytest.fixture
def run(forks):
    def run(code: str, path: Path | None = None) -> str:
        return forks.run(START + code, path)

    return run


# What imports


def test_operators_import_and_the_report_says_so(run):
    code = f"""
assert fails("mmcv.ops")
{INSTALL}
assert stand_in.installed() and stand_in.install() == report
import mmcv.ops, mmcv.utils.ext_loader
from mmengine.utils.dl_utils import mmcv_full_available
assert mmcv.utils.ext_loader.check_ops_exist() and mmcv_full_available()
print(report)
"""
    report = run(code)
    assert report.count("\n") == 1 and "stands in for mmcv._ext" in report and "uninstall()" in report


@pytest.mark.parametrize("first", ["mmcv", "mmcv.cnn", "mmengine.registry", "dcn_plugin.registry", "mmdet"])
def test_what_was_imported_before_does_not_matter(run, first):
    if find_spec(first.partition(".")[0]) is None:
        pytest.skip(f"{first} is not installed")
    code = f"""
try:
    import {first}
except AssertionError as error:  # an mmcv newer than mmdet wants
    assert "incompatible" in str(error)
assert fails("mmcv.ops")
{INSTALL}
import mmcv.ops
from mmcv.cnn.bricks.transformer import MultiScaleDeformableAttention
assert MultiScaleDeformableAttention is mmcv.ops.MultiScaleDeformableAttention
assert type(build("DCNv2")) is mmcv.ops.ModulatedDeformConv2dPack
assert type(build("DCN")) is mmcv.ops.DeformConv2dPack
import dcn_plugin.registry
assert type(build("DCNv2")) is mmcv.ops.ModulatedDeformConv2dPack
"""
    assert run(code) == ""


@pytest.mark.parametrize("kind", ["DCN", "DCNv2"])
def test_mmcvs_names_mean_the_same_with_and_without(run, kind):
    """Whose class it is changes when mmcv.ops comes; numbers, gradients and state dicts do not."""
    code = f"""
import torch, dcn_plugin.registry
x = torch.rand(2, 4, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

def results(layer):
    given = x.clone().requires_grad_()
    layer.double()(given).square().sum().backward()
    return [given.grad, *(p.grad for _, p in sorted(layer.named_parameters()))]

ours = build("{kind}")
{INSTALL}
between = build("{kind}")  # mmcv.ops is not there yet
import mmcv.ops
theirs = build("{kind}")
assert type(ours) is type(between) and type(ours).__module__.startswith("dcn_plugin")
assert type(theirs).__module__.startswith("mmcv.ops")
assert {{k: v.shape for k, v in ours.state_dict().items()}} == {{k: v.shape for k, v in theirs.state_dict().items()}}
ours.load_state_dict(theirs.state_dict())
torch.testing.assert_close(results(ours), results(theirs), rtol=1e-12, atol=1e-12)
stand_in.uninstall()
assert type(build("{kind}")) is type(ours)
"""
    assert run(code) == ""


def test_learning_rates_of_offsets_are_mmcvs(run):
    code = f"""
{INSTALL}
import mmcv.ops, dcn_plugin.registry, torch
from mmengine.optim import build_optim_wrapper
model = torch.nn.Sequential(build("DCNv2"))
for constructor in ("DefaultOptimWrapperConstructor", "dcn_plugin.OptimWrapperConstructor"):
    cfg = dict(optimizer=dict(type="SGD", lr=1.0), paramwise_cfg=dict(dcn_offset_lr_mult=0.25), constructor=constructor)
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    assert sorted(g["lr"] for g in groups) == [0.25, 0.25, 1.0, 1.0], groups
"""
    run(code)


# mm* packages


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Two packages with the checks of mmdet's and of mmseg's, and one that accepts every mmcv."""
    folder = tmp_path_factory.mktemp("packages")
    for name, names in (
        ("mmone", ("mmcv_minimum_version", "mmcv_maximum_version")),
        ("mmtwo", ("MMCV_MIN", "MMCV_MAX")),
    ):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(
            f"import mmcv\n{names[0]} = '2.0.0rc4'\n{names[1]} = '2.0.1'\n"
            f"from mmengine.utils import digit_version\nseen = mmcv.__version__\n"
            f"assert digit_version(seen) < digit_version({names[1]})\n"
        )
    (folder / "mmthree").mkdir()
    (folder / "mmthree" / "__init__.py").write_text("import mmcv\nseen = mmcv.__version__\nMMCV_MIN = '2.0'\n")
    return folder


def test_a_package_that_wants_an_older_mmcv_sees_one_while_it_is_imported(run, packages):
    code = f"""
import mmcv
version = mmcv.__version__
try:
    import mmone
    raise SystemExit("nothing to test")
except AssertionError:
    pass
{INSTALL}
import mmone, mmtwo, mmthree
assert (mmone.seen, mmtwo.seen, mmthree.seen) == ("2.0.0rc4", "2.0.0rc4", version)
assert mmcv.__version__ == version
assert importlib.reload(mmone).seen == "2.0.0rc4"
stand_in.uninstall()
try:
    importlib.reload(mmone)
    raise SystemExit("the check is gone for good")
except AssertionError:
    assert mmcv.__version__ == version
"""
    assert run(code, packages) == ""


def test_a_package_that_fails_leaves_the_version(run, packages):
    (packages / "mmfour").mkdir()
    (packages / "mmfour" / "__init__.py").write_text(
        "mmcv_min = '1.0'\nmmcv_max = '1.1'\nimport mmcv\n1 / (mmcv.__version__ != '1.0')"
    )
    code = f"""
import mmcv
version = mmcv.__version__
{INSTALL}
try:
    import mmfour
except ZeroDivisionError:
    assert mmcv.__version__ == version
    print("restored")
"""
    assert run(code, packages) == "restored\n"


def test_loaders_stay_as_they_were(run, tmp_path):
    """Whether a loader is a class, as Python's own for `mmap`, one for many modules, or one for each."""
    (tmp_path / "mmseven").mkdir()
    (tmp_path / "mmseven" / "__init__.py").write_text("import mmcv\nmmcv_min, mmcv_max = '1', '1.1'\n")
    code = f"""
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

class Python:  # as BuiltinImporter: never made, and without anything of its own to delete
    done = []
    @staticmethod
    def create_module(spec): ...
    @staticmethod
    def exec_module(module): Python.done.append(module.__name__)
    @staticmethod
    def get_source(name): return "MMCV_MIN = '1'\\nMMCV_MAX = '1.1'"

class Shared(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("mmbuiltin", "mmpackage"):
            return ModuleSpec(name, Python, is_package=name == "mmpackage")

class Old:  # without find_spec
    find_module = staticmethod(lambda name, path=None: None)  # Python 3.11 asks for it

sys.meta_path[:0] = [Old(), Shared()]
before = dict(vars(Python))
{INSTALL}
import mmbuiltin, mmpackage, mmap, mmseven
assert Python.done == ["mmbuiltin", "mmpackage"] and dict(vars(Python)) == before
assert mmbuiltin.__loader__ is mmpackage.__loader__ is mmpackage.__spec__.loader is Python
assert type(mmseven.__spec__.loader).__name__ == "SourceFileLoader" and mmseven.__loader__ is mmseven.__spec__.loader
for _ in range(2):  # a spec that nobody imported, or twice
    spec = importlib.machinery.PathFinder.find_spec("mmseven")
    sys.modules.pop("mmseven")
    found = find_spec("mmseven")
    assert found.loader.get_source("mmseven") == spec.loader.get_source("mmseven") and found.loader.path == spec.origin
    import mmseven
"""
    assert run(code, tmp_path) == ""


def test_what_was_imported_without_operators_gets_them(run, tmp_path):
    """As mmseg's heads, which note None where `mmcv.ops` is missing."""
    (tmp_path / "mmfive").mkdir()
    (tmp_path / "mmfive" / "__init__.py").write_text("")
    head = "try:\n    from mmcv.ops import PSAMask\nexcept ModuleNotFoundError:\n    PSAMask = None\n"
    (tmp_path / "mmfive" / "head.py").write_text(head)
    code = f"""
import mmfive.head
assert mmfive.head.PSAMask is None
{INSTALL}
import mmcv.ops
assert mmfive.head.PSAMask is mmcv.ops.PSAMask
for _ in range(2):
    stand_in.uninstall()
    assert mmfive.head.PSAMask is None
    stand_in.install()  # brings mmcv.ops back
    assert mmfive.head.PSAMask is sys.modules["mmcv.ops"].PSAMask
"""
    assert run(code, tmp_path) == ""


def test_multimodal_models_are_off_where_transformers_lacks_what_they_take(run, tmp_path):
    for package, text in (
        ("mmpretrain/__init__.py", ""),
        ("mmpretrain/utils/__init__.py", ""),
        ("mmpretrain/utils/dependency.py", "WITH_MULTIMODAL = True\n"),
        ("transformers/__init__.py", ""),
        ("transformers/modeling_utils.py", "def prune_linear_layer(): ...\n"),
    ):
        (tmp_path / package).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / package).write_text(text)
    code = """
sys.modules.pop("transformers", None)  # the one that is installed
if {before}:
    import mmpretrain.utils.dependency as d
{install}
import mmpretrain.utils.dependency as d
print(d.WITH_MULTIMODAL)
stand_in.uninstall()
assert d.WITH_MULTIMODAL
"""
    for before in (True, False):
        assert run(code.format(before=before, install=INSTALL), tmp_path) == "False\n"
    names = "apply_chunking_to_forward find_pruneable_heads_and_indices prune_linear_layer"
    (tmp_path / "transformers" / "modeling_utils.py").write_text(f"# as of version 4: {names}\n")
    assert run(code.format(before=True, install=INSTALL), tmp_path) == "True\n"


@pytest.mark.parametrize("package", ["mmdet", "mmseg", "mmpretrain"])
def test_packages_of_openmmlab_import(run, package):
    needed = {"mmseg": "ftfy"}.get(package, package)
    if find_spec(package) is None or find_spec(needed) is None:
        pytest.skip(f"{package}, or {needed}, is not installed")
    code = f"""
import mmcv
version = mmcv.__version__
{INSTALL}
import {package}.models, {package}.apis
assert mmcv.__version__ == version
"""
    run(code)


# What is left alone, and undone


def test_compiled_operators_are_never_replaced(run, tmp_path):
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text("__version__ = '9'\n")
    (tmp_path / "mmcv" / "_ext.py").write_text("kernels = 'real'\n")
    (tmp_path / "mmsix").mkdir()
    (tmp_path / "mmsix" / "__init__.py").write_text(
        "mmcv_min, mmcv_max = '1', '2'\nimport mmcv\nseen = mmcv.__version__\n"
    )
    code = f"""
before = list(sys.meta_path)
{INSTALL}
assert sys.meta_path == before and not stand_in.installed()
import mmcv._ext, mmsix
assert mmcv._ext.kernels == "real" and mmsix.seen == "9"
stand_in.uninstall()
assert mmcv._ext is sys.modules["mmcv._ext"]
print(report)
"""
    report = run(code, tmp_path)
    assert "has compiled operators" in report and "_ext.py" in report and "nothing is replaced" in report


def test_a_module_of_somebody_else_is_left_alone(run):
    code = f"""
from types import ModuleType
sys.modules["mmcv._ext"] = other = ModuleType("mmcv._ext")
{INSTALL}
assert not stand_in.installed() and sys.modules["mmcv._ext"] is other
print(report)
"""
    assert "nothing is replaced" in run(code)


def test_uninstalling_undoes_everything_and_installing_brings_it_back(run):
    code = f"""
import mmcv.cnn, dcn_plugin.registry, torch
from mmengine.registry import MODELS
path, version = list(sys.meta_path), mmcv.__version__
registered = dict(MODELS.module_dict)
{INSTALL}
import mmcv.ops
layer, kind = build("DCNv2"), mmcv.ops.ModulatedDeformConv2dPack
assert "mmcv._ext" in sys.modules and "SAC" in MODELS.module_dict
for _ in range(2):
    stand_in.uninstall()
    assert not stand_in.installed() and sys.meta_path == path and mmcv.__version__ == version
    assert not [name for name in sys.modules if name.startswith(("mmcv.ops", "mmcv._ext"))]
    assert not hasattr(mmcv, "ops") and not hasattr(mmcv, "_ext")
    assert MODELS.module_dict == registered, set(MODELS.module_dict) ^ set(registered)
    assert fails("mmcv.ops")
layer(torch.rand(1, 4, 5, 5)).sum().backward()  # what was built goes on
stand_in.install()
import mmcv.ops
assert mmcv.ops.ModulatedDeformConv2dPack is kind and type(build("DCNv2")) is kind
assert isinstance(layer, mmcv.ops.ModulatedDeformConv2d)
"""
    assert run(code) == ""


@pytest.mark.parametrize("step", ["_registry.bring_back", "_around.begin", "_checkpoints.begin"])
def test_installing_that_fails_leaves_nothing(run, step):
    code = f"""
import mmcv.cnn, torch
from mmengine.registry import MODELS
from dcn_plugin.integrations import mmcv as stand_in
path, registered, allowed = list(sys.meta_path), dict(MODELS.module_dict), torch.serialization.get_safe_globals()
step = stand_in.{step}

def half():
    step()
    raise KeyboardInterrupt

stand_in.{step} = half
try:
    stand_in.install()
    raise SystemExit("it went through")
except KeyboardInterrupt:
    pass
assert not stand_in.installed() and sys.meta_path == path and MODELS.module_dict == registered
assert set(torch.serialization.get_safe_globals()) == set(allowed) and fails("mmcv.ops")
stand_in.{step} = step
stand_in.install()
import mmcv.ops
"""
    run(code)


def test_a_config_installs_it(run, tmp_path):
    (tmp_path / "config.py").write_text('custom_imports = dict(imports=["dcn_plugin.integrations.mmcv.auto"])\n')
    code = f"""
from mmengine.config import Config
Config.fromfile({str(tmp_path / "config.py")!r})
Config.fromfile({str(tmp_path / "config.py")!r})
import mmcv.ops
"""
    said = [line for line in run(code).splitlines() if "stands in for mmcv._ext" in line]
    assert len(said) == 1


# What nothing serves


def test_other_operators_say_that_they_need_mmcv(run):
    code = f"""
{INSTALL}
import mmcv.ops, torch
from mmcv.ops import CARAFEPack, SAConv2d, active_rotated_filter
try:
    active_rotated_filter(torch.zeros(1, 1, 1, 3, 3), torch.zeros(1, 3, 3, 8))
except NotImplementedError as error:
    print(error)
assert not hasattr(sys.modules["mmcv._ext"], "__wrapped__")
print(mmcv.ops.get_compiler_version(), mmcv.ops.get_compiling_cuda_version())
"""
    refusal, versions = run(code).splitlines()
    assert refusal.startswith("active_rotated_filter_forward: expected") and "mmcv with compiled" in refusal
    assert "dcn_plugin" in versions
