"""Active convolution: a convolution that learns where its taps lie, in fractions of a pixel, the same for all pixels.

Symbols: N batch, C channels, O outputs, K = kh*kw taps, G offset groups, H' W' the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from ..ops._check import integer
from ..ops._check import shape as check_shape
from ..ops._check import tensor as check_tensor
from ..ops._transforms import is_tracing
from ._symbolic import recorded_call
from .arguments import check_input, flag
from .conv import DeformConv2d
from .samples import Window

# The taps of a 3x3 kernel in the order of the official weights: the middle, then by angle, from the right downwards.
_OFFICIAL = (4, 5, 8, 7, 6, 3, 0, 1, 2)


class _UnitGradient(torch.autograd.Function):
    """The identity, whose gradient has length 1 for each tap, or 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(moves: Tensor) -> Tensor:
        return moves.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (gradient,) = gradients
        length = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
        return gradient / torch.where(length > 0, length, 1)


def _offset(moves: Tensor, x: Tensor, window: Window, normalise: bool, trained: Tensor | None) -> Tensor:
    """Return the moves `[G, K or K - 1, 2]` as offsets of all pixels, `[N, 2*G*K, H', W']`."""
    if trained is not None:
        moves = torch.where(trained, moves, moves.detach())
    if normalise and moves.requires_grad and torch.is_grad_enabled() and not is_tracing():
        moves = _UnitGradient.apply(moves)  # type: ignore[no-untyped-call]
    moves = moves.to(torch.promote_types(x.dtype, torch.float32))
    middle = _middle(window.kernel_size)
    if middle is not None:
        moves = torch.cat((moves[:, :middle], torch.zeros_like(moves[:, :1]), moves[:, middle:]), 1)
    return moves.flatten()[:, None, None].expand(x.shape[0], -1, *_size(x, window))


def _middle(kernel_size: tuple[int, int]) -> int | None:
    """Return the number of the tap that stays where it is; None where sides are even, as no tap is in the middle."""
    kh, kw = kernel_size
    return kh * kw // 2 if kh % 2 and kw % 2 else None


def _size(x: Tensor, window: Window) -> tuple[int, int]:
    return window.output_size(x.shape[2], x.shape[3])


def _counted(calls: Tensor, warmup: int) -> Tensor:
    """Count a call, and return whether those with fixed places are over."""
    # Not when a checkpointed part runs again, inside a backward pass.
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        calls.add_(1)
    return calls > warmup


# Symbolic tracing records these as calls: they look at shapes, or count.
for _name in ("check_input", "_counted", "_offset"):
    torch.fx.wrap(_name)


class ActiveConv2d(DeformConv2d):
    """Active convolution (Jeon & Kim 2017): a convolution whose taps lie at learnt places, the same for all pixels.

    `out(p0) = bias + sum_k weight_k * bilinear(x, p0 * stride - padding + k * dilation + moves_k)`

    `moves` `[G, K - 1, 2]` are pixels, (y, x), of the taps around the middle one, which stays where it is (kernels with
    an even side have none, so that all K move). A fresh layer computes what `nn.Conv2d` with the same weight computes.

    Args:
        in_channels .. offset_groups: as in `DeformConv2d`.
        normalise: divide the gradient of each tap's move by its length, as published: what trains it is a direction.
        warmup: for so many calls in training mode moves get a gradient of zero, so that weights settle first; they are
            counted in a buffer, `calls`, which state dicts hold. (10000 in the paper.)

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.

    Optimizers of this package train `moves` at 0.01 of the usual rate, as published; leave it out of weight decay.

    Example:
        >>> import torch
        >>> from dcn_plugin.layers import ActiveConv2d
        >>> layer = ActiveConv2d(4, 8, kernel_size=3, padding=1)
        >>> layer(torch.rand(1, 4, 6, 6)).shape, layer.moves.shape
        (torch.Size([1, 8, 6, 6]), torch.Size([1, 8, 2]))

    Source: Jeon and Kim, Active Convolution: Learning the Shape of Convolution for Image Classification (2017), eq. 3.
    """

    drop_in = True
    offset_branches: ClassVar[Mapping[str, float]] = {"moves": 0.01}
    calls: Tensor | None

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
        normalise: bool = True,
        warmup: int = 0,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, offset_groups,
        )  # fmt: skip
        self.normalise = flag("normalise", normalise)
        self.warmup = integer("warmup", warmup, 0)
        taps = self.kernel_size[0] * self.kernel_size[1] - (_middle(self.kernel_size) is not None)
        if not taps:
            raise ValueError("kernel_size: expected more than one tap, as the middle one stays where it is, got (1, 1)")
        self.moves = nn.Parameter(torch.zeros(self.offset_groups, taps, 2, device=device, dtype=dtype))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=device) if self.warmup else None)
        self._note_memory()

    def reset_parameters(self) -> None:
        """Initialise weight and bias as `nn.Conv2d` does, and put the taps where its taps are."""
        super().reset_parameters()
        self.reset_offsets()
        if self.calls is not None:
            self.calls.zero_()

    def _start_again(self, before: dict[str, Tensor], changed: set[str]) -> None:
        unwritten = self._without_memory and "moves" in self._open() and "moves" not in changed
        super()._start_again(before, changed)
        if unwritten:
            self.moves.zero_()

    def offsets(self, x: Tensor) -> tuple[Tensor, None]:
        """What `forward` samples with, as hooks see it.

        Args:
            x: `[N, C, H, W]`.

        Returns:
            Offset `[N, 2*G*K, H', W']` in pixels, (y, x) per tap, a view of one number for all pixels; and None.
        """
        x = check_input(x, self.in_channels, self._parameters.get("weight"))
        return self._offsets(x, None), None

    def _offsets(self, x: Tensor, trained: Tensor | None) -> Tensor:
        return _offset(self.moves, x, self.window, self.normalise, trained)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Apply the layer to `input`, `[N, C, H, W]`; returns `[N, O, H', W']`."""
        call = recorded_call(self, input)
        if call is not None:
            return call
        x = check_input(input, self.in_channels, self._parameters.get("weight"))
        waits = self.calls is not None and self.training
        offset = self._offsets(x, _counted(self.calls, self.warmup) if waits else None)  # type: ignore[arg-type]
        return self._convolve(x, offset, None, self.weight, self.bias)

    def load_official(self, weight: Tensor, x: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
        """Take the blobs of an official layer with a kernel of 3x3 and one position group.

        Args:
            weight: `[O, C, 3, 3]`, taps from the middle one on, then by angle, from the right downwards.
            x, y: nine positions each, in pixels from the middle, in the same order.
            bias: `[O]`, or None where the layer has none.

        Raises:
            ValueError: the layer has another kernel, groups or dilation; a tensor has another shape, or the middle tap
                has moved.
        """
        own = (self.kernel_size, self.groups, self.offset_groups, self.dilation)
        if own != ((3, 3), 1, 1, (1, 1)):
            raise ValueError(
                "load_official: expected a layer with kernel_size=3, groups=1, offset_groups=1 and dilation=1, got "
                f"{own[0]}, {own[1]}, {own[2]} and {own[3]}"
            )
        if (bias is None) != (self.bias is None):
            raise ValueError(f"bias: expected {'None' if self.bias is None else 'a tensor'} for this layer, got {bias}")
        check_tensor(weight, "weight", 4, "[O, C, 3, 3]")
        if weight.shape != self.weight.shape:
            raise ValueError(f"weight: expected {list(self.weight.shape)}, got {list(weight.shape)}")
        if x.numel() != 9 or y.numel() != 9:
            raise ValueError(f"x, y: expected nine positions each, got {x.numel()} and {y.numel()}")
        places = torch.stack((y.flatten(), x.flatten()), -1)
        if places[0].any():
            raise ValueError(f"x, y: expected the first position in the middle, got {places[0].tolist()}")
        if bias is not None:
            check_tensor(bias, "bias", 1, "[O]")
            check_shape(bias, "bias", (self.out_channels,))
        order = torch.tensor(_OFFICIAL).argsort()
        taps = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
        moves = places[order] - taps.to(places)
        with torch.no_grad():
            self.weight.copy_(weight.flatten(2)[..., order].view_as(weight))
            self.moves.copy_(torch.cat((moves[:4], moves[5:]))[None])
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)

    def extra_repr(self) -> str:
        more = "" if self.normalise else ", normalise=False"
        return super().extra_repr() + more + (f", warmup={self.warmup}" if self.warmup else "")
