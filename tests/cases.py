"""One case per operator: how to call it and its reference, and the configurations that every contract runs over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcn_plugin import ops, reference

# Largest error relative to the largest magnitude, against float64 arithmetic on the same stored values.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Compare with the tolerance of ``dtype``, relative to the largest expected magnitude; NaN must meet NaN."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in other places"
    if actual.numel() == 0:
        return
    error = (actual - expected).abs().nan_to_num(0).max().item()
    scale = max(expected.abs().nan_to_num(0).max().item(), 1e-3)
    assert error <= TOLERANCE[dtype] * scale, f"{what}: error {error:.3g} on a scale of {scale:.3g}"


@dataclass(frozen=True)
class OpCase:
    """An operator: ``make(dtype)`` gives keyword arguments; tensors among them that float are differentiable."""

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    op: str  # torch.ops.dcn_plugin.<op>
    to_op: Callable[..., tuple]  # keyword arguments -> the compiled operator's positional ones
    configs: dict[str, Callable[[], dict[str, Any]]]  # float64 arguments on the CPU, seeded by the test
    image: str = "input"  # the argument whose layout the result takes
    float32_beside_half: tuple[str, ...] = ()  # arguments that may be float32 beside a half-precision image

    def make(
        self, config: str, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        torch.manual_seed(seed)
        return convert(self.configs[config](), dtype=dtype, device=device)


def convert(arguments: dict[str, Any], **to: Any) -> dict[str, Any]:
    return {k: v.to(**to) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor)}


def leaves(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with every tensor a leaf that wants a gradient."""
    return {k: v.detach().requires_grad_() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def run(function: Callable[..., Tensor], arguments: dict[str, Any], grad: Tensor | None = None) -> dict[str, Tensor]:
    """Value and gradients, by name; the gradient of the output is ``grad`` or ones."""
    arguments = leaves(arguments)
    out = function(**arguments)
    wanted = tensors(arguments)
    grads = torch.autograd.grad(out, list(wanted.values()), torch.ones_like(out) if grad is None else grad.to(out))
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(wanted, grads, strict=True)}}


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
            "offset": spread * torch.randn(n, 2 * offset_groups * taps, *size, **double),
            "weight": torch.randn(out, c // groups, *kernel, **double) / (c // groups * taps) ** 0.5,
            "stride": stride, "padding": padding, "dilation": dilation,
        }  # fmt: skip
        if bias:
            arguments["bias"] = torch.randn(out, **double)
        if mask:
            arguments["mask"] = torch.rand(n, offset_groups * taps, *size, **double) * 2
        return arguments

    return make


def _deform_conv2d_to_op(input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
    pair = lambda v: [v, v] if isinstance(v, int) else list(v)  # noqa: E731
    pads = pair(padding)
    return input, offset, weight, bias, mask, pair(stride), pads if len(pads) == 4 else pads * 2, pair(dilation)


_make = deform_conv2d_arguments
CASES = [
    OpCase(
        "deform_conv2d",
        ops.deform_conv2d,
        reference.deform_conv2d,
        "deform_conv2d",
        _deform_conv2d_to_op,
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
        float32_beside_half=("offset", "mask"),
    )
]
