"""RoI pooling in ONNX: the graph of standard operators agrees with the compiled operators for every region."""

from __future__ import annotations

import pytest
import torch
from run_python import run_python
from torch import Tensor, nn

from dcn_plugin import layers, reference

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
from onnx_checks import HAS_RUNTIME, assert_close, by_definition, needs_runtime  # noqa: E402

from dcn_plugin.export._onnx_forms import FORMS as WRITTEN  # noqa: E402
from dcn_plugin.export.onnx import export_onnx, run_onnx  # noqa: E402

Dim = torch.export.Dim
N, REGIONS = Dim("n"), {0: Dim("regions")}
MAPS = {0: N, 2: Dim("h"), 3: Dim("w")}
SCALE = 0.25


def align(bins, sampling_ratio=0, aligned=True):
    return "deform_roi_pool", [bins, SCALE, sampling_ratio, 0.1, aligned], (1, *bins), 3


def part(k, bins, part_size, classes=1, samples=3):
    return "deform_ps_roi_pool", [2, k, bins, part_size, samples, SCALE, 0.1], (classes, *part_size), 2 * k * k


def pixels(k, bins):
    return "ps_roi_pool", [2, k, bins, SCALE], None, 2 * k * k


# The operator, its options in the schema's order, classes and parts of its offsets, channels.
FORMS = {
    "adaptive": align([3, 2]),
    "adaptive-not-aligned": align([2, 3], aligned=False),
    "one-sample": align([2, 2], sampling_ratio=1),
    "three-samples-not-aligned": align([3, 2], sampling_ratio=3, aligned=False),
    "part": part(2, [4, 2], [4, 2]),
    "part-classes": part(2, [3, 3], [2, 2], classes=2),
    "part-of-one": part(1, [2, 2], [2, 2], samples=1),
    "part-uneven": part(3, [2, 4], [5, 1], samples=4),
    "pixels": pixels(2, [4, 2]),
    "pixels-uneven": pixels(2, [3, 3]),
    "pixels-fewer-bins": pixels(3, [2, 2]),
}


class Pool(nn.Module):
    """The compiled operator itself, which knows no region that it refuses."""

    def __init__(self, form: str):
        super().__init__()
        self.operator, self.options, self.of_offset, self.channels = FORMS[form]

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        moved = () if self.of_offset is None else (offset, mask)
        return getattr(torch.ops.dcn_plugin, self.operator).default(input, rois, *moved, *self.options)

    def arguments(self, rois: Tensor, n: int, height: int, width: int, plain: bool = False) -> tuple[Tensor, ...]:
        """Offsets move bins by up to half of a region, or are not finite."""
        given = (torch.randn(n, self.channels, height, width), rois)
        if self.of_offset is None or plain:
            return given
        classes, *parts = self.of_offset
        offset = torch.randn(len(rois), 2 * classes, *parts) * 2
        for value, where in ((torch.nan, (1, 0, 0, 0)), (torch.inf, (2, 1)), (1e30, (3,))):
            if where[0] < len(rois):
                offset[where] = value
        return *given, offset, torch.rand(len(rois), classes, *parts)


def adversarial(n: int, height: int, width: int) -> Tensor:
    """Random regions, then larger than the map, outside, on its edges, tiny, empty, inside out; six are unsound."""
    h, w, inf, last = height / SCALE, width / SCALE, torch.inf, n - 1
    lower = torch.rand(30, 2) * torch.tensor([w, h]) * 1.6 - torch.tensor([w, h]) * 0.3
    upper = lower + torch.rand(30, 2) ** 3 * torch.tensor([w, h]) * 3
    lower[20:25, 0], upper[20:25, 0] = upper[20:25, 0].clone(), lower[20:25, 0].clone()
    lower[23:28, 1], upper[23:28, 1] = upper[23:28, 1].clone(), lower[23:28, 1].clone()
    special = [
        [0, -2 * w, -3 * h, 5 * w, 4 * h], [last, -1e6, -1e6, 1e6, 1e6], [0, -1e4, 0, 2e4, h],
        [0, w - 1, h - 1, 99 * w, 99 * h], [0, 3 * w, 0, 4 * w, h],
        [0, -50 * w, -50 * h, -40 * w, -40 * h], [0, w, h, w, h], [0, -4, -4, 0, 0],
        [0, 0, 0, w, h], [last, 3.3, 4.4, 17.25, 22.125], [0, 5.3, 7.7, 5.30001, 7.70001], [0, 5, 5, 5, 5],
        [0, 30, 2, 1, 40], [last, 1e6, 1e6, -1e6, -1e6],
        [-1, 1, 2, 30, 40], [n, 1, 2, 30, 40], [0.5, 1, 2, 30, 40], [0, torch.nan, 2, 30, 40],
        [0, 1, 2, inf, 40], [torch.nan, 1, 2, 30, 40],
    ]  # fmt: skip
    return torch.cat([torch.cat([torch.randint(0, n, (30, 1)).float(), lower, upper], 1), torch.tensor(special)])


SIZES = [(3, 15, 13), (1, 7, 9), (2, 1, 5), (1, 33, 20)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n, height, width", SIZES)
def test_decomposition_is_the_operator(form, n, height, width):
    model = Pool(form)
    decomposed = WRITTEN[model.operator]
    for plain in (True, False):
        given = model.arguments(adversarial(n, height, width), n, height, width, plain)
        moved = () if model.of_offset is None else (*given[2:], *(None,) * (4 - len(given)))
        found, wanted = decomposed(*given[:2], *moved, *model.options), model(*given)
        assert_close(found, wanted)
        assert wanted[-6:].isnan().all() and wanted[4:-6].isfinite().all()


@needs_runtime
@pytest.mark.parametrize("form", ["adaptive", "part-classes", "part-uneven", "pixels-uneven"])
def test_graph_is_the_operator_for_any_sizes(form, tmp_path):
    """Traced with a few sound regions: then others, one, none, and maps of other sizes."""
    model = Pool(form)
    given = model.arguments(adversarial(2, 12, 14)[:7], 2, 12, 14)
    sizes = (MAPS, REGIONS, *(REGIONS for _ in given[2:]))
    path = export_onnx(model, given, tmp_path / "m.onnx", dynamic_shapes=sizes)
    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node].count("Scan") == 1 and {node.domain for node in graph.node} == {""}
    for n, height, width in SIZES:
        rois = adversarial(n, height, width)
        for some in (rois, rois[-12:-11]):
            other = model.arguments(some, n, height, width)
            assert_close(run_onnx(path, other)[0], model(*other))
        none = model.arguments(rois[:0], n, height, width)
        assert run_onnx(path, none)[0].shape == model(*none).shape


def test_onnx_itself_gives_the_same(tmp_path):
    model = Pool("adaptive")
    rois = adversarial(2, 12, 14)
    given = model.arguments(rois, 2, 12, 14)
    path = export_onnx(model, given, tmp_path / "m.onnx", opset_version=22)
    assert onnx.load(path).opset_import[0].version == 22
    assert_close(by_definition(path, given), model(*given))


# torch's exporter writes numbers such as gamma as float32.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float16, 1e-3)])
def test_other_types(dtype, tolerance, tmp_path):
    model = Pool("adaptive")
    input, rois, offset, mask = model.arguments(adversarial(2, 12, 14)[4:-6], 2, 12, 14)
    places = dtype if dtype == torch.float64 else torch.float32
    given = (input.to(dtype), *(t.nan_to_num(0, 0).clamp(-9, 9).to(places) for t in (rois, offset, mask)))
    path = export_onnx(model, given, tmp_path / "m.onnx")
    found = torch.as_tensor(by_definition(path, given))
    assert found.dtype == dtype
    assert_close(found, model(*given), tolerance)
    if HAS_RUNTIME:
        assert_close(run_onnx(path, given)[0], model(*given), tolerance)


def test_axis_weights_are_the_sampler():
    value = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    y, x = torch.tensor([0, 0.25, 3.5, 4.0]).double(), torch.tensor([0, 2.0, 4.9, 5.0, 5.0]).double()
    read_y, read_x = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 0, 1, 1, 1]).bool()
    grid = torch.cartesian_prod(y[read_y], x[read_x])
    wanted = reference.bilinear_sample(value, grid[None, :, 0], grid[None, :, 1]).sum(-1)
    weights = reference.axis_weights(y, read_y, 5)[:, None] * reference.axis_weights(x, read_x, 6)
    torch.testing.assert_close((value * weights).sum((2, 3)), wanted)


@needs_runtime
def test_a_hundred_regions_need_little_memory(tmp_path):
    """7x7 bins, adaptive: each may take as many samples as the map has, and they are never formed for both axes."""
    code = f"""
import resource, torch
from dcn_plugin import ops
from dcn_plugin.export.onnx import export_onnx, run_onnx

class Pool(torch.nn.Module):
    def forward(self, *given):
        return ops.deform_roi_pool(*given, output_size=7, spatial_scale=1 / 16)

def given(regions):
    lower = torch.rand(regions, 2) * 700
    rois = torch.cat([torch.zeros(regions, 1), lower, lower + torch.rand(regions, 2) * 2000], 1)
    return torch.randn(1, 256, 64, 64), rois, torch.randn(regions, 2, 7, 7), torch.rand(regions, 1, 7, 7)

torch.set_num_threads(1)
regions = {{0: torch.export.Dim("regions")}}
path = export_onnx(Pool(), given(2), "{tmp_path}/m.onnx", dynamic_shapes=(({{}}, *(regions,) * 3),))
run_onnx(path, given(1))
before, many = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, given(100)
found = run_onnx(path, many)[0]
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
difference = float((found - Pool()(*many)).abs().max())
assert difference < 1e-5 and grown < 512, (difference, grown)
print("agrees")
"""
    assert "agrees" in run_python(code, "-W", "ignore")


class Heads(nn.Module):
    """R-FCN's scores, plain, and boxes, deformable, beside Faster R-CNN's pooling of features."""

    def __init__(self):
        super().__init__()
        self.scores, self.boxes = nn.Conv2d(8, 4 * 9, 1), nn.Conv2d(8, 4 * 9, 1)
        self.pool_scores = layers.PSRoIPool(4, 3, 3, SCALE)
        self.pool_boxes = layers.DeformPSRoIPoolPack(
            4, 3, 3, SCALE, deform_fc_channels=16, offset_classes=2, modulated=True
        )
        self.pool_features = layers.ModulatedDeformRoIPoolPack(3, 8, 16, spatial_scale=SCALE)
        self.features = nn.Linear(8 * 9, 5)
        for name, parameter in self.named_parameters():
            if name.startswith("pool"):
                nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, rois: Tensor) -> tuple[Tensor, ...]:
        scores = self.pool_scores(self.scores(x), rois).mean((2, 3))
        boxes = self.pool_boxes(self.boxes(x), rois).mean((2, 3))
        return scores.softmax(1), boxes, self.features(self.pool_features(x, rois).flatten(1))


@needs_runtime
@torch.no_grad()
def test_heads_of_detectors(tmp_path):
    model, rois = Heads().eval(), adversarial(2, 12, 14)[:-6]
    path = export_onnx(
        model, (torch.randn(2, 8, 12, 14), rois[:7]), tmp_path / "m.onnx", dynamic_shapes=(MAPS, REGIONS)
    )
    x = torch.randn(2, 8, 16, 11)
    wanted = model(x, rois)
    for found, expected in zip(run_onnx(path, (x, rois)), wanted, strict=True):
        assert_close(found, expected)
    # Offsets matter, or agreement would say little.
    for name, parameter in model.named_parameters():
        if name.startswith("pool"):
            parameter.zero_()
    for before, after in zip(wanted[1:], model(x, rois)[1:], strict=True):
        assert (before - after).abs().max() > 0.05 * before.abs().max()
