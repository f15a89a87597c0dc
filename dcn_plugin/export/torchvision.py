"""A model whose deformable convolutions are torchvision's: for tools that know torchvision's operator, and not ours."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d as TorchvisionConv

from ..layers import DeformConv2d, OffsetConv, SamplingConv, SamplingModule

__all__ = ["to_torchvision"]


def to_torchvision(model: nn.Module, *, one_group: bool = False) -> nn.Module:
    """Return a copy of `model` in which `torchvision.ops.DeformConv2d` convolves wherever a layer of ours does.

    Each layer goes on predicting what it samples with; the module in its place gives that to torchvision's. The outputs
    are the same, to rounding, where torchvision has the type. For `torch.jit.trace` and converters that know the
    operator by torchvision's name; parameters have other names than in `model`, so load weights before. Whatever calls
    `dcn_plugin.ops` itself stays as it is.

    A layer of a class of your own takes part if its `offsets` returns what its `forward` convolves with
    (`docs/timm.md`, "A layer of your own"); where it has a `forward` of its own, the two are compared
    on a random map, with random numbers in all parameters but `weight` and `bias`.

    Args:
        model: any module; one of ours itself is fine.
        one_group: write several groups or offset groups as a sum of convolutions that have one each, for tools that
            know no others (ncnn). A layer with C channels that is depthwise becomes C convolutions.

    Returns:
        A copy, in the mode of `model`.

    Raises:
        NotImplementedError: the model pools regions, or has a layer that cannot be written like this: with hooks, or
            with a `forward` that does something else. The message names the layer.

    Example:
        >>> import torch
        >>> from dcn_plugin import DCNv2
        >>> model, x = torch.nn.Sequential(DCNv2(4, 6, 3, padding=1)).eval(), torch.rand(1, 4, 8, 8)
        >>> theirs = to_torchvision(model)
        >>> type(theirs[0].convs[0]).__module__, torch.allclose(theirs(x), model(x), atol=1e-6)
        ('torchvision.ops.deform_conv', True)
    """
    model = copy.deepcopy(model)
    done: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        # Who speaks for the layers inside it convolves with those.
        if isinstance(module, SamplingModule) and not module.speaks_for_inner:
            if module not in done:
                done[module] = _replacement(module, name, one_group)
            if not name:
                return done[module]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, done[module])
    return model


class OnTorchvision(nn.Module):
    """In the place of `layer`, which only predicts: `out = sum over blocks of torchvision's convolutions`.

    A block is a run of channels that share their group and their offset group, or all of them where torchvision's own
    groups do. Blocks of a group add up; groups lie beside each other.
    """

    def __init__(self, layer: SamplingConv, one_group: bool) -> None:
        super().__init__()
        self.layer = layer
        self.given = type(layer).offsets is SamplingModule.offsets  # offsets come with the call
        self.taps = layer.kernel_size[0] * layer.kernel_size[1]
        top, left, bottom, right = layer.padding4
        even = (top, left) == (bottom, right)
        # torchvision pads opposite sides alike. Beyond the map there are zeros, whoever writes them.
        self.padding = () if even else (left, right, top, bottom)
        groups, offset_groups = (layer.groups, layer.offset_groups) if one_group else (1, 1)
        size, step = layer.in_channels // groups, layer.in_channels // offset_groups
        outputs = layer.out_channels // groups
        edges = sorted({*range(0, layer.in_channels + 1, size), *range(0, layer.in_channels + 1, step)})
        self.blocks: list[tuple[int, int, int, int]] = []  # first channel, the one after the last, group, offset group
        self.convs = nn.ModuleList()
        for first, end in zip(edges[:-1], edges[1:], strict=True):
            group, begin = first // size, first // size * size
            weight: Tensor = layer.weight
            bias: Tensor | None = layer.bias if first == begin else None
            if len(edges) > 2:
                weight = weight[group * outputs : (group + 1) * outputs, first - begin : end - begin]
                bias = None if bias is None else bias[group * outputs : (group + 1) * outputs]
            conv: Any = TorchvisionConv(
                end - first,
                outputs,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                (top, left) if even else (0, 0),  # type: ignore[arg-type]
                layer.dilation,  # type: ignore[arg-type]
                layer.groups // groups,
                bias is not None,
            )
            # Copies: a converter may look for a parameter that two modules share in the other one.
            conv.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            conv.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
            self.convs.append(conv)
            self.blocks.append((first, end, group, first // step))
        self.train(layer.training)

    def forward(self, input: Tensor, *args: Any, **named: Any) -> Tensor:
        samples = _given if self.given else self.layer.offsets
        offset, mask = samples(input, *args, **named)
        if self.padding:
            input = F.pad(input, self.padding)
        if len(self.blocks) == 1:
            return self.convs[0](input, offset, mask)
        outputs: dict[int, Tensor] = {}
        for (first, end, group, at), conv in zip(self.blocks, self.convs, strict=True):
            moves = offset[:, 2 * self.taps * at : 2 * self.taps * (at + 1)]
            factors = None if mask is None else mask[:, self.taps * at : self.taps * (at + 1)]
            out = conv(input[:, first:end], moves, factors)
            outputs[group] = outputs[group] + out if group in outputs else out
        return torch.cat(list(outputs.values()), 1) if len(outputs) > 1 else outputs[0]


def _given(input: Tensor, offset: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """What `DeformConv2d` samples with: what it is called with."""
    return offset, mask


def _replacement(layer: SamplingModule, name: str, one_group: bool) -> OnTorchvision:
    what = f"{type(layer).__name__} at {name!r}" if name else type(layer).__name__
    if not isinstance(layer, SamplingConv):
        raise NotImplementedError(
            f"model: expected deformable convolutions alone, got {what}, for which torchvision has no operator"
        )
    if hooks := [kind for kind in ("_forward_pre_hooks", "_forward_hooks") if getattr(layer, kind)]:
        raise NotImplementedError(f"model: expected layers without hooks, which would be lost, got {what} with {hooks}")
    replacement = OnTorchvision(layer, one_group)
    if not _convolves_plainly(layer):
        _compare(layer, replacement, what)
        return replacement
    for name in {"weight", "bias"} & layer._parameters.keys():  # predicts without them
        layer._parameters[name] = None
    return replacement


def _convolves_plainly(layer: SamplingConv) -> bool:
    """Whether `forward` is one of this package's, so that `offsets` is all that a subclass may have changed."""
    kind, own = type(layer), vars(layer)
    known = kind.forward in (DeformConv2d.forward, OffsetConv.forward) and "forward" not in own
    inner = ("_convolve", "_conv_forward")
    return known and all(getattr(kind, part, None) in (None, getattr(OffsetConv, part)) for part in inner)


@torch.no_grad()
def _compare(layer: SamplingConv, replacement: OnTorchvision, what: str) -> None:
    """Raise unless a layer with a `forward` of its own computes, on a random map, what its replacement does.

    Its branch is drawn, in copies: a fresh one is zero, and with it nothing is sampled elsewhere.
    """
    layer, replacement = copy.deepcopy((layer, replacement))
    acc = torch.promote_types(layer.weight.dtype, torch.float32)
    layer, replacement = layer.to(acc).eval(), replacement.to(acc).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        if name not in ("weight", "bias"):  # those stand in the replacement too
            size = parameter[0].numel() if parameter.dim() else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / size**0.5)
    window = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    height, width = (dilation * (taps - 1) + 1 + 4 * stride for taps, stride, dilation in window)
    x = torch.randn(1, layer.in_channels, height, width, generator=generator).to(layer.weight)
    try:
        wanted, found = layer(x), replacement(x)
        allowed = float(wanted.abs().max()) * 1e-4
        same = wanted.shape == found.shape and torch.allclose(wanted, found, rtol=0, atol=allowed)
        reason = "" if same else "which computes something else"
    except Exception as error:
        reason = f"which could not be asked: {type(error).__name__}: {error}"
    if reason:
        raise NotImplementedError(
            f"model: expected layers whose `forward` convolves at what `offsets` returns, got {what}, {reason}"
        )
