"""Deformable operators under mmcv's names: against the reference, mmcv's published numbers and finite differences."""

import itertools
import math

import pytest
import torch

from dcn_plugin import reference
from dcn_plugin.integrations.mmcv.deform import FUNCTIONS
from dcn_plugin.ops import deform_conv2d

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2}
# name: channels, out channels, kernel (y, x), stride, padding, dilation, groups, offset groups
GEOMETRIES = {
    "plain": (4, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    "groups": (4, 6, (3, 2), (1, 1), (1, 1), (1, 1), 2, 1),
    "offset groups": (4, 3, (2, 3), (2, 1), (1, 2), (1, 1), 1, 2),
    "everything": (8, 4, (3, 2), (1, 2), (2, 1), (2, 1), 2, 4),
}


def named(geometry, modulated):
    """The geometry under the names that either kind of function has for it."""
    _, _, kernel, stride, padding, dilation, groups, offset_groups = geometry
    pairs = (kernel, stride, padding, dilation)
    heads = ("kernel_", "stride_", "pad_", "dilation_") if modulated else ("k", "d", "pad", "dilation")
    names = [(head + "h", head + "w") if modulated else (head + "H", head + "W") for head in heads]
    given = {name: value for two, pair in zip(names, pairs, strict=True) for name, value in zip(two, pair, strict=True)}
    return given | dict(group=groups, deformable_group=offset_groups)


def draw(geometry, dtype, n=2, size=(7, 6), positions=None):
    """Return input, weight, bias, offset, mask (of size `positions`) and a gradient of the output."""
    channels, out, kernel, stride, padding, dilation, groups, offset_groups = geometry
    generator = torch.Generator().manual_seed(0)
    result = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    taps = offset_groups * kernel[0] * kernel[1]
    shapes = (
        (n, channels, *size), (out, channels // groups, *kernel), (out,), (n, 2 * taps, *(positions or result)),
        (n, taps, *(positions or result)), (n, out, *result),
    )  # fmt: skip
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def expected(tensors, geometry, modulated, bias):
    """Return output and gradients of input, weight, bias, offset and mask by autograd through the definition."""
    *given, along = [t.double().detach().requires_grad_() for t in tensors]
    input, weight, b, offset, mask = given
    _, _, _, stride, (top, left), dilation, _, _ = geometry
    out = reference.deform_conv2d(
        input, offset, weight, b if bias else None, list(stride), [top, left, top, left], list(dilation),
        mask if modulated else None,
    )  # fmt: skip
    out.backward(along)
    return out.detach(), [t.grad for t in given]


def check(found, truth, tolerance):
    scale = max(1.0, truth.abs().max().item() if truth.numel() else 1.0)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=tolerance * scale)


def run_v1(tensors, geometry, scale=1.0):
    """As mmcv's autograd function calls it."""
    input, weight, _, offset, _, along = tensors
    options = named(geometry, False) | dict(im2col_step=input.shape[0])
    scratch = input.new_empty(0)
    output = torch.empty(along.shape, dtype=input.dtype)
    FUNCTIONS["deform_conv_forward"](input, weight, offset, output, scratch, scratch, **options)
    grads = [torch.zeros_like(t) for t in (input, offset, weight)]
    FUNCTIONS["deform_conv_backward_input"](input, offset, along, *grads[:2], weight, scratch, **options)
    FUNCTIONS["deform_conv_backward_parameters"](
        input, offset, along, grads[2], scratch, scratch, **options, scale=scale
    )
    return output, grads


def run_v2(tensors, geometry, bias=True):
    input, weight, b, offset, mask, along = tensors
    b = b if bias else input.new_empty(0)
    options = named(geometry, True) | dict(with_bias=bias)
    scratch = input.new_empty(0)
    output = torch.empty(along.shape, dtype=input.dtype)
    FUNCTIONS["modulated_deform_conv_forward"](input, weight, b, scratch, offset, mask, output, scratch, **options)
    grads = [torch.zeros_like(t) for t in (input, weight, b, offset, mask)]
    FUNCTIONS["modulated_deform_conv_backward"](
        input, weight, b, scratch, offset, mask, scratch, *grads, along, **options
    )
    return output, grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_deform_conv_is_the_definition(name, dtype):
    geometry = GEOMETRIES[name]
    tensors = draw(geometry, dtype)
    out, grads = run_v1(tensors, geometry)
    truth, (input, weight, _, offset, _) = expected(tensors, geometry, False, False)
    for found, true in zip((out, *grads), (truth, input, offset, weight), strict=True):
        check(found, true, DTYPES[dtype])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_modulated_deform_conv_is_the_definition(name, dtype, bias):
    geometry = GEOMETRIES[name]
    tensors = draw(geometry, dtype)
    out, grads = run_v2(tensors, geometry, bias)
    truth, gradients = expected(tensors, geometry, True, bias)
    check(out, truth, DTYPES[dtype])
    for found, true in zip(grads, gradients, strict=True):
        if true is not None:
            check(found, true, DTYPES[dtype])


def views(t):
    """The same numbers as channels_last, and with gaps in between."""
    return t.contiguous(memory_format=torch.channels_last), torch.stack((t, t), -1)[..., 0]


@pytest.mark.parametrize("run", [run_v1, run_v2])
def test_the_layout_of_the_arguments_does_not_matter(run):
    geometry = GEOMETRIES["everything"]
    tensors = draw(geometry, torch.float64)
    out, grads = run(tensors, geometry)
    for kind in (0, 1):
        other = [views(t)[kind] if t.dim() == 4 else t for t in tensors]
        assert not other[0].is_contiguous() and not other[3].is_contiguous()
        again, gradients = run(other, geometry)
        for found, true in zip((again, *gradients), (out, *grads), strict=True):
            torch.testing.assert_close(found, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("run", [run_v1, run_v2])
@pytest.mark.parametrize(
    ("at", "wrong", "name"), [(6, 1, "weight"), (7, 2, "offset"), (2, (2, 3), "weight"), (6, 0, "group")]
)
def test_kernels_and_groups_agree_with_the_shapes(run, at, wrong, name):
    """mmcv's kernels check that; our operators never see these numbers."""
    geometry = GEOMETRIES["groups"]
    told = (*geometry[:at], wrong, *geometry[at + 1 :])
    with pytest.raises(ValueError, match=f"{name}: expected .*, got"):
        run(draw(geometry, torch.float64), told)


def test_an_empty_batch_gives_an_empty_output_and_no_gradient():
    geometry = GEOMETRIES["groups"]
    for run in (run_v1, run_v2):
        out, grads = run(draw(geometry, torch.float32, n=0), geometry)
        assert out.shape == (0, 6, *out.shape[2:])
        assert all((g == 0).all() for g in grads)


def test_gradients_are_added_to_what_is_there_and_scaled():
    """As mmcv's kernels do: `gradWeight` gets `scale` times the gradient."""
    geometry = GEOMETRIES["plain"]
    tensors = draw(geometry, torch.float64)
    _, (*_, once) = run_v1(tensors, geometry)
    _, (*_, half) = run_v1(tensors, geometry, scale=0.5)
    torch.testing.assert_close(half, once / 2)
    input, weight, _, offset, _, along = tensors
    target, scratch = torch.ones_like(weight), input.new_empty(0)
    options = named(geometry, False) | dict(im2col_step=1, scale=1.0)
    FUNCTIONS["deform_conv_backward_parameters"](input, offset, along, target, scratch, scratch, **options)
    torch.testing.assert_close(target, once + 1)


@pytest.mark.parametrize("device", ["cpu"])
def test_autocast_changes_no_type(device):
    geometry = GEOMETRIES["plain"]
    tensors = draw(geometry, torch.float32)
    for run in (run_v1, run_v2):
        out, grads = run(tensors, geometry)
        with torch.autocast(device, dtype=torch.bfloat16):
            again, gradients = run(tensors, geometry)
        assert torch.equal(out, again) and all(map(torch.equal, grads, gradients))


# Offsets and masks of another size


def sample(image, y, x):
    """Bilinear value of a 2-D list of numbers at (y, x), zeros outside."""
    top, left, value = math.floor(y), math.floor(x), 0.0
    for i, j in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
            value += (1 - abs(y - i)) * (1 - abs(x - j)) * image[i, j].item()
    return value


def loops(tensors, geometry):
    """The modulated convolution with mmcv's addresses into the memory of offset and mask."""
    input, weight, bias, offset, mask, along = tensors
    channels, out, (kh, kw), stride, padding, dilation, groups, offset_groups = geometry
    n, _, height, width = along.shape
    result = torch.zeros_like(along)
    for b, o, y, x in itertools.product(range(n), range(out), range(height), range(width)):
        offsets, masks = offset[b].reshape(-1), mask[b].reshape(-1)
        total = bias[o].item()
        for c, i, j in itertools.product(range(channels // groups), range(kh), range(kw)):
            channel = o // (out // groups) * (channels // groups) + c
            group, tap = channel // (channels // offset_groups), i * kw + j
            at = ((2 * (group * kh * kw + tap)) * height + y) * width + x
            py = y * stride[0] - padding[0] + i * dilation[0] + offsets[at].item()
            px = x * stride[1] - padding[1] + j * dilation[1] + offsets[at + height * width].item()
            m = masks[((group * kh * kw + tap) * height + y) * width + x].item()
            total += weight[o, c, i, j].item() * m * sample(input[b, channel], py, px)
        result[b, o, y, x] = total
    return result


@pytest.mark.parametrize("positions", [(8, 7), (4, 9), (11, 5)])
def test_offsets_of_another_size_are_read_from_the_beginning_of_each_image(positions):
    """(4, 9) has as many rows as the output or fewer; what counts is how many numbers an image has."""
    geometry = (4, 2, (3, 2), (1, 1), (1, 0), (1, 1), 1, 2)
    tensors = draw(geometry, torch.float64, size=(5, 6), positions=positions)
    out, grads = run_v2(tensors, geometry)
    torch.testing.assert_close(out, loops(tensors, geometry), rtol=0, atol=1e-12)
    # Gradients: finite differences of one number in the part that is read, and one behind it.
    along = tensors[-1]
    for index, grad in ((3, grads[3]), (4, grads[4])):
        assert grad.shape == tensors[index].shape
        read = tensors[index][0].numel() * along[0, 0].numel() // math.prod(positions)
        flat = grad.flatten(1)
        assert (flat[:, read:] == 0).all() and (flat[:, :read] != 0).any() and read < flat.shape[1]
        for place in (0, read // 2, read - 1, read):
            values = []
            for step in (1e-6, -1e-6):
                moved = list(tensors)
                moved[index] = tensors[index].clone()
                moved[index].view(2, -1)[1, place] += step
                values.append((run_v2(moved, geometry)[0] * along).sum().item())
            assert flat[1, place].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)
    other = [views(t)[0] if t.dim() == 4 else t for t in tensors]
    for found, true in zip(run_v2(other, geometry)[1], grads, strict=True):
        torch.testing.assert_close(found, true, rtol=0, atol=1e-12)


def test_our_operator_takes_a_line_to_do_the_same():
    """The line that docs/operators.md gives; without it, our operator refuses."""
    geometry = (4, 2, (3, 2), (1, 1), (1, 0), (1, 1), 1, 2)
    tensors = draw(geometry, torch.float64, size=(5, 6), positions=(8, 7))
    input, weight, bias, offset, mask, along = tensors
    options = dict(padding=(1, 0), bias=bias)
    with pytest.raises(ValueError, match="offset: expected shape"):
        deform_conv2d(input, offset, weight, mask=mask, **options)
    h, w = along.shape[2:]
    offset, mask = (t.flatten(1)[:, : c * h * w].view(-1, c, h, w) for t, c in ((offset, 24), (mask, 12)))
    out = deform_conv2d(input, offset, weight, mask=mask, **options)
    torch.testing.assert_close(out, loops(tensors, geometry), rtol=0, atol=1e-12)


def test_offsets_that_are_too_small_are_refused():
    geometry = GEOMETRIES["plain"]
    tensors = draw(geometry, torch.float32, positions=(7, 5))
    with pytest.raises(ValueError, match=r"offset: expected 2 images of at least 18 x 7 x 6 numbers.*got shape"):
        run_v2(tensors, geometry)
    good = draw(geometry, torch.float32)
    good[4] = good[4][:1]
    with pytest.raises(ValueError, match=r"mask: expected 2 images"):
        run_v2(good, geometry)
    with pytest.raises(ValueError, match=r"offset: expected shape"):  # mmcv looks at v1's
        run_v1(draw(geometry, torch.float32, positions=(8, 8)), geometry)


# Regions


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_regions_move_by_x_and_y(shifted, sampling_ratio):
    """mmcv's offsets are (x, y), the reference's (y, x)."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 3, 8, 9, generator=generator, dtype=torch.float64)
    rois = torch.tensor([[0, 1.5, 2, 20, 13], [1, 0, 3, 31, 30], [1, 6, 6, 9, 9]], dtype=torch.float64)
    offset = torch.randn(3, 2, 2, 3, generator=generator, dtype=torch.float64) if shifted else input.new_zeros(0)
    options = dict(spatial_scale=0.25, sampling_ratio=sampling_ratio, gamma=0.3)
    given = input.clone().requires_grad_()
    shifts = offset.clone().requires_grad_()
    truth = reference.deform_roi_pool(
        given, rois, shifts.flip(1) if shifted else None, None, output_size=[2, 3], aligned=True, **options
    )
    along = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    truth.backward(along)
    options |= dict(pooled_height=2, pooled_width=3)
    output, grads = torch.zeros_like(truth), [torch.zeros_like(input), torch.zeros_like(offset)]
    FUNCTIONS["deform_roi_pool_forward"](input, rois, offset, output, **options)
    FUNCTIONS["deform_roi_pool_backward"](along, input, rois, offset, *grads, **options)
    torch.testing.assert_close(output, truth.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grads[0], given.grad, rtol=0, atol=1e-12)
    if shifted:
        assert shifts.grad.abs().max() > 0
        torch.testing.assert_close(grads[1], shifts.grad, rtol=0, atol=1e-12)


# Through mmcv's own layers


@pytest.fixture
def run(forks):
    pytest.importorskip("mmcv")
    return lambda code: forks.run(
        "import torch, warnings\nwarnings.simplefilter('ignore')\n"
        "from dcn_plugin.integrations import mmcv as stand_in\nstand_in.install()\nimport mmcv.ops\n"
        "close = torch.testing.assert_close\n" + code
    )


def test_mmcvs_published_numbers(run):
    """Inputs and results of mmcv's own tests (tests/test_ops of mmcv 2.2.0), which its compiled operators pass."""
    code = """
from mmcv.ops import DeformConv2dPack, DeformRoIPoolPack, ModulatedDeformConv2dPack

# test_deform_conv.py
x = torch.tensor([[[[1.0, 2, 3], [0, 1, 2], [3, 5, 2]]]], dtype=torch.float64).repeat(10, 1, 1, 1).requires_grad_()
layer = DeformConv2dPack(1, 1, 2, im2col_step=2).double()
weights = [.1, .4, .6, .1, .3, .2, .1, .3, .5, .5, .2, .8, .8, .3, .9, .1]
weights += [.3, .1, .2, .5, .3, .7, .5, .3, .6, .2, .5, .3, .4, .1, .8, .4]
layer.conv_offset.weight.data = torch.tensor(weights).double().view(8, 1, 2, 2)
layer.conv_offset.bias.data = torch.tensor([.7, .1, .8, .5, .6, .5, .4, .7]).double()
layer.weight.data = torch.tensor([[[[.4, .2], [.1, .9]]]]).double()
out = layer(x)
out.backward(torch.ones_like(out))
near = dict(rtol=1e-3, atol=1e-3)
close(out[3, 0], torch.tensor([[1.65, 0], [0, 0]]).double(), **near)
close(x.grad[7, 0], torch.tensor([[-.666, .204, 0], [.03, -.416, .012], [0, .252, .129]]).double(), **near)
close(layer.weight.grad / 10, torch.tensor([[[[3.62, 0], [.4, .18]]]]).double(), **near)
bias = torch.tensor([1.44, -.72, 0, 0, -.1, -.08, -.54, -.54]).double()
close(layer.conv_offset.bias.grad / 10, bias, **near)
# Each row of these four is the bias's gradient times what the window held.
close(layer.conv_offset.weight.grad / 10, bias.view(8, 1, 1, 1) * torch.tensor([[1.0, 2], [0, 1]]).double(), **near)
try:
    DeformConv2dPack(1, 1, 2, im2col_step=3).double()(x)
    raise SystemExit("10 is no multiple of 3")
except AssertionError as error:
    assert "divisible by im2col_step" in str(error)

# test_modulated_deform_conv.py
for dtype in (torch.float64, torch.float32, torch.float16):
    x = torch.tensor([[[[1.0, 2, 3]] * 3]]).to(dtype).requires_grad_()
    layer = ModulatedDeformConv2dPack(1, 1, 2, padding=1, bias=False).to(dtype)
    layer.weight.data.fill_(1)
    out = layer(x)
    out.sum().backward()
    rows = [[.5, 1.5, 2.5, 1.5], [1.0, 3, 5, 3], [1.0, 3, 5, 3], [.5, 1.5, 2.5, 1.5]]
    near = dict(rtol=1e-2, atol=1e-2)
    close(out[0, 0], torch.tensor(rows).to(dtype), **near)
    close(x.grad, torch.full_like(x, 2), **near)
    close(layer.weight.grad, torch.full_like(layer.weight, 9), **near)
    close(layer.conv_offset.bias.grad, torch.tensor([-3, -1.5] * 4 + [4.5] * 4).to(dtype), **near)
    found = layer.conv_offset.weight.grad.flatten(1)[[0, 1, 2, 3, 8, 11]]
    rows = [[-7, -4, 0, 0], [-9, 7.5, -6, 5], [-4, -7, 0, 0], [-7.5, -9, -5, -6], [10.5, 6, 7, 4], [4, 7, 6, 10.5]]
    close(found, torch.tensor(rows).to(dtype), **near)

# test_deform_roi_pool.py
square = [[1.0, 2], [3, 4]]
large = [[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]
a, b, c, d, e, f = 0.47265625, 0.4296875, 0.04296875, 0.390625, 0.0390625, 0.00390625
grad = [[3.0625, .4375], [.4375, .0625]]
for image, side, expected, gradient in (
    ([square], 1, [[[1, 1.25], [1.5, 1.75]]], [grad]),
    ([square, [[4.0, 3], [2, 1]]], 1, [[[1, 1.25], [1.5, 1.75]], [[4, 3.75], [3.5, 3.25]]], [grad, grad]),
    ([large], 3, [[[1.9375, 4.75], [7.5625, 10.375]]], [[[a, b, b, c], [b, d, d, e], [b, d, d, e], [c, e, e, f]]]),
):
    x = torch.tensor([image]).requires_grad_()
    rois = torch.tensor([[0.0, 0, 0, side, side]])
    out = DeformRoIPoolPack((2, 2), x.shape[1], sampling_ratio=2)(x, rois)
    out.backward(torch.ones_like(out))
    close(out, torch.tensor([expected]).float(), rtol=1e-3, atol=1e-6)
    close(x.grad, torch.tensor([gradient]), rtol=1e-3, atol=1e-6)
"""
    assert run(code) == ""


def test_gradients_of_mmcvs_functions_by_finite_differences(run):
    code = """
from mmcv.ops import deform_conv2d, deform_roi_pool, modulated_deform_conv2d
torch.manual_seed(0)
draw = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)
check = lambda f, given: torch.autograd.gradcheck(f, given, fast_mode=True)
x, weight, bias = draw(2, 4, 5, 6), draw(6, 2, 3, 2), draw(6)
geometry = (2, 1), (1, 2), (1, 2), 2, 2  # stride, padding, dilation, groups, offset groups
assert check(lambda *t: deform_conv2d(*t, *geometry), (x, draw(2, 24, 3, 8), weight))
assert check(lambda *t: deform_conv2d(*t, *geometry, False, 1), (x, draw(2, 24, 3, 8), weight))
for size in ((3, 8), (4, 9)):  # the output's, and another
    given = x, draw(2, 24, *size), draw(2, 12, *size), weight, bias
    assert check(lambda *t: modulated_deform_conv2d(*t, *geometry), given)
    assert check(lambda *t: modulated_deform_conv2d(*t, None, *geometry), given[:4])
rois = torch.tensor([[0, 1, 1, 14, 17], [1, 0, 3, 20, 12]], dtype=torch.float64)
assert check(lambda x, o: deform_roi_pool(x, rois, o, (2, 3), 0.25, 2, 0.2), (x, draw(2, 2, 2, 3)))
assert check(lambda x: deform_roi_pool(x, rois, None, (2, 3), 0.25, 0, 0.2), (x,))
"""
    assert run(code) == ""
