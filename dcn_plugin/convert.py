"""Config-driven layer replacement: rules in, a converted model and a report out."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import translate
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ._config import did_you_mean
from ._folding import find_folded
from .layers import LAYERS, SamplingConv, SamplingModule, accept_sibling_offset_keys, drop_ins

logger = logging.getLogger("dcn_plugin")

_CONDITIONS = ("kernel_size", "stride", "dilation", "groups", "min_channels", "max_channels")
_RULE_KEYS = ("match", "exclude", "layer", *_CONDITIONS)
# What other packages call our options; only used to make an error helpful.
_SYNONYMS = {
    "deform_groups": "offset_groups",
    "deformable_groups": "offset_groups",
    "num_deformable_group": "offset_groups",
    "deform_group": "offset_groups",
}


@dataclass(frozen=True)
class Replacement:
    """One replaced layer.

    Attributes:
        name: dotted name in the model.
        before: the convolution as text: type, channels, taps, and whatever differs from 1 of the rest.
        after: the layer as text: type and options; its geometry is the convolution's.
        params_added: parameters of the layer (those that predict offsets, `conv_offset`, and what else it has) less
            those of the convolution.
        macs_added: multiply-adds of the new ones for one image; None where the feature size is not known.
        aliases: other names under which the model holds the same layer.
    """

    name: str
    before: str
    after: str
    params_added: int
    macs_added: int | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did: a sequence of `Replacement` that prints as a table.

    Attributes:
        replacements: in the model's order.
        input_size: (C, H, W) that multiply-adds are for; None where they are unknown.
        note: why something is unknown, or ''.
    """

    replacements: list[Replacement] = field(default_factory=list)
    input_size: tuple[int, int, int] | None = None
    note: str = ""

    def __iter__(self) -> Iterator[Replacement]:
        return iter(self.replacements)

    def __len__(self) -> int:
        return len(self.replacements)

    def __getitem__(self, index: int) -> Replacement:
        return self.replacements[index]

    @property
    def params_added(self) -> int:
        """Parameters added by all replacements."""
        return sum(item.params_added for item in self)

    @property
    def macs_added(self) -> int | None:
        """Multiply-adds added for one image; None where any of them is unknown."""
        known = [item.macs_added for item in self if item.macs_added is not None]
        return sum(known) if len(known) == len(self) else None

    def to_dict(self) -> list[dict[str, Any]]:
        """The replacements as plain dicts, for logs and JSON."""
        return [asdict(item) for item in self]

    def __str__(self) -> str:
        def count(value: int | None) -> str:
            return "n/a" if value is None else f"{value:,}"

        rows = [("name", "before", "after", "+ parameters", "+ multiply-adds")]
        for item in self:
            name = item.name + "".join(f" = {alias}" for alias in item.aliases)
            rows.append((name, item.before, item.after, count(item.params_added), count(item.macs_added)))
        noun = "layer" if len(self) == 1 else "layers"
        rows.append((f"{len(self)} {noun}", "", "", count(self.params_added), count(self.macs_added)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        align = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust)
        aligned = ["  ".join(f(text, w) for f, text, w in zip(align, row, widths, strict=True)) for row in rows]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [aligned[0], rule, *aligned[1:-1], rule, aligned[-1]]
        if self.input_size is not None:
            lines.append(f"multiply-adds for one image of {' x '.join(map(str, self.input_size))}")
        if self.note:
            lines.append(self.note)
        return "\n".join(line.rstrip() for line in lines)


def convert(
    model: nn.Module,
    rules: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    input_size: tuple[int, int, int] | None = None,
) -> ConversionReport:
    """Replace convolutions of `model` by deformable layers, in place.

    A fresh `DCNv1`, `DCNv2` or `ActiveConv2d` computes what the convolution computed and shares its `weight` and
    `bias`; `Dilated`, a control, shares them with taps farther apart. A `DCNv3` or `DCNv4`, in a depthwise one's place,
    does neither: a fresh one is a mean over the window between two linear layers, or 0. Everything is checked before
    anything is changed: after an error the model is as it was.

    A rule is a dict:

    - `match`: a glob on dotted module names, or a list of them. `*` and `?` match any character, dots included,
      and `[2-4]` one of a set (the rules of `fnmatch`); a name starting with `re:` is a regular expression
      that must match the whole name.
    - `layer`: `dict(type='DCNv2', offset_groups=1, ...)`; type is a name in `dcn_plugin.layers.LAYERS` or a class (of
      your own: a `dcn_plugin.layers.SamplingModule` with `drop_in = True`), the rest are that layer's options beyond
      `nn.Conv2d`'s arguments.
    - `exclude` (optional): like `match`; takes names out again.
    - conditions (optional): `kernel_size`, `stride`, `dilation` (integer or (y, x) pair), `groups` (integer, or
      `'depthwise'`), `min_channels` and `max_channels` (hold for input and output channels both).

    Without a condition, everything a rule matches must be a convolution. With one, the rule is about convolutions, and
    whatever else the glob matches is left out.

    Args:
        model: any module.
        rules: one rule or a sequence of them, for example from a config file.
        input_size: (C, H, W) of an image, for counting multiply-adds; one forward pass of zeros measures the feature
            maps. Default: what a timm model says about itself (`pretrained_cfg`), else multiply-adds are unknown.

    Returns:
        A printable `ConversionReport`. Multiply-adds are those of `conv_offset`, and of all linear and depthwise parts
        of a `DCNv3` or `DCNv4`; bilinear sampling, about four
        per tap and input channel and output position, is not among them.

    Raises:
        ValueError: a rule matches nothing, has an unknown key or layer type or option, or two rules match one layer.
        TypeError: a rule matches something that cannot be replaced (not an `nn.Conv2d`, a subclass with a `forward`
            of its own, one that is deformable already, one that a module above it folds into others, as RepVGG's blocks
            do, ...), or an argument has the wrong type.

    Example:
        >>> from torch import nn
        >>> import dcn_plugin
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        >>> report = dcn_plugin.convert(model, dict(match="2", layer=dict(type="DCNv2")), input_size=(3, 16, 16))
        >>> report.params_added, report.macs_added
        (1971, 497664)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        raise TypeError("model: expected one that is wrapped only after it is converted, got a DistributedDataParallel")
    parsed = _parse_rules(rules)
    if input_size is not None:
        input_size = _checked_input_size(input_size)

    # One entry per module object, so that a module registered twice stays one module.
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    plan = _plan(model, parsed, names)

    macs, measured_size, note = _measure(model, {module: names[module][0] for module in plan}, input_size)
    replacements = []
    for module, layer in plan.items():
        for name in names[module]:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).register_module(child, layer)
        added = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in module.parameters())
        first, *others = names[module]
        replacements.append(
            Replacement(
                name=first,
                before=_describe(module),
                after=_named(layer),
                params_added=added,
                macs_added=layer.predictor_multiply_adds(macs[module]) if module in macs else None,
                aliases=tuple(others),
            )
        )
    if replacements:
        accept_sibling_offset_keys(model)
    return ConversionReport(replacements, measured_size, note)


def _named(layer: Any) -> str:
    values = {key: getattr(layer, key) for key in layer.option_names()}
    options = [f"{key}={value!r}" for key, value in values.items() if value is not None]
    return f"{type(layer).__name__}({', '.join(options)})"


def _describe(conv: Any) -> str:
    text = f"{type(conv).__name__}({conv.in_channels}, {conv.out_channels}, {'x'.join(map(str, conv.kernel_size))}"
    for key in ("stride", "dilation"):
        value = getattr(conv, key)
        if value != (1, 1):
            text += f", {key}={value[0] if value[0] == value[1] else value}"
    return text + (f", groups={conv.groups})" if conv.groups != 1 else ")")


@dataclass(frozen=True)
class _Rule:
    label: str
    match: list[re.Pattern[str]]
    exclude: list[re.Pattern[str]]
    layer: type[Any]  # with `from_conv`, `option_names` and `predictor_multiply_adds`
    options: dict[str, Any]
    conditions: dict[str, Any]

    def selects(self, names: list[str]) -> bool:
        def hit(patterns: list[re.Pattern[str]]) -> bool:
            return any(pattern.fullmatch(name) for pattern in patterns for name in names if name)

        return hit(self.match) and not hit(self.exclude)

    def admits(self, module: nn.Module) -> bool:
        """Whether a module meets the conditions; a rule that has some is about convolutions only."""
        if not self.conditions:
            return True
        if not isinstance(module, (nn.Conv2d, SamplingConv)):
            return False
        for key, wanted in self.conditions.items():
            if key == "min_channels":
                met = min(module.in_channels, module.out_channels) >= wanted
            elif key == "max_channels":
                met = max(module.in_channels, module.out_channels) <= wanted
            elif wanted == "depthwise":
                met = module.groups == module.in_channels
            else:
                met = getattr(module, key) == wanted
            if not met:
                return False
        return True


def _parse_rules(rules: Any) -> list[_Rule]:
    if isinstance(rules, Mapping):
        rules = [rules]
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise TypeError(f"rules: expected a dict or a list of dicts, got {type(rules).__name__}")
    return [_parse_rule(rule, index) for index, rule in enumerate(rules)]


def _parse_rule(rule: Any, index: int) -> _Rule:
    label = f"rules[{index}]"
    if not isinstance(rule, Mapping):
        raise TypeError(f"{label}: expected a dict, got {type(rule).__name__}")
    for key in rule:
        if key not in _RULE_KEYS:
            hint = did_you_mean(key, _RULE_KEYS)
            raise ValueError(f"{label}: expected keys out of {', '.join(_RULE_KEYS)}, got {key!r}{hint}")
    for key in ("match", "layer"):
        if key not in rule:
            raise ValueError(f"{label}: expected a key {key!r}, got {', '.join(map(repr, rule)) or 'none'}")
    label = f"{label} (match={rule['match']!r})"
    layer, options = _parse_layer(rule["layer"], label)
    return _Rule(
        label=label,
        match=_patterns(rule["match"], f"{label}: match"),
        exclude=_patterns(rule.get("exclude", []), f"{label}: exclude"),
        layer=layer,
        options=options,
        conditions={key: _condition(key, rule[key], label) for key in _CONDITIONS if rule.get(key) is not None},
    )


def _patterns(value: Any, label: str) -> list[re.Pattern[str]]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise TypeError(f"{label}: expected a string or a list of strings, got {value!r}")
    try:
        return [re.compile(item[3:] if item.startswith("re:") else translate(item)) for item in items]
    except re.error as error:
        raise ValueError(f"{label}: expected regular expressions after re:, got {value!r} ({error})") from None


def _parse_layer(config: Any, label: str) -> tuple[type[Any], dict[str, Any]]:
    if not isinstance(config, Mapping) or "type" not in config:
        raise TypeError(f"{label}: layer: expected a dict with a 'type', got {config!r}")
    kind, known = config["type"], drop_ins()
    named = known.get(kind, LAYERS.get(kind)) if isinstance(kind, str) else kind
    if not (isinstance(named, type) and issubclass(named, SamplingModule) and named.drop_in):
        known_kind = isinstance(named, type)
        why = ", which cannot stand in for a convolution" if known_kind else did_you_mean(kind, known)
        raise ValueError(f"{label}: layer: expected a type out of {', '.join(known)}, got {kind!r}{why}")
    options = {key: value for key, value in config.items() if key != "type"}
    own = cast(Any, named).option_names()
    for key in options:
        if key not in own:
            hint = f" (it is called {_SYNONYMS[key]!r} here)" if key in _SYNONYMS else did_you_mean(key, own)
            raise ValueError(
                f"{label}: layer: expected options of {named.__name__} out of {', '.join(own)}, got {key!r}{hint}"
            )
    return named, options


def _condition(key: str, value: Any, label: str) -> Any:
    if key == "groups" and value == "depthwise":
        return value
    single = isinstance(value, int) and not isinstance(value, bool)
    if key in ("groups", "min_channels", "max_channels"):
        if not single:
            allowed = "an integer or 'depthwise'" if key == "groups" else "an integer"
            raise TypeError(f"{label}: {key}: expected {allowed}, got {value!r}")
        return value
    if single:
        return (value, value)
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(item, int) for item in value):
        return tuple(value)
    raise TypeError(f"{label}: {key}: expected an integer or a pair of integers, got {value!r}")


def _checked_input_size(value: Any) -> tuple[int, int, int]:
    if not isinstance(value, Sequence) or len(value) != 3 or not all(isinstance(v, int) and v > 0 for v in value):
        raise ValueError(f"input_size: expected three positive integers (C, H, W), got {value!r}")
    channels, height, width = value
    return channels, height, width


def _plan(model: nn.Module, rules: list[_Rule], names: dict[nn.Module, list[str]]) -> dict[nn.Module, Any]:
    """Build every new layer, leaving the model alone; the order is the model's."""
    chosen: dict[nn.Module, _Rule] = {}
    deformable = [name for module, own in names.items() if isinstance(module, SamplingModule) for name in own]
    for rule in rules:
        selected = [m for m, own in names.items() if rule.selects(own)]
        admitted = [m for m in selected if rule.admits(m)]
        if not admitted:
            if selected:
                got = f"{len(selected)} modules, none of which is one"
                raise ValueError(f"{rule.label}: expected a convolution that meets {rule.conditions}, got {got}")
            if isinstance(next(iter(names)), nn.Conv2d) and any(pattern.fullmatch("") for pattern in rule.match):
                raise TypeError(
                    f"{rule.label}: expected a convolution inside the model, got the model itself, which cannot be "
                    f"replaced in place: use {rule.layer.__name__}.from_conv(model)"
                )
            raise ValueError(f"{rule.label}: expected a module of the model that it matches, got none")
        for module in admitted:
            name = names[module][0]
            if module in chosen:
                raise ValueError(f"{name}: expected one rule for it, got {chosen[module].label} and {rule.label}")
            owner = next((d for d in deformable if name == d or name.startswith(f"{d}.")), None)
            if owner is not None:
                raise TypeError(
                    f"{rule.label}: expected plain convolutions, got {name!r}, as {owner!r} is deformable already: "
                    "exclude it"
                )
            chosen[module] = rule

    plan: dict[nn.Module, Any] = {}
    for module, own in names.items():
        if module not in chosen:
            continue
        rule = chosen[module]
        try:
            layer = rule.layer.from_conv(module, **rule.options)
        except (TypeError, ValueError) as error:
            hint = ""
            if not isinstance(module, nn.Conv2d) and not rule.conditions:
                hint = "; narrow the pattern, or add a condition such as kernel_size, which leaves out other modules"
            raise type(error)(
                f"{rule.label}: expected what can be replaced, got {own[0]!r}, which cannot: {error}{hint}"
            ) from error
        if not layer.drop_in:
            raise ValueError(
                f"{rule.label}: expected a layer that the input alone suffices for, as the model gives {own[0]!r} "
                f"nothing else, got {_named(layer)}"
            )
        plan[module] = layer
    folded = find_folded(model, plan)
    if folded is not None:
        label, name = chosen[folded.conv].label, names[folded.conv][0]
        owner = repr(names[folded.owner][0]) if folded.owner is not model else "the model itself"
        raise TypeError(
            f"{label}: expected convolutions that stay what they are, got {name!r}, which {owner} "
            f"({type(folded.owner).__name__}) folds: {folded.method}() {folded.reason}. Leave it out with exclude, or "
            "fold the model first (timm's with timm.utils.model.reparameterize_model) and convert what is left"
        )
    return plan


def _measure(
    model: nn.Module, convs: dict[nn.Module, str], input_size: tuple[int, int, int] | None
) -> tuple[dict[nn.Module, int], tuple[int, int, int] | None, str]:
    """Output positions of each convolution for one image, summed over its calls; the size used; a note."""
    asked = input_size is not None
    if input_size is None:
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        if not size or not convs:
            return {}, None, "multiply-adds are unknown without input_size=(C, H, W)" if convs else ""
        input_size = _checked_input_size(size)

    positions: dict[nn.Module, int] = {}

    def record(conv: nn.Module, _: Any, output: torch.Tensor) -> None:
        positions[conv] = positions.get(conv, 0) + output[0, 0].numel()

    modes = {module: module.training for module in model.modules()}
    handles = [conv.register_forward_hook(record) for conv in convs]
    first = next(model.parameters())
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, *input_size, device=first.device, dtype=first.dtype))
    except Exception as error:
        size, said = tuple(input_size), f"{type(error).__name__}: {error}"
        if asked:
            raise ValueError(
                f"input_size: expected a size that the model runs on, got {size}: {said}; nothing was converted"
            ) from error
        return {}, None, f"multiply-adds are unknown: the model does not run on input_size={size}: {said}"
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    idle = [name for conv, name in convs.items() if conv not in positions]
    return positions, input_size, f"not called by the model's forward: {', '.join(idle)}" if idle else ""
