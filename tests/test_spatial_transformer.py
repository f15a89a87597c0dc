"""The spatial transformer against torch's own `affine_grid` and `grid_sample`, in every mode, and its pictures."""

import copy
import io
import itertools
import pickle
from functools import partial

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from dcn_plugin.layers import (
    AffineConv2d,
    AffineLinear,
    SpatialTransformer,
    offset_parameters,
    reset_offsets,
    sampling_layers,
)
from dcn_plugin.visualize import offset_field, record, sampling_points, trace

pytestmark = pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior")
MODES = list(itertools.product(("zeros", "border", "reflection"), (False, True)))
each_mode = pytest.mark.parametrize(("padding_mode", "align_corners"), MODES)
# Of the map, and of the result.
SIZES = {
    "same": ((6, 9), None),
    "smaller": ((6, 9), (4, 3)),
    "larger": ((5, 4), (11, 8)),
    "one pixel of many": ((5, 4), (1, 1)),
    "many of one pixel": ((1, 1), (3, 2)),
    "one row": ((1, 7), (1, 7)),
    "tall": ((9, 3), (2, 12)),
}
each_size = pytest.mark.parametrize("size", SIZES)


class Given(nn.Module):
    """A localiser that returns what it holds, for a batch of any size."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x):
        return self.theta[: len(x)]


close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def drawn(shape, dtype=torch.float64):
    """Transformations that reach beyond the map, on all sides; the shape ends in (2, 3)."""
    return torch.eye(2, 3, dtype=dtype) + 0.7 * torch.randn(shape, dtype=dtype)


def of_torch(x, theta, outputs, align_corners, padding_mode):
    """`theta` `[N, 2, 3]`, or `[N, H', W', 2, 3]` for each pixel of the result."""
    if theta.dim() == 3:
        grid = F.affine_grid(theta, [len(x), 1, *outputs], align_corners)
    else:
        untransformed = torch.eye(2, 3, dtype=theta.dtype)[None]
        at = F.affine_grid(untransformed, [1, 1, *outputs], align_corners)
        grid = (theta @ F.pad(at, (0, 1), value=1.0)[..., None])[..., 0]
    return F.grid_sample(x, grid, "bilinear", padding_mode, align_corners)


def both(size, align_corners, padding_mode, per_pixel):
    """The layer's result and torch's, each with its image and its transformation."""
    torch.manual_seed(1)
    size, output_size = SIZES[size]
    outputs = output_size or size
    theta = drawn((3, *outputs, 2, 3) if per_pixel else (3, 2, 3))
    x = torch.randn(3, 5, *size, dtype=torch.float64)
    planes = theta.flatten(-2).movedim(-1, 1).contiguous() if per_pixel else theta
    layer = SpatialTransformer(5, Given(planes), output_size, align_corners, padding_mode, per_pixel)
    ours, truth = (x.clone().requires_grad_() for _ in range(2))
    leaf = theta.clone().requires_grad_()
    return layer, (layer(ours), ours), (of_torch(truth, leaf, outputs, align_corners, padding_mode), truth, leaf)


@each_mode
@each_size
@pytest.mark.parametrize("per_pixel", [False, True])
def test_values_and_gradients_are_torchs(size, per_pixel, padding_mode, align_corners):
    layer, (out, x), (truth, image, theta) = both(size, align_corners, padding_mode, per_pixel)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
    along = torch.randn_like(truth)
    out.backward(along)
    truth.backward(along)
    found = layer.localiser.theta.grad
    found = found.movedim(1, -1).unflatten(-1, (2, 3)) if per_pixel else found
    torch.testing.assert_close(x.grad, image.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, theta.grad, rtol=1e-9, atol=1e-9)


@each_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_pixel", [False, True])
def test_a_fresh_layer_gives_back_its_input(padding_mode, align_corners, dtype, per_pixel):
    """To the last bit, where torch's own rounds positions; and its gradient reaches input and transformation."""
    layer = SpatialTransformer(
        3, align_corners=align_corners, padding_mode=padding_mode, per_pixel=per_pixel, dtype=dtype
    )
    x = torch.randn(2, 3, 37, 53).to(dtype).requires_grad_()
    out, along = layer(x), torch.randn(2, 3, 37, 53).to(dtype)
    assert torch.equal(out, x) and not layer.offsets(x)[0].any()
    out.backward(along)
    assert torch.equal(x.grad, along) and layer.localiser[-1].bias.grad.any()


@each_mode
def test_a_fresh_layer_of_another_size_resamples(padding_mode, align_corners):
    """Within the map, without a transformation: torch's bilinear interpolation."""
    layer, x = SpatialTransformer(3, None, (5, 12), align_corners, padding_mode), torch.rand(2, 3, 10, 8)
    wanted = F.interpolate(x, (5, 12), mode="bilinear", align_corners=align_corners)
    inner = (..., slice(None), slice(1, -1))  # outside of the map zeros are zeros
    found = layer(x)
    torch.testing.assert_close(*((found, wanted) if padding_mode != "zeros" else (found[inner], wanted[inner])))


@pytest.mark.parametrize("how", ["half", "autocast"])
@each_mode
def test_positions_are_float32_whatever_the_values_are(how, padding_mode, align_corners):
    """On a wide map, where positions in bfloat16 lie whole pixels away; the transformation is exact in bfloat16."""
    torch.manual_seed(0)
    theta = torch.tensor([[[0.75, 0.0, 0.03125], [0.0, 0.875, -0.0625]]])
    x = torch.randn(1, 4, 3, 700).bfloat16()
    layer = SpatialTransformer(4, Given(theta), align_corners=align_corners, padding_mode=padding_mode)
    truth = of_torch(x.double(), theta.double(), (3, 700), align_corners, padding_mode)
    if how == "half":
        found = layer.bfloat16()(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x.float())
    assert found.dtype == torch.bfloat16
    assert (found.double() - truth).abs().max() < 0.02 * truth.abs().max()
    rounded = F.affine_grid(theta, [1, 1, 3, 700], align_corners).bfloat16().double()
    of_rounding = F.grid_sample(x.double(), rounded, "bilinear", padding_mode, align_corners)
    assert (of_rounding - truth).abs().max() > 0.5 * truth.abs().max()


# -- edges -------------------------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("per_pixel", [False, True])
def test_no_images_are_allowed(padding_mode, align_corners, per_pixel):
    layer = SpatialTransformer(3, align_corners=align_corners, padding_mode=padding_mode, per_pixel=per_pixel)
    x = torch.randn(0, 3, 6, 7, requires_grad=True)
    out = layer(x)
    assert out.shape == (0, 3, 6, 7) and layer.offsets(x)[0].shape == (0, 2, 6, 7)
    out.sum().backward()
    assert x.grad.shape == x.shape and not any(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_positions_that_are_no_numbers_or_infinite(padding_mode):
    """NaN shows in what reads it, and nowhere else. Infinity lies outside, at a border, and nowhere in a mirror."""
    theta = torch.eye(2, 3).repeat(3, 1, 1)
    theta[0, 0, 2], theta[1, 0, 2] = torch.nan, torch.inf
    x = torch.rand(3, 2, 4, 5, requires_grad=True)
    out = SpatialTransformer(2, Given(theta), padding_mode=padding_mode)(x)
    assert out[0].isnan().all() and torch.equal(out[2], x[2])
    if padding_mode == "reflection":
        assert out[1].isnan().all()
    else:
        edge = x[1, :, :, -1:].expand(-1, -1, 5) if padding_mode == "border" else torch.zeros(2, 4, 5)
        assert torch.equal(out[1], edge)
    out[1:].nan_to_num().sum().backward()
    assert torch.equal(x.grad[2], torch.ones(2, 4, 5)) and x.grad[1].isfinite().all()


def test_layouts_stay():
    layer, x = SpatialTransformer(4, output_size=(5, 6)), torch.rand(2, 4, 8, 7)
    assert layer(x).is_contiguous()
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, layer(x))


# -- as a module -------------------------------------------------------------------------------------------------------


def moved(**options):
    """A layer that transforms, and its input."""
    torch.manual_seed(0)
    layer = SpatialTransformer(4, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.normal_(layer.localiser[-1].weight, std=0.03)  # within a few maps, as float32 rounds far positions
    return layer, torch.randn(2, 4, 9, 12)


OPTIONS = [
    {},
    dict(output_size=(5, 20), align_corners=True, padding_mode="reflection"),
    dict(per_pixel=True, padding_mode="border"),
]
each_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


@each_options
def test_copies_and_files(options):
    layer, x = moved(**options)
    out = layer(x)
    assert not torch.equal(out, x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = SpatialTransformer(4, **options)
    loaded.load_state_dict(torch.load(file))
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), out) and repr(other) == repr(layer)


@each_options
def test_graphs_compute_the_same(options):
    layer, x = moved(**options)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(x), expected)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    close(exported.module()(x[:1].repeat(5, 1, 1, 1)), expected[:1].repeat(5, 1, 1, 1))
    close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), expected)
    close(torch.jit.trace(layer, (x,))(x), expected)
    fake = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert (fake.shape, fake.stride(), fake.dtype) == (expected.shape, expected.stride(), expected.dtype)


@each_options
def test_sizes_may_be_dynamic(options):
    layer, x = moved(**options)
    dynamic = ({2: torch.export.Dim("height", min=8, max=60), 3: torch.export.Dim("width", min=8, max=60)},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=dynamic).module()
    other = torch.randn(2, 4, 23, 17)
    close(exported(other), layer(other))


@each_options
def test_samples_of_vmap(options):
    layer, _ = moved(**options)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(6, 4, 9, 12).contiguous(memory_format=layout).unflatten(0, (3, 2))
        close(torch.func.vmap(layer)(x), torch.stack([layer(each) for each in x]))


def test_a_compiled_layer_is_compiled_once_more_for_all_batches():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    layer, x = moved()
    compiled = torch.compile(layer, backend=counter)
    for images in (2, 3, 4, 5):
        compiled(x[:1].expand(images, -1, -1, -1).contiguous())
    assert counter.frame_count == 2


@each_options
def test_it_runs_where_this_package_is_not(options, tmp_path):
    pytest.importorskip("onnxscript")
    session = pytest.importorskip("onnxruntime").InferenceSession
    from dcn_plugin.export.onnx import export_onnx

    layer, x = moved(**options)
    run = session(str(export_onnx(layer.eval(), (x,), tmp_path / "layer.onnx")))
    (found,) = run.run(None, {run.get_inputs()[0].name: x.numpy()})
    close(torch.from_numpy(found), layer(x).detach())


def test_memory_that_is_given_later_is_initialised():
    for per_pixel in (False, True):
        layer = SpatialTransformer(3, per_pixel=per_pixel, device="meta").to_empty(device="cpu")
        for parameter in layer.parameters():
            parameter.data.fill_(torch.nan)
        layer.reset_parameters()
        x = torch.rand(1, 3, 6, 6)
        assert torch.equal(layer(x), x) and all(parameter.isfinite().all() for parameter in layer.parameters())


@each_options
def test_the_transformation_starts_again(options):
    layer, x = moved(**options)
    assert layer.offsets(x)[0].any()
    hidden = layer.localiser[0].weight.clone()
    reset_offsets(nn.Sequential(layer))
    # Fractions of pixels, where the sizes differ, are rounded.
    assert layer.offsets(x)[0].abs().max() < 1e-5 and torch.equal(layer.localiser[0].weight, hidden)
    rates = offset_parameters(layer)
    assert list(rates) == [name for name, _ in layer.named_parameters()] and set(rates.values()) == {0.1}


def test_initialisers_of_whole_models_are_told():
    layer = SpatialTransformer(3)
    nn.init.normal_(layer.localiser[-1].weight)
    with pytest.warns(UserWarning, match="SpatialTransformer: the weight of localiser.10 is expected to start at zero"):
        layer(torch.rand(1, 3, 8, 8))


def test_mmengine_builds_it():
    pytest.importorskip("mmengine")
    from dcn_plugin.registry import MODELS

    layer = MODELS.build(dict(type="dcn_plugin.SpatialTransformer", channels=8, padding_mode="border"))
    assert type(layer) is SpatialTransformer and layer.padding_mode == "border"


def test_it_learns_where_a_picture_was_moved_to():
    """A localiser of one bias, and a picture that lies elsewhere: gradient descent finds the shift."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24), indexing="ij")

    def blob(at_y, at_x):
        return torch.exp(-4 * ((y - at_y) ** 2 + (x - at_x) ** 2))[None, None]

    layer = SpatialTransformer(1, nn.Sequential(nn.Flatten(), AffineLinear(24 * 24)), padding_mode="border")
    optimizer = torch.optim.SGD([layer.localiser[1].bias], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        (layer(blob(0.3, -0.2)) - blob(0.0, 0.0)).square().mean().backward()
        optimizer.step()
    shift = layer.localiser[1].bias.detach()[[2, 5]]
    torch.testing.assert_close(shift, torch.tensor([-0.2, 0.3]), rtol=0, atol=0.03)


# -- pictures ----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Half of the size, moved and enlarged."""

    def __init__(self, output_size):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        theta = torch.tensor([[[1.0, 0.0, 0.25], [0.0, 0.5, 0.0]]])
        self.move = SpatialTransformer(4, Given(theta), output_size)

    def forward(self, x):
        return self.move(self.stem(x))


@pytest.mark.parametrize("output_size", [None, (4, 16)])
def test_records_have_what_was_sampled(output_size):
    model, images = Model(output_size).eval(), torch.rand(1, 3, 16, 16)
    (item,) = record(model, images)
    assert list(sampling_layers(model)) == [item.name] == ["move"]
    height, width = output_size or (8, 8)
    grid = F.affine_grid(model.move.localiser.theta, [1, 1, height, width], False)[0].flip(-1)
    pixels = ((grid + 1) * 8 - 1) / 2
    for y, x in ((0, 0), (2, 3), (height - 1, width - 1)):
        torch.testing.assert_close(item.positions(y, x), pixels[y, x][None])
    assert item.grid == ((2.0, 0.5), (2.0, 0.5))
    # Untransformed, the result covers the whole map.
    torch.testing.assert_close(
        torch.tensor(item.out_grid),
        torch.tensor([[16 / height, (16 / height - 1) / 2], [16 / width, (16 / width - 1) / 2]]),
    )
    row, column = height // 2, width // 2
    unit = tuple(scale * at + shift for at, (scale, shift) in zip((row, column), item.out_grid, strict=True))
    torch.testing.assert_close(trace([item], unit), pixels[row, column][None] * 2 + 0.5)
    pytest.importorskip("matplotlib")
    assert sampling_points(model, images, unit).axes[0].collections
    assert offset_field(model, images[0]).axes[0].collections


def test_what_ends_a_localiser_of_ones_own():
    assert AffineLinear(3)(torch.rand(2, 3)).tolist() == [[1, 0, 0, 0, 1, 0]] * 2
    assert torch.equal(AffineConv2d(3)(torch.rand(1, 3, 4, 5))[0, :, 2, 3], torch.tensor([1.0, 0, 0, 0, 1, 0]))
