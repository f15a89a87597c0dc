"""How an exported folder describes a model that timm has no name for: what it writes, and how that is built again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

#: What else `config.json` may hold beside a description.
RULES = "rules"


class Form(NamedTuple):
    """One kind of model in exported folders.

    Fields:
        key: where `config.json` holds the description, below `dcn_plugin`.
        to_spec: from a model and the `spec` that came with it to the description, in plain types; None for a model of
            another kind. Raises ValueError for a `spec` that does not describe the model.
        from_spec: from the description to the model, before its weights are loaded. The description comes from a file,
            so nothing that it names may be imported or called unchecked.
    """

    key: str
    to_spec: Callable[[nn.Module, Any], Mapping[str, Any] | None]
    from_spec: Callable[[Mapping[str, Any]], nn.Module]


FORMS: dict[str, Form] = {}
"""Every form by its key in `config.json`; `register_form` adds to them."""


def register_form(
    key: str,
    to_spec: Callable[[nn.Module, Any], Mapping[str, Any] | None],
    from_spec: Callable[[Mapping[str, Any]], nn.Module],
) -> Form:
    """Make one more kind of model known to `export_model` and `load_exported`, and return its `Form`.

    The later ones are asked first whether a model is theirs.

    Raises:
        ValueError: a key that is taken.
    """
    if key in FORMS or key == RULES:
        raise ValueError(f"key: expected one of its own beside {', '.join([*FORMS, RULES])}, got {key!r}")
    FORMS[key] = Form(key, to_spec, from_spec)
    return FORMS[key]


# The parts that build models are imported when one of these is asked, as they need timm, MMEngine or torchvision.


def _of_mmengine(model: nn.Module, spec: Any) -> Mapping[str, Any] | None:
    from ..models.build import saved_spec

    return saved_spec(model, spec)


def _by_mmengine(spec: Mapping[str, Any]) -> nn.Module:
    from ..models.build import build_saved

    return build_saved(spec, "load_exported(directory, spec=...)")


def _of_detector(model: nn.Module, spec: Any) -> Mapping[str, Any] | None:
    from ..detection.spec import saved_spec

    return saved_spec(model, spec)


def _by_detector(spec: Mapping[str, Any]) -> nn.Module:
    from ..detection import build_detector

    return build_detector(spec)


def _of_segmenter(model: nn.Module, spec: Any) -> Mapping[str, Any] | None:
    from ..segmentation.spec import saved_spec

    return saved_spec(model, spec)


def _by_segmenter(spec: Mapping[str, Any]) -> nn.Module:
    from ..segmentation import build_segmenter

    return build_segmenter(spec)


MMENGINE = register_form("model", _of_mmengine, _by_mmengine)
DETECTOR = register_form("detector", _of_detector, _by_detector)
SEGMENTER = register_form("segmenter", _of_segmenter, _by_segmenter)
