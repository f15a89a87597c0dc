"""`mmcv.ops` on mmcv-lite with the stand-in: mmcv's own functions and modules, and what others take from there."""

import ast
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from dcn_plugin.integrations.mmcv import _extension

SCRIPT = """
import numpy as np
import torch
from torch.autograd import gradcheck

from dcn_plugin.integrations.mmcv import install

install()
from mmcv import ops

torch.manual_seed(0)


def number(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


# Regions within, across borders, outside, without an extent, of the second image.
rois = torch.tensor(
    [[0, 0, 0, 8, 8], [1, 3.2, 1.1, 20.5, 15.2], [0, -5, -4, 3, 2.5], [1, 30, 30, 40, 40], [1, 5, 5, 5, 5]]
).double()
image = number(2, 1, 4, 5)
for mode in ("avg", "max"):
    for aligned in (True, False):
        for ratio in (0, 2):
            assert gradcheck(ops.RoIAlign((3, 2), 0.5, ratio, mode, aligned), (image, rois))
assert gradcheck(ops.RoIPool((3, 2), 0.5), (image, rois))
assert gradcheck(ops.RoIPool((3, 2), 0.5), (image, torch.cat([rois, torch.tensor([[0, 6, 6, 2, 2]])])))  # inverted

logits, labels, weight = number(4, 3), torch.tensor([0, 2, 3, 1]), torch.tensor([0.5, 1.0, 2.0]).double()
for given in (None, weight):
    for reduction in ("mean", "sum"):
        assert gradcheck(ops.SigmoidFocalLoss(2.0, 0.25, given, reduction), (logits, labels))
        assert gradcheck(ops.SoftmaxFocalLoss(2.0, 0.25, given, reduction), (logits, labels.clamp(max=2)))

assert gradcheck(ops.CARAFE(3, 2, 2), (number(1, 4, 2, 2), number(1, 18, 4, 4)))
for kind in ("collect", "distribute"):
    assert gradcheck(ops.PSAMask(kind, (3, 2)), number(1, 6, 3, 2))

boxes = np.array([[6, 3, 8, 7], [3, 6, 9, 11], [3, 7, 10, 12], [1, 4, 13, 7]], dtype=np.float32)
scores = np.array([0.6, 0.9, 0.7, 0.2], dtype=np.float32)
dets, kept = ops.nms(boxes, scores, 0.3)
assert kept.tolist() == [1, 0, 3] and np.array_equal(dets[:, :4], boxes[kept])
dets, kept = ops.nms(boxes, scores, 0.3, score_threshold=0.5, max_num=1)
assert kept.tolist() == [1]
dets, kept = ops.soft_nms(boxes, scores, 0.3, min_score=0.01, method="linear")
assert kept.tolist() == [1, 0, 2, 3] and np.allclose(dets[:, 4], [0.9, 0.6, 0.29024392, 0.2])
groups = ops.nms_match(np.concatenate([boxes, scores[:, None]], 1), 0.3)
assert [group.tolist() for group in groups] == [[1, 2], [0], [3]]
assert ops.nms_match(np.zeros((0, 5)), 0.3) == []

# Class by class, whether classes are moved apart or gone through one after the other; 7 is of another class than 1.
many = torch.from_numpy(np.concatenate([boxes, boxes]))
classes, own = torch.tensor([0] * 4 + [1] * 4), torch.tensor([0.6, 0.9, 0.7, 0.2, 0.61, 0.91, 0.71, 0.21])
for config in (dict(type="nms", iou_threshold=0.3), dict(type="soft_nms", iou_threshold=0.3, method="gaussian")):
    moved, after = (ops.batched_nms(many, own, classes, {**config, "split_thr": at}) for at in (100, 2))
    assert torch.equal(moved[1], after[1]) and torch.allclose(moved[0], after[0])
assert ops.batched_nms(many, own, classes, dict(type="nms", iou_threshold=0.3))[1].tolist() == [5, 1, 4, 0, 7, 3]

conv = ops.MaskedConv2d(1, 3, 3, padding=1).double()
mask = (torch.rand(1, 4, 5) - 0.5).double()
whole = torch.nn.functional.conv2d(image[:1], conv.weight, conv.bias, padding=1)
assert torch.allclose(conv(image[:1], mask), whole * (mask > 0))

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
one, other = ops.SyncBatchNorm(1), torch.nn.BatchNorm2d(1)
one.load_state_dict(other.state_dict())
grads = []
for layer in (one, other):
    given = image.detach().float().requires_grad_()
    (layer(given).sin().sum()).backward()
    grads.append((given.grad, layer.weight.grad, layer.running_mean, layer.running_var))
assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads))
assert one(torch.zeros(0, 1, 3, 3)).shape == (0, 1, 3, 3)
torch.distributed.destroy_process_group()
print("done")
"""


def test_mmcvs_functions_and_their_gradients(forks):
    assert forks.run(SCRIPT).split() == ["done"]


def source_of(package):
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


def imports(tree):
    """Return pairs (module, name) of what is imported from modules by name."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {("." * node.level + (node.module or ""), alias.name) for node in found for alias in node.names}


def operators():
    """Return what each file of `mmcv.ops` calls of the compiled module, and the file of each name that it gives away.

    A name is one of `mmcv.ops`, or one under which MMEngine's registry knows a module of it.
    """
    folder = source_of("mmcv") / "ops"
    texts = {path.stem: path.read_text() for path in folder.glob("*.py")}
    called = {stem: set(re.findall(r"\bext_module\.(\w+)", text)) for stem, text in texts.items()}
    names = {name: module[1:] for module, name in imports(ast.parse(texts["__init__"])) if module.startswith(".")}
    for stem, text in texts.items():
        names |= dict.fromkeys(re.findall(r"MODELS\.register_module\((?:name=)?'(\w+)'", text), stem)
    return called, names


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in a source of theirs
@pytest.mark.parametrize("package", ["mmdet", "mmseg", "mmpretrain"])
def test_what_a_package_and_its_configurations_take_is_served(package):
    """By reading their sources, without importing them."""
    called, names = operators()
    files = set()
    for path in source_of(package).rglob("*.py"):
        text = path.read_text()
        files |= {names[name] for name in re.findall(r"type=['\"](\w+)['\"]", text) if name in names}
        if "mmcv.ops" in text:
            for module, name in imports(ast.parse(text)):
                files |= {names[name]} if module == "mmcv.ops" else set()
                files |= {module.removeprefix("mmcv.ops.")} if module.startswith("mmcv.ops.") else set()
    taken = set().union(*(called[file] for file in files))
    siblings = (import_module(f"dcn_plugin.integrations.mmcv.{sibling}") for sibling in _extension.SIBLINGS)
    served = set().union(*(sibling.FUNCTIONS for sibling in siblings))
    # The one for quadrangles is in nms.py too; no configuration names it.
    assert taken - served <= {"nms_quadri"}
    assert bool(taken) == (package != "mmpretrain")
