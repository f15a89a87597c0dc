"""The one way to look at what a layer samples with: hooks that `forward` calls with its own tensors.

Nothing is computed for them a second time, so what they see is what was sampled, however the layer was called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from ..ops._transforms import is_tracing


class Samples(NamedTuple):
    """What one call of a layer sampled with, cut off from the graph of gradients.

    Fields:
        input: `[N, C, H, W]`, or feature maps by name where the layer takes several.
        offset: in **(y, x)**, after a bound: `[N, 2*G*K, H', W']` in pixels (convolution) or
            `[R, 2 * classes, P_h, P_w]` in `gamma` (`offset_scale`) times the RoI's size; None: undeformed.
        mask: after its activation, one for each pair of `offset`; None: all ones.
        rois: what the layer was given, `[R, 5]` or boxes for each image; None for a convolution.
        image_sizes: (height, width) of each image, where the layer is told.
        scale: what an offset of 1 moves: `gamma` (`offset_scale`) RoI sizes; 1 pixel of the input in a convolution.
        part: which of several poolings of one layer this is (`"scores"` or `"boxes"` in R-FCN), or `""`.
    """

    input: Tensor | Mapping[str, Tensor]
    offset: Tensor | None
    mask: Tensor | None = None
    rois: Any = None
    image_sizes: Any = None
    scale: float = 1.0
    part: str = ""


SamplingHook = Callable[[Any, Samples], None]


class _Hooks:
    """The hooks of one layer, in the order they came."""

    def __init__(self, hooks: tuple[SamplingHook, ...]) -> None:
        self.hooks = hooks

    # A copy or a pickle of the layer is another layer, which nobody has asked to watch.
    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class SamplingHandle:
    """Takes a hook away again: by `remove()`, or at the end of a `with` block."""

    def __init__(self, layer: SamplingModule, hook: SamplingHook) -> None:
        self._layer: Callable[[], SamplingModule | None] = weakref.ref(layer)
        self._hook: SamplingHook | None = hook

    def remove(self) -> None:
        """Take the hook away; a second time does nothing."""
        layer, hook, self._hook = self._layer(), self._hook, None
        if layer is None or hook is None or layer._sampling_hooks is None:
            return
        left = list(layer._sampling_hooks.hooks)
        if hook in left:
            left.remove(hook)
        layer._sampling_hooks = _Hooks(tuple(left)) if left else None

    def __enter__(self) -> SamplingHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class SamplingModule(nn.Module):
    """A module that samples at positions it is given or predicts, and lets hooks see them."""

    #: True where this module's hooks see what the layers inside it sample with.
    speaks_for_inner: ClassVar[bool] = False
    _sampling_hooks: _Hooks | None = None

    def register_sampling_hook(self, hook: SamplingHook) -> SamplingHandle:
        """Call `hook(layer, samples)` in every later call of `forward`, with what that call sampled with.

        `samples` are `Samples`: the offset after `offset_bound` and the mask after its activation, wherever
        they come from, for each call of a layer that runs several times. What a backward pass runs again
        (checkpointing) is not reported again, nor what is only recorded (`torch.export`, `torch.fx`,
        `torch.jit.trace`, ONNX). Hooks run without gradients and must not change the tensors in place;
        `torch.compile` traces them as it does PyTorch's forward hooks. They belong to this one object: copies,
        pickles and `state_dict` are without them. A layer without hooks pays nothing.

        Args:
            hook: called with the layer and its samples; what it returns is ignored.

        Returns:
            A handle whose `remove()`, or use in a `with` statement, takes the hook away.

        Raises:
            TypeError: `hook` cannot be called.

        Example:
            >>> import torch
            >>> from dcn_plugin.layers import DCNv2
            >>> layer, seen = DCNv2(4, 8, kernel_size=3, padding=1, offset_bound=2.0), []
            >>> with layer.register_sampling_hook(lambda layer, samples: seen.append(samples.offset.abs().max())):
            ...     _ = layer(torch.rand(1, 4, 6, 6))
            >>> seen
            [tensor(0.)]
        """
        if not callable(hook):
            raise TypeError(f"hook: expected a function of the layer and its samples, got {hook!r}")
        already = () if self._sampling_hooks is None else self._sampling_hooks.hooks
        self._sampling_hooks = _Hooks((*already, hook))
        return SamplingHandle(self, hook)

    def _sampled(
        self, input: Any, offset: Tensor | None, mask: Tensor | None = None, rois: Any = None, *others: Any
    ) -> None:
        """Tell the hooks; `forward` calls this where `_sampling_hooks` is not None."""
        hooks = self._sampling_hooks
        if hooks is None or _recorded(input, offset):
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # inside a backward pass: a checkpointed part runs again
        with torch.no_grad():
            input, offset, mask, rois = (_detached(value) for value in (input, offset, mask, rois))
            samples = Samples(input, offset, mask, rois, *others)
            for hook in hooks.hooks:
                hook(self, samples)


def sampling_layers(model: nn.Module) -> dict[str, SamplingModule]:
    """The layers of `model` whose sampling hooks together see every sample once, by their (first) names."""
    found: dict[str, SamplingModule] = {}
    spoken_for: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, SamplingModule) and module not in spoken_for:
            found[name] = module
            if module.speaks_for_inner:
                spoken_for.update(module.modules())
    return found


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {name: _detached(item) for name, item in value.items()}
    return [_detached(item) for item in value] if isinstance(value, (list, tuple)) else value


def _recorded(*values: Any) -> bool:
    """Tell whether this call writes a graph instead of sampling."""
    return is_tracing() or torch.compiler.is_exporting() or any(isinstance(value, torch.fx.Proxy) for value in values)
