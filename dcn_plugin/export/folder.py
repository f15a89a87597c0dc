"""Export a fine-tuned model as a folder that timm, or `load_exported`, loads back with identical outputs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from .._config import plain
from ..checkpoint import refuse_others
from ..convert import convert
from ..detection import build_detector
from ..detection.spec import without_pretrained_backbone
from ..models.build import build_model, check_saved_model, without_weights

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
    `import dcn_plugin`, `timm.create_model('local-dir:<directory>', pretrained=True)` gives the same outputs, and so
    does `transformers.AutoModelForImageClassification.from_pretrained(directory)`. A model changed by replacement
    rules, built by MMEngine, or a detector has no timm name: its folder also holds the rules and the MMEngine config or
    the detector's specification, and `dcn_plugin.finetune.load_exported(directory)`, which reads all kinds, builds it
    again. (transformers refuses such a folder: model type `dcn_plugin`, which it does not know.)

    The files are written beside what is there and moved once they are whole: after an error the folder is as it was.

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
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose names nobody else knows
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
    if KEY in extra:
        # transformers takes a folder without this for a plain timm model and drops the weights that such a one lacks.
        extra["model_type"] = KEY
    data = {key: value for key, value in plain(data_config or {}).items() if value is not None}
    with _all_or_nothing(Path(directory)) as folder:
        if is_timm:
            names = dict(label_names=list(class_names)) if class_names is not None else {}
            _save_timm_model(model, folder, extra | names, data)
        else:
            state = model.state_dict()
            _copy_views(state)
            safetensors.torch.save_file(state, str(folder / WEIGHTS))
            extra |= dict(pretrained_cfg=data, label_names=None if class_names is None else list(class_names))
            if category_ids is not None:
                extra["category_ids"] = list(category_ids)
            (folder / CONFIG).write_text(json.dumps(extra, indent=2))
    return Path(directory)


def _save_timm_model(model: nn.Module, folder: Path, extra: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    def plain_tensors(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        _copy_views(state)

    hook = model.register_state_dict_post_hook(plain_tensors)
    try:
        save_for_hf(model, str(folder), model_config=dict(extra), safe_serialization=True, data_config=dict(data))
    finally:
        hook.remove()
    # timm writes the number of classes twice, as an argument too, and transformers would pass both.
    config = json.loads((folder / CONFIG).read_text())
    if config.get("model_args", {}).pop("num_classes", config["num_classes"]) == config["num_classes"]:
        (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _copy_views(state: dict[str, Tensor]) -> None:
    """Replace what safetensors does not write: other memory formats, and memory that two names share."""
    seen: set[int] = set()
    for name, value in state.items():
        value = value.detach()
        place = value.untyped_storage().data_ptr()
        if not value.is_contiguous() or place in seen:
            value = value.clone(memory_format=torch.contiguous_format)
        seen.add(place)
        state[name] = value


@contextmanager
def _all_or_nothing(directory: Path) -> Iterator[Path]:
    """Give a folder to write to, whose files become those of `directory` once all are written."""
    before = directory.is_dir()
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside or in it, so that moving is renaming.
    folder = (directory if before else directory.parent) / f".{directory.name}.{os.getpid()}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if before:
            for name in (WEIGHTS, CONFIG):
                os.replace(folder / name, directory / name)
            folder.rmdir()
        else:
            folder.rename(directory)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def load_exported(directory: str | Path, *, spec: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the model that `export_model` wrote to `directory`, in eval mode, with its weights.

    Its attributes `class_names` and `category_ids` are what the folder says of them, or None. No code is run that the
    folder names: an MMEngine model, and every `type` inside it, must be registered with MMEngine.

    Args:
        directory: the folder.
        spec: the MMEngine config of the model, in place of what the folder says of it; with one of your own, import
            paths are fine.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: the weights are a Git LFS pointer, or something else; an MMEngine model whose `type` is not
            registered; `spec` for a folder of another kind.

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
    model: Any
    if spec is not None and "model" not in ours:
        raise ValueError(f"spec: expected None, as {directory} holds no model of MMEngine's, got {spec!r}")
    if not ours:
        model = timm.create_model(f"local-dir:{directory}", pretrained=True)
    else:
        if "detector" in ours:
            model = build_detector(ours["detector"])
        elif "model" in ours:
            if spec is None:
                check_saved_model(ours["model"], "load_exported(directory, spec=...)")
            model = build_model(without_weights(ours["model"]) if spec is None else spec)
        else:
            model = timm.create_model(f"local-dir:{directory}", pretrained=False)
        if "rules" in ours:
            convert(model, ours["rules"])
        _load_weights(model, directory / WEIGHTS)
    model.class_names, model.category_ids = as_names(config.get("label_names")), config.get("category_ids")
    return model.eval()


def _load_weights(model: nn.Module, path: Path) -> None:
    state = safetensors.torch.load_file(str(path))
    own = model.state_dict()
    # Older folders hold a tensor that the model has under two names only once.
    given = {(own[name].data_ptr(), own[name].shape) for name in state if name in own}
    again = {name: value for name, value in own.items() if (value.data_ptr(), value.shape) in given and value.numel()}
    model.load_state_dict({name: value for name, value in again.items() if name not in state} | state)


def as_names(labels: Any) -> list[str] | None:
    """Return names in label order from a list of names, or a dict from label to name as timm's folders may have."""
    if isinstance(labels, Mapping):
        numbered = {int(label): name for label, name in labels.items()}
        labels = [numbered[label] for label in sorted(numbered)] if set(numbered) == set(range(len(numbered))) else None
    return None if labels is None else [str(name) for name in labels]
