"""Which convolutions a layer may take the place of."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def require_plain_conv(conv: nn.Module) -> None:
    """Raise unless `conv` computes what `nn.Conv2d` computes and nothing would be lost by replacing it."""
    name = type(conv).__name__
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"conv: expected an nn.Conv2d, got {name}")
    if parametrize.is_parametrized(conv):
        tensors = ", ".join(key for key in ("weight", "bias") if parametrize.is_parametrized(conv, key))
        raise TypeError(
            "conv: expected plain parameters (torch.nn.utils.parametrize.remove_parametrizations makes them so), got "
            f"{name} with parametrised {tensors}"
        )
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
        raise TypeError(f"conv: expected a convolution that has its shape (run the model once), got {name}, still lazy")
    own_forward = "conv: expected nn.Conv2d's own forward, as a deformable layer would not repeat another, got"
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        raise TypeError(f"{own_forward} {name} with a forward of its own")
    if "forward" in vars(conv) or "_conv_forward" in vars(conv):
        raise TypeError(f"{own_forward} {name} whose forward has been replaced")
    parameters = {key for key, value in conv.named_parameters(recurse=False)}
    computed = [key for key in ("weight", "bias") if key not in parameters and getattr(conv, key) is not None]
    if computed:
        sources = ", ".join(sorted(parameters - {"weight", "bias"})) or "hooks"
        raise TypeError(
            "conv: expected weights that nothing computes (weight norm, spectral norm or pruning: make it permanent "
            "first, for example with torch.nn.utils.remove_weight_norm), got "
            f"{name} that computes its {' and '.join(computed)} from {sources}"
        )
    extra = sorted((set(conv.state_dict()) | set(conv._modules)) - {"weight", "bias"})
    if extra:
        raise TypeError(f"conv: expected weight and bias alone, got {name} that also holds {', '.join(extra)}")
    hooks = [
        getattr(hook, "__qualname__", type(hook).__name__)
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        for hook in getattr(conv, kind, {}).values()
    ]
    if hooks:
        raise TypeError(
            "conv: expected no hooks, which would be lost (convert first, hook afterwards), got "
            f"{name} with {', '.join(hooks)}"
        )
    if conv.padding_mode != "zeros":
        raise TypeError(
            f"conv: expected padding_mode='zeros', as a deformable layer pads with zeros only, got {name} with "
            f"padding_mode={conv.padding_mode!r}"
        )
