"""One case per operator: its configurations, over which every contract runs, and how to call what is compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import TorchDispatchMode

from dcn_plugin import ops, reference

# Largest error relative to the largest magnitude, against float64 arithmetic on the same stored values.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Compare with the tolerance of `dtype`, relative to the largest expected magnitude; NaN must meet NaN."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in other places"
    if actual.numel() == 0:
        return
    error = (actual - expected).abs().nan_to_num(0).max().item()
    scale = max(expected.abs().nan_to_num(0).max().item(), 1e-3)
    assert error <= TOLERANCE[dtype] * scale, f"{what}: error {error:.3g} on a scale of {scale:.3g}"


class Calls(TorchDispatchMode):
    """Collects the arguments of every call of a compiled operator."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op, self.found = op, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is self.op:
            self.found.append(args)
        return function(*args, **kwargs or {})


@dataclass(frozen=True)
class OpCase:
    """An operator: `make(dtype)` gives keyword arguments; tensors among them that float are differentiable."""

    name: str  # in dcn_plugin.ops, dcn_plugin.reference and torch.ops.dcn_plugin
    configs: dict[str, Callable[[], dict[str, Any]]]  # float64 arguments on the CPU, seeded by the test
    real: dict[str, Callable[[], dict[str, Any]]]  # as large as in models, for GPUs; the first also for graphs, streams
    threaded: dict[str, Callable[[], dict[str, Any]]]  # which threads of the CPU share, for the sanitizers
    full: str  # the configuration with every argument
    bare: str  # the one with as few as can be
    mixed: str  # the one with groups and classes, in which no two sizes are equal
    sizes: tuple[Callable[[], dict[str, Any]], ...]  # one in several sizes; no two numbers equal, 2 for (y, x) included
    per_result: tuple[str, ...]  # arguments whose first dimension is the result's
    image: str = "input"  # the argument whose type and layout the result takes
    of_images: bool = True  # else results are contiguous, whatever the layout of that argument
    dynamic: tuple[tuple[int, ...], ...] = ((0, 2, 3),)  # dimensions of the first arguments that differ in `sizes`
    float32_beside_half: tuple[str, ...] = ()  # arguments that may be float32 beside a half-precision image

    def make(
        self, config: str, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        torch.manual_seed(seed)
        return convert(self.configs[config](), dtype=dtype, device=device)

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(ops, self.name)

    @property
    def reference(self) -> Callable[..., Tensor]:
        return getattr(reference, self.name)

    @property
    def of_regions(self) -> bool:
        return "rois" in self.per_result

    @property
    def adds_atomically(self) -> bool:
        """Whether the portable backward adds in any order, but in torch's deterministic mode."""
        return self.of_regions or self.name in ("ms_deform_attn", "deform_aggregate2d")

    @property
    def op(self) -> Any:
        return getattr(torch.ops.dcn_plugin, self.name).default

    @property
    def backward_op(self) -> Any:
        return getattr(torch.ops.dcn_plugin, f"{self.name}_backward").default

    def to_op(self, **arguments: Any) -> dict[str, Any]:
        """Arguments of the function -> of the compiled operator, in order: options as the function hands them on.

        It is asked with tensors that have no memory, so regions that it would refuse are no matter.
        """

        def without_memory(v: Any) -> Any:
            return torch.empty(v.shape, dtype=v.dtype, device="meta") if isinstance(v, Tensor) else v

        with temporarily_clear_interpreter_stack(), Calls(self.op) as calls:
            self.function(**{k: without_memory(v) for k, v in arguments.items()})
        (found,) = calls.found
        given = dict(zip([a.name for a in self.op._schema.arguments], found, strict=True))

        def own(name: str, handed_on: Any) -> Any:
            value = arguments.get(name)
            # Some functions merge dimensions.
            merged = isinstance(value, Tensor) and value.dim() != handed_on.dim()
            return value.reshape(handed_on.shape) if merged else value

        return {k: own(k, v) if v is None or isinstance(v, Tensor) else v for k, v in given.items()}

    def to_backward(self, grad_output: Tensor, wanted: int, **arguments: Any) -> dict[str, Any]:
        """The same for the compiled backward."""
        given = {"grad_output": grad_output, **self.to_op(**arguments), "wanted": wanted}
        return {a.name: given[a.name] for a in self.backward_op._schema.arguments}

    def compiled(self, **arguments: Any) -> Tensor:
        """The compiled operator, which looks at no values: what graphs call, and what runs on CUDA."""
        return self.op(*self.to_op(**arguments).values())


def convert(arguments: dict[str, Any], **to: Any) -> dict[str, Any]:
    return {k: v.to(**to) if isinstance(v, Tensor) else v for k, v in arguments.items()}


CONSTANT = ("rois",)  # tensors that no gradient flows to


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that can be differentiated by."""
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor) and k not in CONSTANT}


def leaves(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with every such tensor a leaf that wants a gradient."""
    return {k: v.detach().requires_grad_() if k in tensors(arguments) else v for k, v in arguments.items()}


def run(function: Callable[..., Tensor], arguments: dict[str, Any], grad: Tensor | None = None) -> dict[str, Tensor]:
    """Value and gradients, by name; the gradient of the output is `grad` or ones."""
    arguments = leaves(arguments)
    out = function(**arguments)
    wanted = tensors(arguments)
    grads = torch.autograd.grad(out, list(wanted.values()), torch.ones_like(out) if grad is None else grad.to(out))
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(wanted, grads, strict=True)}}


def set_to_zero(call: Callable[[], Any]) -> list[torch.Size]:
    """Return the shapes of the tensors that a call fills with zeros."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        call()
    return [torch.Size(event.input_shapes[0]) for event in seen.events() if event.name == "aten::zero_"]


def _off_the_pixels(offset: Tensor) -> Tensor:
    """The nearest odd multiples of 2^-12: with a pixel's place they are exact in float32, and never whole.

    Gradients of offsets jump at whole pixels, where rounding would choose the side.
    """
    return ((offset * 2048).floor() + 0.5) / 2048


def deform_conv2d_arguments(
    shape=(2, 4, 7, 9), out=6, kernel=(3, 3), stride=1, padding=1, dilation=1, groups=1, offset_groups=1, mask=True,
    bias=True, spread=2.0,
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    def make() -> dict[str, Any]:
        n, c, h, w = shape
        pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
        pads = pairs[1] if len(pairs[1]) == 4 else pairs[1] * 2
        size = [
            (s + pads[i] + pads[i + 2] - pairs[2][i] * (kernel[i] - 1) - 1) // pairs[0][i] + 1
            for i, s in enumerate((h, w))
        ]
        taps = kernel[0] * kernel[1]
        double = dict(dtype=torch.float64)
        arguments: dict[str, Any] = {
            "input": torch.randn(shape, **double),
            "offset": _off_the_pixels(spread * torch.randn(n, 2 * offset_groups * taps, *size, **double)),
            "weight": torch.randn(out, c // groups, *kernel, **double) / (c // groups * taps) ** 0.5,
            "stride": stride, "padding": padding, "dilation": dilation,
        }  # fmt: skip
        if bias:
            arguments["bias"] = torch.randn(out, **double)
        if mask:
            arguments["mask"] = torch.rand(n, offset_groups * taps, *size, **double) * 2
        return arguments

    return make


def _regions(count: int, batch: int, height: int, width: int, scale: float) -> Tensor:
    """Random regions of all sizes, some reaching out of the image, one of a point, one of the whole image."""
    size = torch.tensor([width, height, width, height], dtype=torch.float64) / scale
    corners = (torch.rand(count, 4, dtype=torch.float64) * 1.4 - 0.2) * size
    low, high = corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])
    rois = torch.cat([torch.randint(batch, (count, 1)).double(), low, high], 1)
    rois[0, 1:] = torch.tensor([5.0, 6.0, 5.0, 6.0])
    rois[1, 1:] = torch.tensor([0.0, 0.0, *size[:2].tolist()])
    return rois


def deform_roi_pool_arguments(
    shape=(2, 4, 7, 9), regions=6, bins=(3, 2), sampling_ratio=2, aligned=True, offset=True, mask=True, spread=3.0,
    spatial_scale=0.25,
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    def make() -> dict[str, Any]:
        double = dict(dtype=torch.float64)
        arguments: dict[str, Any] = {
            "input": torch.randn(shape, **double),
            "rois": _regions(regions, shape[0], *shape[2:], spatial_scale),
            "output_size": bins, "spatial_scale": spatial_scale, "sampling_ratio": sampling_ratio, "gamma": 0.1,
            "aligned": aligned,
        }  # fmt: skip
        if offset:
            arguments["offset"] = spread * torch.randn(regions, 2, *bins, **double)
        if mask:
            arguments["mask"] = torch.rand(regions, 1, *bins, **double) * 2
        return arguments

    return make


def deform_ps_roi_pool_arguments(
    shape=(2, 16, 7, 9), regions=6, output_dim=4, group_size=2, bins=(4, 2), parts=None, classes=1, samples_per_part=2,
    offset=True, mask=True, spread=3.0, spatial_scale=0.25,
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    def make() -> dict[str, Any]:
        double = dict(dtype=torch.float64)
        arguments: dict[str, Any] = {
            "input": torch.randn(shape, **double),
            "rois": _regions(regions, shape[0], *shape[2:], spatial_scale),
            "output_dim": output_dim, "group_size": group_size, "output_size": bins, "part_size": parts,
            "samples_per_part": samples_per_part, "spatial_scale": spatial_scale, "offset_scale": 0.1,
        }  # fmt: skip
        if offset:
            arguments["offset"] = spread * torch.randn(regions, 2 * classes, *(parts or bins), **double)
        if mask:
            arguments["mask"] = torch.rand(regions, classes, *(parts or bins), **double) * 2
        return arguments

    return make


def ps_roi_pool_arguments(
    shape=(2, 16, 7, 9), regions=6, output_dim=4, group_size=2, bins=(2, 2), spatial_scale=0.25
) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        return {
            "input": torch.randn(shape, dtype=torch.float64),
            "rois": _regions(regions, shape[0], *shape[2:], spatial_scale),
            "output_dim": output_dim, "group_size": group_size, "output_size": bins, "spatial_scale": spatial_scale,
        }  # fmt: skip

    return make


def ms_deform_attn_arguments(
    shape=(2, 3, 5), levels=((6, 8), (3, 4)), queries=7, points=2, reference=0, one_reference=False, weights=True,
    softmax=False, merged=False, strided=False, spread=0.2,
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    """`shape` is (images, heads, channels); `points` of each level; `reference` how many numbers one has."""

    def make() -> dict[str, Any]:
        (n, heads, channels), double = shape, dict(dtype=torch.float64)
        each = [points] * len(levels) if isinstance(points, int) else list(points)
        near = torch.rand(n, queries, 1 if one_reference else len(levels), max(reference, 2), **double)
        given = []
        for level, (size, count) in enumerate(zip(levels, each, strict=True)):
            extent = torch.tensor(size[::-1], **double)
            at = (torch.rand(n, queries, heads, count, 2, **double) * (1 + 2 * spread) - spread) * extent
            at = at.floor() + 0.1 + 0.8 * (at - at.floor())  # in pixels, away from kinks
            own = near[:, :, min(level, near.shape[2] - 1), None, None]
            unit = extent if not reference else own[..., 2:] * extent * (0.5 / count) if reference == 4 else 1
            given.append((at + 0.5 - (own[..., :2] * extent if reference else 0)) / unit)
        locations, logits = torch.cat(given, 3), torch.randn(n, queries, heads, sum(each), **double)
        if not merged:
            locations, logits = (t.unflatten(3, (len(levels), -1)) for t in (locations, logits))
        value = torch.randn(n, sum(h * w for h, w in levels), heads, channels, **double)
        if strided:
            value, locations = value.transpose(1, 2).contiguous().transpose(1, 2), locations.mT.contiguous().mT
        arguments: dict[str, Any] = {
            "value": value, "spatial_shapes": [list(size) for size in levels], "sampling_locations": locations,
        }  # fmt: skip
        if weights:
            arguments["attention_weights"] = logits
        if reference:
            arguments["reference_points"] = near
        return arguments | {"softmax": softmax, "points": each if merged else None, "offset_scale": 0.5}

    return make


def deform_aggregate2d_arguments(
    shape=(2, 6, 7, 12), groups=3, kernel=(3, 3), stride=1, padding=1, dilation=1, offset_scale=1.0,
    remove_center=False, softmax=False, official_order=False, weight=True, packed=False, strided=False, spread=1.5,
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    """`shape` is [N, H, W, C]; `packed`: a slice of a wider tensor, as the layer has it."""

    def make() -> dict[str, Any]:
        double = dict(dtype=torch.float64)
        pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
        pads = pairs[1] if len(pairs[1]) == 4 else pairs[1] * 2
        size = [
            (s + pads[i] + pads[i + 2] - pairs[2][i] * (kernel[i] - 1) - 1) // pairs[0][i] + 1
            for i, s in enumerate(shape[1:3])
        ]
        taps = kernel[0] * kernel[1] - remove_center
        given = spread * torch.randn(shape[0], *size, groups, taps, 2, **double)
        # Away from kinks, scaled by 1/2, 1 or 2.
        given = given.floor() + 0.1 + 0.3 * (given - given.floor())
        weights = torch.randn(shape[0], *size, groups, taps, **double)
        value = torch.randn(shape, **double)
        if strided:
            value = value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
            given, weights = given.mT.contiguous().mT, weights.transpose(3, 4).contiguous().transpose(3, 4)
        arguments: dict[str, Any] = {"value": value, "offset": given}
        if packed:
            wide = torch.cat([given.flatten(4), weights], 4).flatten(3)
            wide = torch.nn.functional.pad(wide, (0, 5))
            arguments["offset"] = wide[..., :-5].unflatten(3, (groups, 3 * taps))
        elif weight:
            arguments["weight"] = weights
        return arguments | {
            "kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation,
            "offset_scale": offset_scale, "remove_center": remove_center, "softmax": softmax,
            "official_order": official_order,
        }  # fmt: skip

    return make


_make = deform_conv2d_arguments
_gather = deform_aggregate2d_arguments
_attend = ms_deform_attn_arguments
_PYRAMID = ((13, 17), (7, 9), (4, 5), (2, 3))
_align, _part, _pixels = deform_roi_pool_arguments, deform_ps_roi_pool_arguments, ps_roi_pool_arguments
CASES = [
    OpCase(
        "deform_conv2d",
        {
            "v2": _make(),
            "v1": _make(mask=False, bias=False),
            "groups": _make((2, 8, 6, 7), out=12, groups=2, offset_groups=4),
            "offset_groups_across_groups": _make((1, 12, 6, 6), out=6, groups=3, offset_groups=2),
            "rectangular": _make(kernel=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
            "four_sided": _make(padding=(0, 1, 2, 3)),
            "depthwise": _make((2, 24, 6, 5), out=24, groups=24, offset_groups=2, kernel=(5, 3), padding=(2, 1)),
            "depthwise_multiplier": _make((1, 6, 5, 5), out=12, groups=6, mask=False),
            "pointwise": _make(kernel=(1, 1), padding=0),
            "one_channel": _make((3, 1, 8, 8), out=1),
            "far": _make(spread=20.0),
            "many_channels": _make((1, 300, 5, 4), out=5, mask=True),
            "larger_than_input": _make((1, 3, 2, 3), kernel=(5, 5), padding=3),
            "few_pixels": _make((1, 6, 3, 3), out=32, groups=2, offset_groups=2),
            "few_pixels_many_channels": _make((1, 600, 2, 2), out=16, groups=2),
            "many_tiles": _make((3, 20, 31, 29), out=8, groups=4, offset_groups=2),
        },
        real={
            "c64": _make((3, 64, 24, 20), out=64),
            "c128-to-96": _make((2, 128, 15, 13), out=96),
            "c256": _make((4, 256, 14, 14), out=256, bias=False),
            "c512": _make((3, 512, 7, 7), out=512, spread=1.0),
            "c72-to-40": _make((1, 72, 11, 9), out=40, mask=False),
            "stride-dilation": _make((2, 64, 19, 22), out=128, stride=2, dilation=2, padding=(2, 1, 0, 3)),
            "offset-groups": _make((2, 128, 13, 17), out=64, offset_groups=4),
            "groups": _make((2, 128, 12, 10), out=192, groups=4, offset_groups=2),
            "depthwise": _make((2, 64, 14, 15), out=64, groups=64, offset_groups=4),
            "kernel-5x3": _make((2, 32, 12, 11), out=48, kernel=(5, 3), padding=(2, 1)),
            "pointwise": _make((2, 192, 9, 16), out=64, kernel=(1, 1), padding=0),
            "far": _make((2, 64, 12, 12), out=64, spread=25.0),
            "small-conv": _make((1, 64, 9, 7), out=64),
        },
        threaded={
            "conv": _make((2, 20, 26, 24), out=24),
            "conv_lanes": _make((1, 160, 14, 15), out=40),
            "conv_images": _make((5, 70, 10, 9), out=18, mask=False),
            "conv_groups": _make((3, 64, 12, 13), out=64, groups=4, offset_groups=2),
            "conv_depthwise": _make((2, 96, 13, 12), out=96, kernel=(5, 5), padding=2, groups=96, offset_groups=3),
            "conv_few_pixels": _make((1, 200, 4, 3), out=70),
            "conv_far": _make((2, 20, 40, 44), out=24, spread=15.0),
        },
        full="v2",
        bare="v1",
        mixed="groups",
        sizes=tuple(_make(shape) for shape in ((2, 4, 13, 11), (3, 4, 8, 19), (5, 4, 12, 6))),
        per_result=("input", "offset", "mask"),
        float32_beside_half=("offset", "mask"),
    ),
    OpCase(
        "deform_aggregate2d",
        {
            "weights": _gather(),
            "packed": _gather(packed=True, official_order=True),
            "plain": _gather(weight=False),
            "softmax": _gather((1, 5, 6, 32), groups=2, softmax=True, official_order=True),
            "packed_softmax": _gather((2, 5, 4, 8), groups=2, packed=True, softmax=True, remove_center=True),
            "no_centre": _gather((1, 6, 5, 48), groups=3, remove_center=True, official_order=True),
            "rectangular": _gather((2, 8, 9, 15), 5, (3, 2), (2, 1), (1, 2), (1, 2), official_order=True),
            "rows": _gather((2, 8, 9, 15), 5, (2, 4), (2, 1), (1, 2), (3, 2)),
            "four_sided": _gather(padding=(0, 1, 2, 3)),
            "scaled": _gather((1, 7, 6, 16), groups=1, offset_scale=0.5, dilation=2, padding=2),
            "stretched": _gather((1, 7, 6, 32), groups=2, kernel=(5, 5), padding=2, offset_scale=2.0, softmax=True),
            "pointwise": _gather(kernel=(1, 1), padding=0, groups=12),
            "one_channel": _gather((3, 8, 8, 1), groups=1),
            "far": _gather(spread=20.0),
            "strided": _gather((2, 5, 7, 16), groups=2, strided=True),
            "wide_groups": _gather((1, 5, 4, 150), groups=2),
            "larger_than_value": _gather((1, 2, 3, 8), 2, (5, 5), padding=3),
            "one_pixel": _gather((2, 1, 1, 6), groups=2),
            "many_pixels": _gather((3, 19, 17, 64), groups=4, packed=True, softmax=True),
        },
        real={
            "internimage": _gather((2, 28, 28, 128), groups=8, softmax=True, official_order=True),
            "dcnv4": _gather((2, 14, 15, 256), groups=16, packed=True, official_order=True),
            "aggregate-scaled": _gather((1, 19, 22, 80), groups=5, offset_scale=2.0),
            "aggregate-5x5": _gather((1, 12, 11, 64), groups=2, kernel=(5, 5), padding=2, softmax=True),
            "small-aggregate": _gather((1, 9, 7, 24), groups=3),
        },
        threaded={
            "aggregate": _gather((2, 17, 18, 64), groups=4, softmax=True),
            "aggregate_packed": _gather((1, 14, 13, 96), groups=6, packed=True),
            "aggregate_images": _gather((5, 9, 8, 10), groups=2),
        },
        full="weights",
        bare="plain",
        mixed="rows",
        sizes=tuple(_gather(shape) for shape in ((8, 13, 11, 12), (5, 10, 19, 12), (4, 14, 7, 12))),
        per_result=("value", "offset", "weight"),
        image="value",
        of_images=False,
        dynamic=((0, 1, 2), (0, 1, 2), (0, 1, 2)),
        float32_beside_half=("offset", "weight"),
    ),
    OpCase(
        "deform_roi_pool",
        {
            "modulated": _align(),
            "plain": _align(offset=False, mask=False),
            "adaptive": _align((2, 6, 8, 9), regions=5, bins=(3, 2), sampling_ratio=0),
            "mask_alone": _align(offset=False),
            "unaligned": _align(aligned=False, sampling_ratio=0),
            "one_sample": _align((1, 3, 5, 6), regions=3, bins=(1, 1), sampling_ratio=1, mask=False),
            "one_channel": _align((3, 1, 8, 8)),
            "far": _align(spread=60.0),
            "many_channels": _align((1, 150, 6, 5), regions=4),
            "many_regions": _align((3, 20, 17, 15), regions=70, bins=(2, 3), sampling_ratio=0),
            "one_pixel": _align((2, 4, 1, 1), regions=5),
        },
        real={
            "roi-adaptive": _align((2, 64, 20, 24), regions=40, bins=(7, 7), sampling_ratio=0),
            "roi": _align((2, 256, 20, 24), regions=40, bins=(7, 7)),
            "small-roi": _align((2, 24, 9, 8), regions=9),
        },
        threaded={
            "align": _align((2, 40, 20, 18), regions=30),
            "align_many": _align((2, 4, 9, 8), regions=1200, bins=(2, 1), sampling_ratio=1),
        },
        full="modulated",
        bare="plain",
        mixed="adaptive",
        sizes=tuple(
            _align(shape, regions, mask=False)
            for shape, regions in (((8, 4, 13, 11), 6), ((3, 4, 8, 19), 7), ((9, 4, 12, 6), 10))
        ),
        per_result=("rois", "offset", "mask"),
        float32_beside_half=("rois", "offset", "mask"),
    ),
    OpCase(
        "deform_ps_roi_pool",
        {
            "modulated": _part(),
            "plain": _part(offset=False, mask=False),
            "classes": _part(
                (3, 24, 7, 9), regions=5, output_dim=6, group_size=2, bins=(4, 3), parts=(2, 3), classes=3
            ),
            "mask_alone": _part(offset=False, classes=2),
            "no_groups": _part((2, 5, 7, 6), output_dim=5, group_size=1, bins=(3, 2), mask=False),
            "more_parts_than_bins": _part(bins=(2, 2), parts=(5, 3), samples_per_part=3, spread=2.5),
            "more_groups_than_bins": _part((2, 18, 6, 7), output_dim=2, group_size=3, bins=(2, 2)),
            "far": _part(spread=60.0),
            "many_regions": _part((2, 72, 12, 10), regions=40, output_dim=18, group_size=2, bins=(4, 4), classes=2),
        },
        real={
            "ps": _part((2, 10 * 49, 20, 24), regions=40, output_dim=10, group_size=7, bins=(7, 7), classes=5),
            "small-ps": _part((2, 24, 9, 8), regions=9, output_dim=6, classes=2),
        },
        threaded={"part": _part((2, 72, 17, 16), regions=40, output_dim=18, classes=2)},
        full="modulated",
        bare="plain",
        mixed="classes",
        sizes=tuple(
            _part(shape, regions, mask=False)
            for shape, regions in (((8, 16, 13, 11), 6), ((3, 16, 8, 19), 7), ((9, 16, 12, 6), 10))
        ),
        per_result=("rois", "offset", "mask"),
        float32_beside_half=("rois", "offset", "mask"),
    ),
    OpCase(
        "ps_roi_pool",
        {
            "square": _pixels(),
            "rectangular": _pixels((3, 24, 7, 9), regions=5, output_dim=6, group_size=2, bins=(4, 2)),
            "no_groups": _pixels((2, 5, 7, 6), output_dim=5, group_size=1, bins=(4, 2)),
            "more_groups_than_bins": _pixels((2, 18, 6, 7), output_dim=2, group_size=3, bins=(2, 2)),
            "many_regions": _pixels((2, 72, 12, 10), regions=40, output_dim=18, group_size=2, bins=(4, 4)),
        },
        real={
            "pixels": _pixels((2, 10 * 49, 20, 24), 40, output_dim=10, group_size=7, bins=(7, 7)),
            "small-pixels": _pixels((2, 24, 9, 8), regions=9, output_dim=6),
        },
        threaded={"pixels": _pixels((3, 72, 17, 16), regions=60, output_dim=18, bins=(4, 4))},
        full="square",
        bare="square",
        mixed="rectangular",
        sizes=tuple(
            _pixels(shape, regions)
            for shape, regions in (((8, 16, 13, 11), 6), ((3, 16, 8, 19), 7), ((9, 16, 12, 6), 10))
        ),
        per_result=("rois",),
        float32_beside_half=("rois",),
    ),
    OpCase(
        "ms_deform_attn",
        {
            "boxes": _attend(points=(3, 1, 2), levels=((6, 8), (3, 4), (2, 2)), reference=4, softmax=True, merged=True),
            "locations": _attend(weights=False),
            "ragged": _attend((2, 3, 5), queries=4, points=(3, 1), reference=2, softmax=True, merged=True),
            "weights": _attend((2, 2, 8), points=4),
            "softmax": _attend((1, 2, 16), points=3, softmax=True),
            "references": _attend((2, 2, 6), points=4, reference=2),
            "one_reference": _attend((2, 2, 4), points=2, reference=2, one_reference=True, softmax=True),
            "one_box": _attend((1, 3, 9), points=(2, 3), reference=4, one_reference=True, merged=True),
            "one_level": _attend((2, 4, 33), levels=((5, 7),), points=9, weights=False),
            "one_point": _attend((3, 2, 7), levels=((4, 6),), points=1),
            "eight_points": _attend((1, 2, 40), levels=((9, 8),), points=8, merged=True),
            "twelve_points": _attend((1, 2, 32), levels=((9, 8), (5, 4), (3, 2)), points=4, softmax=True),
            "one_channel": _attend((2, 3, 1), points=2),
            "one_pixel": _attend((2, 2, 3), levels=((1, 1), (1, 2)), points=2, spread=1.0),
            "far": _attend((2, 2, 6), spread=20.0),
            "strided": _attend((2, 3, 8), points=3, strided=True),
            "many_channels": _attend((1, 2, 150), queries=3, points=2),
            "many_queries": _attend((2, 4, 16), levels=_PYRAMID, queries=90, points=4, reference=2, softmax=True),
        },
        real={
            "decoder": _attend((2, 8, 32), ((50, 76), (25, 38), (13, 19), (7, 10)), 300, 4, reference=4, softmax=True),
            "encoder": _attend((1, 8, 32), ((25, 38), (13, 19), (7, 10)), 1267, 4, reference=2, softmax=True),
            "ragged-attention": _attend((2, 4, 20), ((20, 24), (9, 8)), 60, (5, 3), merged=True),
            "small-attention": _attend((2, 3, 7), queries=9),
        },
        threaded={
            "attend": _attend((2, 4, 24), _PYRAMID, 150, 4, reference=2, softmax=True),
            "attend_few": _attend((4, 8, 32), ((9, 11), (5, 6)), 20, (3, 5), reference=4, merged=True),
            "attend_once": _attend((2, 2, 8), ((9, 11),), 1100, 1, reference=2),
        },
        full="boxes",
        bare="locations",
        mixed="ragged",
        # The levels are in the graph as numbers.
        sizes=tuple(_attend((n, 4, 6), ((13, 11), (7, 9)), q, 3, reference=4) for n, q in ((8, 19), (5, 12), (3, 16))),
        per_result=("value", "sampling_locations", "attention_weights", "reference_points"),
        image="value",
        of_images=False,
        dynamic=((0,), (0, 1), (0, 1), (0, 1)),
        float32_beside_half=("sampling_locations", "attention_weights", "reference_points"),
    ),
]
BY_NAME = {case.name: case for case in CASES}
