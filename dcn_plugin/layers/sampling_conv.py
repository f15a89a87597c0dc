"""What layers that sample where a convolution would read share: `nn.Conv2d`'s constructor, parameters and place."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..ops._check import integer, integers
from ._fold import take_norm_if_folding
from ._from_conv import require_plain_conv
from ._start import OwnStart, StartsAtZero
from .arguments import divisible, floating, pair
from .samples import Window
from .sampling import SamplingModule

Layer = TypeVar("Layer", bound="SamplingConv")


class SamplingConv(SamplingModule, OwnStart):
    """A `SamplingModule` with the constructor, `weight` and `bias` of `nn.Conv2d`; a subclass writes `forward`.

    A subclass with `drop_in = True` takes a convolution's place: its arguments begin with those below, its options
    follow them, each kept as an attribute of the same name, and whatever it predicts offsets with is in
    `offset_branches`.

    Args:
        in_channels .. offset_groups: as in `DeformConv2d`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.
    """

    # Attributes of nn.Conv2d that others read (mmcv's ConvModule does).
    transposed: ClassVar[bool] = False
    output_padding: ClassVar[tuple[int, int]] = (0, 0)
    _version = 2

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offset_groups: int = 1,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        self.out_channels = integer("out_channels", out_channels, 1)
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        self.stride = pair("stride", stride, 1)
        self.dilation = pair("dilation", dilation, 1)
        self.groups = integer("groups", groups, 1)
        self.offset_groups = integer("offset_groups", offset_groups, 1)
        for name, channels, divisor_name, divisor in (
            ("in_channels", self.in_channels, "groups", self.groups),
            ("out_channels", self.out_channels, "groups", self.groups),
            ("in_channels", self.in_channels, "offset_groups", self.offset_groups),
        ):
            divisible(name, channels, divisor_name, divisor)
        self.padding: str | tuple[int, ...]
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"padding: expected 'same', 'valid' or integers, got {padding!r}")
            if padding == "same" and self.stride != (1, 1):
                raise ValueError(f"stride: expected 1 with padding='same', got {self.stride}")
            self.padding = padding
        else:
            self.padding = integers("padding", padding, 0, lengths=(2, 4))
        if padding_mode != "zeros":
            hint = "pad the input with torch.nn.functional.pad first"
            raise ValueError(f"padding_mode: expected 'zeros' ({hint}), got {padding_mode!r}")
        self.padding_mode = padding_mode
        floating("dtype", dtype)

        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(
            torch.empty(self.out_channels, self.in_channels // self.groups, *self.kernel_size, **factory)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_channels, **factory))
        else:
            self.register_parameter("bias", None)
        SamplingConv.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Initialise weight and bias as `nn.Conv2d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        self._note_memory()

    def _start_again(self, before: dict[str, Tensor], changed: set[str]) -> None:
        # A model's initialiser that knows this class has drawn; others have left the memory as it was.
        untouched = self._open().keys() - changed
        if not (self._without_memory and untouched):
            return
        kept = {name: p.clone() for name, p in self.named_parameters(recurse=False) if name not in untouched}
        SamplingConv.reset_parameters(self)
        for name, value in kept.items():
            self.get_parameter(name).copy_(value)

    @property
    def window(self) -> Window:
        return Window(self.kernel_size, self.stride, self.padding4, self.dilation)

    @property
    def padding4(self) -> tuple[int, int, int, int]:
        """Padding in pixels as (top, left, bottom, right)."""
        if not isinstance(self.padding, str):
            top, left, bottom, right = self.padding if len(self.padding) == 4 else self.padding * 2
            return top, left, bottom, right
        if self.padding == "valid":
            return 0, 0, 0, 0
        total_y, total_x = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return total_y // 2, total_x // 2, total_y - total_y // 2, total_x - total_x // 2

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        take_norm_if_folding(self)
        return super().named_children()

    @classmethod
    def from_conv(cls: type[Layer], conv: nn.Conv2d, **options: Any) -> Layer:
        """Make this layer out of a convolution, sharing its weight and bias `Parameter` objects.

        dtype, device, memory format, `training` and `requires_grad` carry over; what the layer adds
        (`conv_offset`) starts at zero and is trainable.

        Args:
            conv: an `nn.Conv2d` that computes just what `nn.Conv2d` computes.
            options: this layer's arguments beyond `nn.Conv2d`'s, such as `offset_groups`.

        Raises:
            TypeError: `conv` is something else (a subclass with a `forward` of its own, a transposed or lazy
                convolution), has a parametrised weight (weight norm, pruning), or carries hooks, which would be lost.
            ValueError: `conv` pads with something other than zeros, or an option does not fit.

        Example:
            >>> from torch import nn
            >>> from dcn_plugin.layers import DCNv2
            >>> conv = nn.Conv2d(4, 8, 3, padding=1)
            >>> DCNv2.from_conv(conv, offset_groups=2).weight is conv.weight
            True
        """
        require_plain_conv(conv)
        known = cls.option_names()
        for name in options:
            if name not in known:
                raise TypeError(f"{cls.__name__}: expected options out of {', '.join(known)}, got {name!r}")

        def build(device: torch.device | str) -> Layer:
            return cls(
                conv.in_channels,
                conv.out_channels,
                pair("kernel_size", conv.kernel_size, 1),
                pair("stride", conv.stride, 1),
                conv.padding,
                pair("dilation", conv.dilation, 1),
                conv.groups,
                conv.bias is not None,
                conv.padding_mode,
                device=device,
                dtype=conv.weight.dtype,
                **options,
            )

        # Built without storage: the random numbers a fresh weight would draw stay undrawn.
        layer = build("meta")
        if layer._holds_nothing_but_zeros():
            layer._materialize(conv.weight)
        else:  # the constructor alone knows what the rest starts with
            place = conv.weight.device
            with torch.random.fork_rng([place] if place.type == "cuda" else []):
                layer = build(place)
            layer._lay_out_like(conv.weight)
            layer.reset_offsets()
        layer.weight = conv.weight  # type: ignore[assignment]
        layer.bias = conv.bias  # type: ignore[assignment]
        layer._note_memory()
        return layer.train(conv.training)

    def _holds_nothing_but_zeros(self) -> bool:
        """Tell whether `reset_offsets` gives a value to everything that the layer has beyond weight and bias."""
        known: list[Tensor | None] = [self.weight, self.bias]
        for _, branch in self.branches():
            if isinstance(branch, nn.Parameter):
                known.append(branch)
            else:
                inside = (m for m in branch.modules() if isinstance(m, StartsAtZero))
                known += [parameter for module in inside for parameter in module.parameters(recurse=False)]
        held = (*self.parameters(), *self.buffers())
        return {id(tensor) for tensor in held} <= {id(tensor) for tensor in known}

    def _materialize(self, like: Tensor) -> None:
        """Give storage and zeros to `offset_branches`, where `like` is and laid out as it is."""
        for name, branch in list(self.branches()):
            if isinstance(branch, nn.Parameter):
                empty = torch.empty_like(branch, device=like.device)
                self.register_parameter(name, nn.Parameter(empty, branch.requires_grad))
            else:
                branch.to_empty(device=like.device)
        self._lay_out_like(like)
        self.reset_offsets()

    def _lay_out_like(self, like: Tensor) -> None:
        if not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
            for child in self.children():
                child.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the constructor's arguments beyond `nn.Conv2d`'s; the layer has an attribute for each."""
        rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        known = {*inspect.signature(nn.Conv2d.__init__).parameters}
        found: list[str] = []
        for kind in (kind for kind in cls.__mro__ if "__init__" in vars(kind)):
            parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
            found = [p.name for p in parameters if p.kind not in rest and p.name not in known] + found
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
                break  # else the others are those of the class that this one passes them on to
            known.update(found)
        return found

    def store_for_inference(self) -> bool:
        """Store the weight as [kernel_h, kernel_w, C / groups, O] in memory; its shape stays as it is."""
        weight = self._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.shape[:2] == (self.groups, 1):
            return False
        # One whose memory is already so is not copied.
        weight.data = weight.detach().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
        return True

    def predictor_multiply_adds(self, positions: int) -> int:
        """Return the multiply-adds of `offset_branches` for so many output positions."""
        convs = (m for _, branch in self.branches() if isinstance(branch, nn.Module) for m in branch.modules())
        return positions * sum(conv.weight.numel() for conv in convs if isinstance(conv, nn.Conv2d))

    def multiply_adds(self, output: Tensor) -> int:
        positions = output.shape[0] * output.shape[2] * output.shape[3]
        taps = self.kernel_size[0] * self.kernel_size[1]
        sampled = self.weight.numel() + 4 * taps * self.in_channels
        return positions * sampled + self.predictor_multiply_adds(positions)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if self.padding not in ((0, 0), (0, 0, 0, 0)):
            parts.append(f"padding={self.padding!r}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.offset_groups != 1:
            parts.append(f"offset_groups={self.offset_groups}")
        return ", ".join(parts)
