"""Export a fine-tuned model as a folder that timm, or `load_exported`, loads back with identical outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from timm.models import save_for_hf
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from dcn_plugin.checkpoint import refuse_others
from dcn_plugin.convert import convert

from .config import plain
from .detection.module import build, without_pretrained_backbone
from .module import build_model

CONFIG, WEIGHTS, KEY = "config.json", "model.safetensors", "dcn_plugin"


def export_model(
    model: nn.Module,
    directory: str | Path,
    *,
    spec: str | Mapping[str, Any] | None = None,
    rules: Sequence[Mapping] | None = None,
    data_config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
) -> Path:
    """Write `model.safetensors` and `config.json` of a model to `directory` and return it.

    A model that a timm name describes (`resnet50_dcn`, ...) becomes a timm `local-dir:` folder: after
    `import dcn_plugin`, `timm.create_model('local-dir:<directory>', pretrained=True)` gives the same outputs. A model
    changed by replacement rules, built by MMEngine, or a detector has no timm name: its folder also holds the rules and
    the MMEngine config or the detector's specification, and `dcn_plugin.finetune.load_exported(directory)`, which reads
    all kinds, builds it again.

    Args:
        model: the trained model (the classifier or detector itself, not the Lightning module).
        directory: folder to write to; made if missing.
        spec: what `FinetuneModule(model=...)` was built from, or `DetectionModule(...).spec`; needed for an MMEngine
            model and a detector.
        rules: the replacement rules it was converted with.
        data_config: preprocessing (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`) stored beside the weights.
        class_names: names of the classes in label order (a detector's labels count from 1).
        category_ids: ids of a detector's classes in its annotation files, in label order.

    Raises:
        ValueError: a model that neither a timm name nor `spec` describes.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    extra: dict[str, Any] = {}
    is_timm = hasattr(model, "pretrained_cfg")
    if rules:
        extra[KEY] = dict(rules=plain(rules))
    if isinstance(model, GeneralizedRCNN):
        if not isinstance(spec, Mapping) or not {"name", "num_classes"} <= set(spec):
            raise ValueError(f"spec: expected dict(name=..., num_classes=..., ...) of a detector, got {spec!r}")
        extra[KEY] = extra.get(KEY, {}) | dict(detector=without_pretrained_backbone(spec))
    elif not is_timm:
        if not isinstance(spec, Mapping) or "type" not in spec:
            raise ValueError(f"spec: expected the MMEngine config of a {type(model).__name__}, got {spec!r}")
        extra[KEY] = extra.get(KEY, {}) | dict(model=plain(spec))
    data = {key: value for key, value in plain(data_config or {}).items() if value is not None}
    if is_timm:
        names = dict(label_names=list(class_names)) if class_names is not None else {}
        save_for_hf(model, str(directory), model_config=extra | names, safe_serialization=True, data_config=data)
        return directory
    safetensors.torch.save_model(model, str(directory / WEIGHTS))
    extra |= dict(pretrained_cfg=data, label_names=None if class_names is None else list(class_names))
    if category_ids is not None:
        extra["category_ids"] = list(category_ids)
    (directory / CONFIG).write_text(json.dumps(extra, indent=2))
    return directory


def load_exported(directory: str | Path) -> nn.Module:
    """Build the model that `export_model` wrote to `directory`, in eval mode, with its weights.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: the weights are a Git LFS pointer, or something else.

    Example:
        >>> import tempfile, timm, torch, dcn_plugin
        >>> model = timm.create_model('resnet18_dcn', num_classes=2).eval()
        >>> folder = export_model(model, tempfile.mkdtemp())
        >>> image = torch.rand(1, 3, 64, 64)
        >>> torch.equal(load_exported(folder)(image), model(image))
        True
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"directory: expected an exported model with {name}, got {directory}")
    refuse_others(directory / WEIGHTS)
    config = json.loads((directory / CONFIG).read_text())
    ours = config.get(KEY, {})
    if not ours:
        return timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    if "detector" in ours:
        model = build(ours["detector"])
    elif "model" in ours:
        model = build_model(ours["model"])
    else:
        model = timm.create_model(f"local-dir:{directory}", pretrained=False)
    if "rules" in ours:
        convert(model, ours["rules"])
    safetensors.torch.load_model(model, str(directory / WEIGHTS), strict=True)
    return model.eval()
