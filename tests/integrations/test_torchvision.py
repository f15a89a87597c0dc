"""torchvision's own operators on our kernels: reached from everywhere, the same numbers, and given back as they were.

The truth is `dcn_plugin.reference` in float64, finite differences, and torchvision's kernels themselves.
"""

from __future__ import annotations

import io
import math
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")

import torchvision
from torchvision.ops import deform_conv2d, roi_align  # imported before anything is served

from dcn_plugin import reference
from dcn_plugin.integrations import torchvision as integration
from dcn_plugin.integrations.torchvision import accelerate, installed, uninstall

OPERATORS = ("deform_conv2d", "_deform_conv2d_backward", "roi_align", "_roi_align_backward")
TYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.fixture(autouse=True)
def undone():
    yield
    uninstall()


def table() -> list[str]:
    return [torch._C._dispatch_dump(f"torchvision::{name}") for name in OPERATORS]


def calls(name: str) -> int:
    """A number that grows with each call of an operator of ours."""
    notes = (line.split("\t") for line in torch.ops.dcn_plugin._cpu_kernels_used().splitlines())
    return max((int(number) for op, number, *_ in notes if op == name), default=0)


def serves(call, *names: str) -> bool:
    """Whether a call runs our kernels of these names; either all or none."""
    before = [calls(name) for name in names]
    call()
    grown = {calls(name) > old for name, old in zip(names, before, strict=True)}
    assert len(grown) == 1
    return grown.pop()


def conv_arguments(dtype=torch.float32, n=2, groups=1, offset_groups=1, mask=True, layout="contiguous", stride=(1, 1),
                   dilation=(1, 1)):  # fmt: skip
    """Tensors (input, offset, weight, bias, mask) and options of a call that touches the border and goes beyond."""
    torch.manual_seed(0)
    padding, kernel, size = (1, 2), (3, 2), (7, 6)
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    tensors = [
        torch.randn(n, 4, *size), 2 * torch.randn(n, 12 * offset_groups, *out), torch.randn(6, 4 // groups, *kernel),
        torch.randn(6), torch.rand(n, 6 * offset_groups, *out) if mask else None,
    ]  # fmt: skip
    tensors = [None if t is None else (LAYOUTS[layout](t) if t.dim() == 4 else t).to(dtype) for t in tensors]
    return [None if t is None else t.requires_grad_() for t in tensors], dict(
        stride=stride, padding=padding, dilation=dilation
    )


def convolved(operator, tensors, options) -> list[Tensor]:
    """The result and the gradients of all tensors."""
    input, offset, weight, bias, mask = tensors
    out = operator(input, offset, weight, bias, mask=mask, **options)
    return [out, *torch.autograd.grad(out, [t for t in tensors if t is not None], torch.ones_like(out))]


CONVOLUTIONS = [
    dict(),
    dict(mask=False),
    dict(n=0),
    dict(n=37),
    dict(groups=2, offset_groups=2, stride=(2, 1)),
    dict(groups=2, offset_groups=4, dilation=(2, 1), mask=False),
    dict(offset_groups=2, stride=(2, 2), dilation=(1, 2), layout="channels_last"),
    dict(layout="transposed"),
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_convolution_and_its_gradients_are_those_of_the_definition(dtype, options):
    tensors, how = conv_arguments(dtype, **options)
    with accelerate():
        found = convolved(deform_conv2d, tensors, how)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    for mine, truth in zip(found, convolved(reference.deform_conv2d, exact, how), strict=True):
        assert mine.dtype == dtype and mine.shape == truth.shape
        scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
        torch.testing.assert_close(mine.double() / scale, truth / scale, rtol=0, atol=TYPES[dtype])


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_and_its_gradients_are_torchvisions_in_value_and_layout(options):
    tensors, how = conv_arguments(torch.float64, **options)
    before = convolved(deform_conv2d, tensors, how)
    with accelerate():
        assert serves(lambda: convolved(deform_conv2d, tensors, how), "deform_conv2d", "deform_conv2d_backward")
        after = convolved(deform_conv2d, tensors, how)
    for mine, theirs in zip(after, before, strict=True):
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def boxes(dtype=torch.float32, count=40, inside_out=False) -> Tensor:
    """Regions inside of a map of 12 x 10 at stride 4, partly and wholly outside, large and small."""
    torch.manual_seed(1)
    corners = torch.rand(count, 4) * 70 - 15
    if not inside_out:
        corners = corners.view(-1, 2, 2).sort(1).values.flatten(1)
    whole = torch.tensor([[0, 0, 40, 48], [-4, -4, 0, 0], [40, 48, 60, 80], [-8, -8, 56, 48], [8, 8, 8, 8]]).float()
    corners = torch.cat([corners, whole])
    return torch.cat([torch.arange(len(corners))[:, None] % 2, corners], 1).to(dtype)


def pooled(input, rois, **how) -> list[Tensor]:
    out = roi_align(input, rois, **how)
    return [out, *torch.autograd.grad(out, [input], torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [-1, 0, 1, 3])
def test_pooling_and_its_gradient_are_torchvisions_in_value_and_layout(layout, aligned, sampling_ratio):
    how = dict(output_size=(3, 2), spatial_scale=0.25, sampling_ratio=sampling_ratio, aligned=aligned)
    image = LAYOUTS[layout](torch.randn(2, 5, 12, 10))
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        # torchvision refuses regions that are inside out, where it chooses the number of samples itself.
        input, rois = image.to(dtype).requires_grad_(), boxes(dtype, inside_out=sampling_ratio > 0)
        before = pooled(input, rois, **how)
        with accelerate():
            assert serves(partial(pooled, input, rois, **how), "deform_roi_pool", "deform_roi_pool_backward")
            after = pooled(input, rois, **how)
        for mine, theirs in zip(after, before, strict=True):
            assert mine.stride() == theirs.stride()
            torch.testing.assert_close(mine, theirs, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pooling_in_half_precision_is_that_of_the_definition(dtype):
    input, rois = torch.randn(2, 5, 12, 10).to(dtype).requires_grad_(), boxes(dtype)
    with accelerate():
        found = pooled(input, rois, output_size=3, spatial_scale=0.25)
    exact = reference.deform_roi_pool(
        input.double(), rois.double(), output_size=[3, 3], spatial_scale=0.25, aligned=False
    )
    torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=2e-2)


def test_no_regions_and_no_images():
    with accelerate():
        for images, count in ((2, 0), (0, 0)):
            input = torch.randn(images, 3, 6, 6, requires_grad=True)
            out = roi_align(input, torch.zeros(count, 5), 2)
            out.sum().backward()
            assert out.shape == (count, 3, 2, 2) and not input.grad.any()


# What becomes ours where torchvision raises, is silently wrong, or reads what it should not.


def test_second_gradients():
    tensors, how = conv_arguments(torch.float64, n=1, groups=2, offset_groups=2)
    tensors[1].data.clamp_(-0.4, 0.4).add_(0.05)  # away from whole positions, where the derivative jumps
    input = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0.3, 0.2, 5.1, 4.9]], dtype=torch.float64)

    def convolve(input, offset, weight, bias, mask):
        return deform_conv2d(input, offset, weight, bias, mask=mask, **how)

    with pytest.raises(RuntimeError, match="double backwards"):
        torch.autograd.gradgradcheck(convolve, tensors, fast_mode=True)
    with accelerate():
        assert torch.autograd.gradgradcheck(convolve, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda t: roi_align(t, rois, 3), [input])


def test_forward_mode_and_functional_gradients():
    tensors, how = conv_arguments(torch.float64)
    values = [t.detach() for t in tensors]
    along = [torch.randn_like(t) for t in values]
    input, rois = torch.randn(2, 3, 12, 10, dtype=torch.float64), boxes(torch.float64)

    def through(operator):
        return lambda i, o, w, b, m: operator(i, o, w, b, mask=m, **how)

    def pool(input):
        return roi_align(input, rois, 3, 0.25, 2)

    truth = torch.func.jvp(through(reference.deform_conv2d), tuple(values), tuple(along))[1]
    slope = torch.autograd.grad(through(deform_conv2d)(*tensors).square().sum(), tensors)
    assert truth.abs().max() > 1
    with accelerate():
        torch.testing.assert_close(torch.func.jvp(through(deform_conv2d), tuple(values), tuple(along))[1], truth)
        own = torch.func.grad(lambda *t: through(deform_conv2d)(*t).square().sum(), argnums=tuple(range(5)))(*values)
        torch.testing.assert_close(list(own), list(slope))
        # Pooling is linear.
        torch.testing.assert_close(torch.func.jvp(pool, (input,), (input,))[1], pool(input))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(input, input)
            tangent = torch.autograd.forward_ad.unpack_dual(pool(dual)).tangent
            torch.testing.assert_close(tangent, pool(input))


def test_vmap_is_still_torchs_sample_by_sample():
    tensors, how = conv_arguments()
    input, offset, weight, _, mask = (t.detach() for t in tensors)

    def one(input, offset, mask):
        return deform_conv2d(input[None], offset[None], weight, mask=mask[None], **how)[0]

    with accelerate(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the performance
        found = torch.func.vmap(one)(input, offset, mask)
        torch.testing.assert_close(found, deform_conv2d(input, offset, weight, mask=mask, **how))


def test_bfloat16_autocast_and_float32_offsets():
    tensors, how = conv_arguments()
    truth = convolved(reference.deform_conv2d, tensors, how)

    def within_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            out = deform_conv2d(*tensors[:4], mask=tensors[4], **how)
        return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]

    half = [t.detach().bfloat16() for t in tensors]
    mixed = [half[0], tensors[1].detach(), *half[2:4], tensors[4].detach()]

    def of(tensors):
        return convolved(deform_conv2d, [t.detach().requires_grad_() for t in tensors], how)

    for call in (lambda: of(half), lambda: of(mixed)):
        with pytest.raises(RuntimeError):
            call()
    with accelerate():
        for found in (within_autocast(), torch.compile(within_autocast, backend="aot_eager")(), of(mixed)):
            assert found[0].dtype == torch.bfloat16
            for mine, exact in zip(found, truth, strict=True):
                scale = exact.abs().max().item()
                torch.testing.assert_close(mine.float() / scale, exact / scale, rtol=0, atol=2e-2)
        assert [g.dtype for g in of(mixed)[1:]] == [t.dtype for t in mixed]
        assert {g.dtype for g in within_autocast()[1:]} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):  # torchvision's rule: computed in float32, in the type it came in
            assert roi_align(half[0], boxes(torch.bfloat16), 3, 0.25).dtype == torch.bfloat16


def one_tap(y: float, x: float = 1.0, pixel: float = 1.0):
    """A 1x1 kernel on a map of ones, but for a last row of `pixel`, with its tap at (y, x): value, derivative by y."""
    input = torch.full((1, 1, 3, 3), 1.0)
    input[0, 0, 2] = pixel
    offset = torch.tensor([y, x]).view(1, 2, 1, 1).requires_grad_()
    out = deform_conv2d(input, offset, torch.ones(1, 1, 1, 1), stride=(3, 3))
    (slope,) = torch.autograd.grad(out, offset)
    return out.item(), slope[0, 0].item()


def test_the_documented_differences():
    """docs/migrating.md lists these: the border, positions and pixels that are not finite."""
    nan, inf = float("nan"), float("inf")
    assert one_tap(-1.0) == (0, 1)
    assert one_tap(1.0, x=inf)[0] == 0 and math.isnan(one_tap(1.0, x=inf)[1])
    assert math.isnan(one_tap(1.0, pixel=nan)[0])
    with accelerate():
        assert one_tap(-1.0) == (0, 0)
        assert one_tap(-0.5) == (0.5, 1)
        assert one_tap(1.0, x=inf) == one_tap(-inf) == (0, 0)
        assert one_tap(1.0, pixel=nan)[0] == 1
        assert math.isnan(one_tap(nan)[0])
        inside_out = torch.tensor([[0, 3, 1, 1, 3.0]])
        assert not roi_align(torch.ones(1, 1, 4, 4), inside_out, 2, aligned=True).any()
        for row, words in (([2, 0, 0, 1, 1], "a batch index from 0 to 1"), ([0, nan, 0, 1, 1], "finite")):
            with pytest.raises(ValueError, match=f"rois: expected {words}"):
                roi_align(torch.zeros(2, 1, 4, 4), torch.tensor([row], dtype=torch.float32), 2)


# What stays torchvision's.


def test_errors_are_torchvisions():
    tensors, how = conv_arguments()
    input, offset, weight, bias, mask = (t.detach() for t in tensors)
    wrong = [
        lambda: deform_conv2d(input, offset[:, :2], weight, padding=(1, 2)),
        lambda: deform_conv2d(input, offset, weight, mask=mask[:, :2], padding=(1, 2)),
        lambda: deform_conv2d(input, offset[:, :, 1:], weight, padding=(1, 2)),
        lambda: deform_conv2d(input, offset, weight.double(), padding=(1, 2)),
        lambda: roi_align(input, boxes(torch.float64), 3),
        lambda: roi_align(input, torch.zeros(2, 4), 3),
    ]

    def said():
        found = []
        for call in wrong:
            with pytest.raises((RuntimeError, AssertionError)) as caught:
                call()
            found.append((type(caught.value), str(caught.value).splitlines()[0]))
        return found

    before = said()
    with accelerate():
        assert said() == before


class Block(nn.Module):
    """Both operators, with offsets from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = nn.Conv2d(4, 27, 3, padding=1)
        self.convolve = torchvision.ops.DeformConv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        offset, mask = self.predict(x).split((18, 9), 1)
        return roi_align(self.convolve(x, offset, mask.sigmoid()), rois, 2, 0.25)


def block():
    torch.manual_seed(0)
    return Block(), (torch.randn(2, 4, 12, 10), boxes())


OURS = ("deform_conv2d", "deform_roi_pool")


def saved_and_loaded(model, arguments):
    kept = io.BytesIO()
    torch.export.save(torch.export.export(model, arguments), kept)
    kept.seek(0)
    return torch.export.load(kept).module()


MAKERS = {
    "module": lambda model, arguments: model,
    "compiled": lambda model, arguments: torch.compile(model, fullgraph=True, backend="aot_eager"),
    "exported": lambda model, arguments: torch.export.export(model, arguments).run_decompositions().module(),
    "saved": saved_and_loaded,
    "traced": torch.jit.trace,
    "scripted": lambda model, arguments: torch.jit.script(model),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_made_before_or_meanwhile_follows_the_switch(maker):
    """What a module became holds torchvision's operators, whenever it was made: they run on ours while that is on."""
    model, arguments = block()
    before = MAKERS[maker](model, arguments)
    with torch.no_grad():
        truth = before(*arguments)
        with accelerate():
            torch._dynamo.reset()
            meanwhile = MAKERS[maker](model, arguments)
            for made in (meanwhile, before):
                assert serves(lambda made=made: made(*arguments), *OURS)
                torch.testing.assert_close(made(*arguments), truth, rtol=1e-4, atol=1e-4)
        for made in (meanwhile, before):
            assert not serves(lambda made=made: made(*arguments), *OURS)
            torch.testing.assert_close(made(*arguments), truth, rtol=1e-4, atol=1e-4)


def graph_holds_only_torchvisions(graph: torch.fx.GraphModule) -> set[str]:
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "dcn_plugin" in name]
    return {name for name in names if "torchvision" in name}


def test_compiled_graphs_hold_torchvisions_operators_forward_and_backward():
    """So compiled code, in memory and in caches on disk, is the same with and without."""
    from torch._dynamo.backends.common import aot_autograd

    model, (x, rois) = block()
    held: list[set[str]] = []

    def look(graph, _):
        held.append(graph_holds_only_torchvisions(graph))
        return graph

    with accelerate():
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=look))
        compiled(x, rois).sum().backward()
        assert serves(
            lambda: compiled(torch.cat([x, x]), rois[::2]).sum().backward(),
            *OURS,
            *(f"{name}_backward" for name in OURS),
        )
    forward = {"torchvision.deform_conv2d.default", "torchvision.roi_align.default"}
    backward = {"torchvision._deform_conv2d_backward.default", "torchvision._roi_align_backward.default"}
    assert len(held) >= 2 and all(pair == (forward, backward) for pair in zip(held[::2], held[1::2], strict=True))


def test_opcheck():
    tensors, how = conv_arguments(groups=2)
    input, offset, weight, bias, mask = tensors
    pairs = [n for name in ("stride", "padding", "dilation") for n in how[name]]
    with accelerate():
        torch.library.opcheck(
            torch.ops.torchvision.deform_conv2d.default, (input, weight, offset, mask, bias, *pairs, 2, 1, True)
        )
        torch.library.opcheck(torch.ops.torchvision.roi_align.default, (input, boxes(), 0.25, 3, 2, 0, True))


class Convolution(nn.Module):
    def forward(self, x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(x, offset, weight)


def test_a_package_of_aotinductor_follows_the_switch(tmp_path):
    """Its C++ calls the operators by itself, without torchvision's Python."""
    tensors, _ = conv_arguments()
    arguments = (tensors[0].detach(), torch.randn(2, 12, 5, 5), tensors[2].detach())
    path = str(tmp_path / "convolution.pt2")
    torch._inductor.aoti_compile_and_package(
        torch.export.export(Convolution(), arguments),
        package_path=path,
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    loaded, truth = torch._inductor.aoti_load_package(path), Convolution()(*arguments)
    assert not serves(lambda: loaded(*arguments), "deform_conv2d")
    with accelerate():
        assert serves(lambda: loaded(*arguments), "deform_conv2d")
        torch.testing.assert_close(loaded(*arguments), truth, rtol=1e-4, atol=1e-4)
    assert not serves(lambda: loaded(*arguments), "deform_conv2d")


# The switch.


def test_it_is_off_until_asked_for_and_undone_exactly():
    before, (tensors, how) = table(), conv_arguments()
    truth = convolved(deform_conv2d, tensors, how)
    assert installed() == () and "dcn_plugin" not in "".join(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with accelerate() as asked:
            assert installed() == asked.operators == integration.OPERATORS
            assert "dcn_plugin" in table()[0] and "dcn_plugin" in table()[2]
    assert table() == before and installed() == ()
    after = convolved(deform_conv2d, tensors, how)
    assert all(torch.equal(*pair) for pair in zip(truth, after, strict=True))
    with pytest.raises(RuntimeError, match="double backwards"):
        torch.autograd.grad(deform_conv2d(*tensors[:3], **how).sum(), tensors[0], create_graph=True)[0].sum().backward()


def test_an_operator_is_served_until_all_who_asked_have_withdrawn():
    before = table()
    both, conv = accelerate(), accelerate(["deform_conv2d", "deform_conv2d"])
    with accelerate(("roi_align",)) as pool:
        both.undo()
        both.undo()
        assert set(installed()) == {"deform_conv2d", "roi_align"}
    assert installed() == conv.operators == ("deform_conv2d",)
    assert table()[2:] == before[2:] and table()[:2] != before[:2]
    conv.undo()
    assert installed() == () and table() == before
    first, second = accelerate(), accelerate()
    uninstall()
    assert installed() == () and table() == before
    third = accelerate()
    first.undo(), second.undo(), pool.undo()  # they have nothing to withdraw any more
    assert installed() == integration.OPERATORS
    third.undo()
    with pytest.raises(KeyError), accelerate():
        raise KeyError
    assert table() == before


@pytest.mark.parametrize("fails_at", [3, 7])
def test_nothing_is_served_after_an_error_half_way(monkeypatch, fails_at):
    """While the first operator's kernels are put in place, and after it is served."""
    before, put, left = table(), torch.library.Library.impl, iter(range(fails_at))

    def impl(*args, **options):
        if next(left, None) is None:
            raise MemoryError
        return put(*args, **options)

    with monkeypatch.context() as changed:
        changed.setattr(torch.library.Library, "impl", impl)
        with pytest.raises(MemoryError):
            accelerate()
    assert installed() == () and table() == before
    with accelerate():
        assert installed() == integration.OPERATORS
    assert table() == before


def test_only_what_was_chosen_is_served():
    model, arguments = block()
    with accelerate(["roi_align"]):
        assert serves(lambda: model(*arguments), "deform_roi_pool")
        assert not serves(lambda: model(*arguments), "deform_conv2d")


def test_it_says_what_it_replaced_once_in_one_line(caplog):
    with caplog.at_level("INFO", logger="dcn_plugin"), accelerate(["deform_conv2d"]) as asked:
        pass
    assert [record.getMessage() for record in caplog.records] == [str(asked)]
    assert torchvision.__version__ in str(asked) and "deform_conv2d on the CPU" in str(asked) and "\n" not in str(asked)
