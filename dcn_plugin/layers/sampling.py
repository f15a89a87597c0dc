"""The contract of layers that sample at positions they are given or predict: what others may ask them.

The converter, checkpoints, parameter groups, callbacks, pictures, initialisers and counters know a layer by what is
declared here, and by nothing else. A layer of a new kind derives from `SamplingModule` (a convolution from
`SamplingConv`), says what it predicts with in `offset_branches`, and tells its hooks what it samples with. What a hook
sees is what was sampled, however the layer was called: nothing is computed a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ._declared import Branch, belongs, branches, declared, restart
from ._torchscript import NotScriptable
from .samples import Hooks, OffsetRate, Regions, Samples, SamplingHandle, SamplingHook, Window, detached, recorded

logger = logging.getLogger("dcn_plugin")

# What classes of other packages, which declare nothing, call what predicts where they sample, with its usual rate:
# convolutions (mmcv's), then attention, and in the models around it what predicts its reference points (Zhu et al.
# 2021, appendix A.4; mmdet's name is the last).
_ELSEWHERE = {"conv_offset": 1.0, "sampling_offsets": 0.1, "reference_points": 0.1, "reference_points_fc": 0.1}


class SamplingModule(NotScriptable, nn.Module):
    """A module that samples at positions it is given or predicts.

    A class declares, where the default does not hold:

    - `offset_branches`: its submodules or parameters that predict offsets (and masks), by name, each with its usual
      learning rate as a multiple of the rest's. A layer that lacks one of them has None under its name. They may be
      any modules, as long as they are `OffsetPredictor`s or end in one or in a `ZeroLinear`, so that a fresh layer is
      undeformed (attention: samples where it was published to) whoever initialises the model; others need a
      `reset_offsets` of their own.
    - `offset_lr_option`: which option of a trainer changes that rate. `offset_lr_mult` (MMEngine's
      `dcn_offset_lr_mult`) multiplies it; `roi_offset_lr_mult` takes its place, as the branches of RoI pooling are
      usually trained so much more slowly that one option for all would not do.
    - `offset_unit` and `displacement_scale`: an offset of 1 moves a sample by `displacement_scale` pixels of the
      input, or by that many sizes of its region.
    - `drop_in`: True where `forward(x)` alone suffices, so that `convert` may put it in a convolution's place. It
      then has `from_conv`, `option_names` and `predictor_multiply_adds`, as `SamplingConv` writes them. A single layer
      may say otherwise.

    and overrides `offsets`, and whichever of the other methods has something to say about it. What `forward` takes
    beside its input, such as another map that predicts the offsets, `offsets` takes in the same order. Regions are the
    second argument, and offsets that a layer is given are called `offset`.
    """

    offset_branches: ClassVar[Mapping[str, float]] = {}
    offset_lr_option: ClassVar[Literal["offset_lr_mult", "roi_offset_lr_mult"]] = "offset_lr_mult"
    offset_unit: ClassVar[Literal["pixels", "region"]] = "pixels"
    drop_in: bool = False
    #: True where this module's hooks see what the layers inside it sample with.
    speaks_for_inner: ClassVar[bool] = False
    #: False where this very module was built to sample undeformed.
    deformable: bool = True
    _sampling_hooks: Hooks | None = None

    # -- what it samples with ------------------------------------------------------------------------------------------

    @property
    def displacement_scale(self) -> float:
        """What an offset of 1 moves a sample by, in `offset_unit`."""
        return 1.0

    @property
    def window(self) -> Window | None:
        """How the layer moves over its input; None where it does not as a convolution does."""
        return None

    def window_in(self, samples: Samples) -> Window | None:
        """Return how the layer moved in one call: as `window` says, unless that depends on the size of its input."""
        return self.window

    def offsets(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the offset and mask (or None) that `forward` would sample with; only layers that predict them can."""
        raise NotImplementedError(f"offsets: expected a layer that predicts them, got {type(self).__name__}")

    def regions(self, samples: Samples) -> Regions:
        """Return where the bins of one call lie; only layers with `offset_unit = "region"` can."""
        raise NotImplementedError(f"regions: expected a layer that pools regions, got {type(self).__name__}")

    def places(self, samples: Samples) -> Tensor | None:
        """Return where one call samples without offsets, `[H', W', 2]` in pixels of its input, (y, x).

        Only of a layer whose every output reads all samples of its group, as attention to a grid does; others: None.
        """
        return None

    def multiply_adds(self, output: Tensor) -> int | None:
        """Return the multiply-adds of the call that made `output`; None where its size does not say."""
        return None

    # -- how it is stored ----------------------------------------------------------------------------------------------

    def store_for_inference(self) -> bool:
        """Store the weights in the order that inference on a CPU reads; return whether there are any to store so."""
        return False

    # -- how it starts -------------------------------------------------------------------------------------------------

    def branches(self) -> Iterator[tuple[str, Branch]]:
        """Yield name and value of each of `offset_branches` that this layer has; what is computed, by its originals."""
        yield from branches(self, self.offset_branches)

    def reset_offsets(self) -> None:
        """Let the layer sample undeformed again, as a fresh one does."""
        for _, branch in self.branches():
            restart(branch)

    # -- state dicts ---------------------------------------------------------------------------------------------------

    def former_keys(self, state: MutableMapping[str, Any], prefix: str) -> dict[str, str]:
        """Rename, in place, what earlier implementations call this layer's tensors.

        Args:
            state: a state dict.
            prefix: of this layer's keys in it: empty, or ending in a dot.

        Returns:
            Old names to new names; empty where nothing was renamed.
        """
        return {}

    def former_note(self, renamed: Mapping[str, str]) -> str:
        """Return a sentence of advice where the weights that `former_keys` renamed expect another layer, or ''."""
        return ""

    def predicts_with(self, name: str) -> bool:
        """Tell whether the tensor of this name in the layer's state dict belongs to one of its branches."""
        return belongs(name, self.offset_branches)

    def explain_mismatch(self, name: str, shape: torch.Size) -> str:
        """Say in words why a tensor of `shape` does not fit the branch whose tensor ends in `name`, or ''."""
        return ""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        renamed = self.former_keys(state_dict, prefix)
        log_former_keys(Renamed(renamed, self.former_note(renamed) if renamed else ""))
        for old in renamed:
            # Loaders that hand the whole dictionary to every module have flagged a key beside this layer at its parent.
            if old in unexpected_keys:
                unexpected_keys.remove(old)
        for name, own in self.named_parameters():
            given = state_dict.get(f"{prefix}{name}")
            if isinstance(given, Tensor) and given.shape != own.shape and self.predicts_with(name):
                if text := self.explain_mismatch(f"{prefix}{name}", given.shape):
                    error_msgs.append(text)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    # -- hooks ---------------------------------------------------------------------------------------------------------

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
        self._sampling_hooks = Hooks((*already, hook))
        return SamplingHandle(self, hook)

    def tell_hooks(
        self,
        input: Any,
        offset: Tensor | None,
        mask: Tensor | None = None,
        rois: Any = None,
        image_sizes: Any = None,
        part: str = "",
    ) -> None:
        """Let the hooks see what a call samples with; every `forward` does so, with the fields of `Samples`."""
        hooks = self._sampling_hooks
        if hooks is None or recorded(input, offset):
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # inside a backward pass: a checkpointed part runs again
        with torch.no_grad():
            input, offset, mask, rois = (detached(value) for value in (input, offset, mask, rois))
            samples = Samples(input, offset, mask, rois, image_sizes, self.displacement_scale, part)
            for hook in hooks.hooks:
                hook(self, samples)


# -- of whole models ---------------------------------------------------------------------------------------------------


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


def reset_offsets(model: nn.Module) -> None:
    """Let every layer of `model` sample undeformed again, as fresh ones do."""
    for module in model.modules():
        if isinstance(module, SamplingModule):
            module.reset_offsets()


def offset_rates(model: nn.Module) -> dict[str, OffsetRate]:
    """Names of the parameters that predict offsets and masks, with how they are trained, in the model's order.

    A parameter that two classes declare follows the outer one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    rates: dict[int, OffsetRate] = {}
    for module in model.modules():
        # Of the class, where a submodule or buffer of that name cannot be.
        usual = declared(module, _ELSEWHERE)
        option = getattr(type(module), "offset_lr_option", SamplingModule.offset_lr_option)
        for name, branch in branches(module, usual, sure=usual is not _ELSEWHERE):
            for parameter in [branch] if isinstance(branch, nn.Parameter) else branch.parameters():
                rates.setdefault(id(parameter), OffsetRate(usual[name], option))
    return {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}


def offset_parameters(model: nn.Module) -> dict[str, float]:
    """Names of the parameters that predict offsets and masks, with their usual learning rate multiplier.

    1.0 for every `conv_offset`, 0.01 for the fully connected branches of RoI pooling (Dai et al. 2017, section 2.3),
    0.1 for `sampling_offsets` of attention and `reference_points` of models around it (Zhu et al. 2021, appendix A.4).
    A module class of your own says so with a class attribute: `offset_branches = {"<submodule>": <multiplier>}`.

    Args:
        model: any module.

    Returns:
        Parameter name, as in `model.named_parameters()`, to multiplier, in the model's order.

    Example:
        >>> from torch import nn
        >>> from dcn_plugin.layers import DCNv1, DeformRoIPoolPack, offset_parameters
        >>> model = nn.ModuleDict(dict(conv=DCNv1(4, 4, 3), pool=DeformRoIPoolPack(2, 4, deform_fc_channels=8)))
        >>> multipliers = offset_parameters(model)
        >>> multipliers["conv.conv_offset.weight"], multipliers["pool.offset_fc.0.weight"], len(multipliers)
        (1.0, 0.01, 8)
    """
    return {name: rate.usual for name, rate in offset_rates(model).items()}


class Renamed(NamedTuple):
    """Keys of a state dict that were renamed, and what should be known about their weights.

    Fields:
        keys: old names to new ones.
        note: a sentence of advice where the weights expect other layers than those of the model, or ''.
    """

    keys: dict[str, str]
    note: str


def rename_former_keys(model: nn.Module, state: MutableMapping[str, Any], prefix: str = "") -> Renamed:
    """Rename, in place, what earlier implementations call tensors of the layers of `model`."""
    keys: dict[str, str] = {}
    note = ""
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, SamplingModule):
            own = layer.former_keys(state, f"{prefix}{name}." if name else prefix)
            keys.update(own)
            note = note or (layer.former_note(own) if own else "")
    return Renamed(keys, note)


def log_former_keys(renamed: Renamed) -> None:
    """Warn of keys that were renamed while a model loads them."""
    if not renamed.keys:
        return
    pairs = ", ".join(f"{old} -> {new}" for old, new in renamed.keys.items())
    note = renamed.note and f"; {renamed.note}"
    logger.warning("state dict keys of an earlier layout renamed: %s%s", pairs, note)
