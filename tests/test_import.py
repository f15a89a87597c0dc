"""What `import dcn_plugin` does to the process: everything that is promised, and nothing else."""

from pathlib import Path

import pytest
from run_python import run_python

import dcn_plugin
from dcn_plugin import layers

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""

USE = """
import torch, dcn_plugin
layer = dcn_plugin.DCNv2(4, 4, 3, padding=1)
x = torch.rand(1, 4, 5, 5)
torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1))
from dcn_plugin.mm import DCNResNet
maps = DCNResNet(18, base_channels=8, dcn=dict(type="DCNv2"))(torch.rand(2, 3, 64, 64))
assert [m.shape[1] for m in maps] == [8, 16, 32, 64]
"""

NO_TIMM = """
from dcn_plugin.mm import TimmBackbone
try:
    TimmBackbone("resnet18_dcn")
except ImportError as error:
    assert "TimmBackbone needs timm" in str(error)
else:
    raise AssertionError("no timm, no error")
"""


def test_public_names():
    assert sorted(dcn_plugin.__all__) == dcn_plugin.__all__
    for name in dcn_plugin.__all__:
        assert hasattr(dcn_plugin, name)
    assert callable(dcn_plugin.convert)


def test_layers_at_the_top():
    """All but those that pool regions and those that stand for another package's class."""
    rest = {name for name in layers.LAYERS if "RoI" in name or name.startswith("MMCV")}
    assert {name for name in layers.LAYERS if name in dcn_plugin.__all__} == set(layers.LAYERS) - rest
    assert all(getattr(dcn_plugin, name) is layers.LAYERS[name] for name in set(layers.LAYERS) - rest)


@pytest.mark.parametrize(
    "blocked",
    [("timm",), ("mmengine", "mmcv"), ("timm", "torchvision", "mmengine", "mmcv", "pytorch_lightning", "lightning")],
    ids=lambda names: "-".join(names[:3]),
)
def test_works_without_frameworks(blocked):
    code = BLOCK.format(blocked=blocked) + USE + (NO_TIMM if "timm" in blocked else "")
    code += f"assert not set({blocked!r}) & set(sys.modules)"
    assert run_python(code, "-W", "error") == ""


def test_the_compiler_is_not_imported_for_nothing():
    """It takes several times as long as all of this package."""
    code = BLOCK.format(blocked=("timm", "mmengine")) + "import dcn_plugin\nassert 'torch._dynamo' not in sys.modules"
    assert run_python(code, "-W", "error") == ""


def test_import_is_silent_light_and_repeatable():
    code = """
    import importlib, sys
    import timm
    from mmengine.registry import HOOKS, MODELS

    def state():
        registries = [node.module_dict.copy() for root in (MODELS, HOOKS) for node in (root, *root.children.values())]
        return [timm.list_models(include_tags=True), timm.list_pretrained(), registries]

    cfgs = {name: timm.get_pretrained_cfg(name) for name in timm.list_models("resn*", include_tags=True)}
    entries = {name: timm.model_entrypoint(name) for name in timm.list_models()}
    import dcn_plugin
    from dcn_plugin.models import FAMILIES

    ours = set(timm.list_models()) - set(entries)
    assert ours == {name for family in FAMILIES for name in timm.list_models(module=family)}, ours
    assert all(timm.list_models(module=family) for family in FAMILIES) and FAMILIES, FAMILIES
    assert all(timm.model_entrypoint(name) is entry for name, entry in entries.items())
    assert all(timm.get_pretrained_cfg(name) == cfg for name, cfg in cfgs.items())

    first = state()
    importlib.reload(dcn_plugin)
    assert state() == first
    heavy = {"pytorch_lightning", "matplotlib", "mmengine.runner", "mmcv"} & set(sys.modules)
    assert not heavy, heavy
    """
    assert run_python("if True:" + code, "-W", "error") == ""


@pytest.mark.parametrize(
    "error", ["RuntimeError('operator torchvision::nms does not exist')", "ImportError('libtorchvision.so')"]
)
def test_broken_timm_is_one_warning(tmp_path: Path, error: str):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(f"raise {error}\n")
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {USE.strip().splitlines()[0]}
messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
assert len(messages) == len(caught) == 1, [str(w.message) for w in caught]
print(messages[0])
print(caught[0].filename)
"""
    message, filename = run_python(code + USE, path=tmp_path).splitlines()
    assert message.startswith("timm is installed but cannot be imported") and "torchvision" in message
    assert filename == "<string>", "the warning should point at the user's import"
