"""Export a fine-tuned model as a folder that timm, or `load_exported`, loads back with identical outputs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._config import as_names, plain, storable
from ..checkpoint import refuse_others
from ..convert import convert
from .forms import FORMS, MMENGINE, RULES, Form

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
    rules, built by MMEngine, a detector or a segmenter has no timm name: its folder also holds the rules and the
    MMEngine config or the specification (see `Form`), and `load_exported(directory)`, which reads all kinds, builds it
    again.
    (transformers refuses such a folder: model type `dcn_plugin`, which it does not know.)

    The files are written beside what is there and moved once they are whole: after an error the folder is as it was.

    Args:
        model: the trained model (the classifier or detector itself, not the Lightning module).
        directory: folder to write to; made if missing.
        spec: what `FinetuneModule(model=...)` was built from, or `spec` of `DetectionModule` or `SegmentationModule`;
            needed for an MMEngine model, a detector and a segmenter.
        rules: the replacement rules it was converted with.
        data_config: preprocessing (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`) stored beside the weights.
        class_names: names of the classes in label order (a detector's labels count from 1).
        category_ids: ids of a detector's classes in its annotation files, in label order.

    Raises:
        ValueError: a model that neither a timm name nor `spec` describes. TypeError: rules that name a class.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose names nobody else knows
    extra: dict[str, Any] = {}
    if rules:
        extra[KEY] = storable({RULES: rules})  # a class would have no name there
    described = _describe(model, spec)
    if described is not None:
        extra[KEY] = extra.get(KEY, {}) | described
    if KEY in extra:
        # transformers takes a folder without this for a plain timm model and drops the weights that such a one lacks.
        extra["model_type"] = KEY
    data = {key: value for key, value in plain(data_config or {}).items() if value is not None}
    with _all_or_nothing(Path(directory)) as folder:
        if described is None:
            names = dict(label_names=list(class_names)) if class_names is not None else {}
            _save_timm_model(model, folder, extra | names, data)
        else:
            from safetensors.torch import save_file

            state = model.state_dict()
            _copy_views(state)
            save_file(state, str(folder / WEIGHTS))
            extra |= dict(pretrained_cfg=data, label_names=None if class_names is None else list(class_names))
            if category_ids is not None:
                extra["category_ids"] = list(category_ids)
            (folder / CONFIG).write_text(json.dumps(extra, indent=2))
    return Path(directory)


def _describe(model: nn.Module, spec: Any) -> dict[str, Any] | None:
    """Return what a folder holds to build a model again, under the key of its form; None where timm's name does it."""
    for form in reversed(FORMS.values()):
        described = form.to_spec(model, spec)
        if described is not None:
            return {form.key: plain(described)}
    return None


def _save_timm_model(model: nn.Module, folder: Path, extra: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    from timm.models import save_for_hf

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
    form = next((FORMS[key] for key in ours if key in FORMS), None)
    if spec is not None and form != MMENGINE:
        raise ValueError(f"spec: expected None, as {directory} holds no model of MMEngine's, got {spec!r}")
    unknown = [key for key in ours if key not in FORMS and key != RULES]
    if unknown:
        raise ValueError(
            f"directory: expected a model described as one of {', '.join(FORMS)}, got {unknown[0]!r} in {directory}: "
            "import first what registers that form"
        )
    model: Any = _build(directory, ours, form, spec)
    model.class_names, model.category_ids = as_names(config.get("label_names")), config.get("category_ids")
    return model.eval()


def _build(directory: Path, ours: Mapping[str, Any], form: Form | None, spec: Mapping[str, Any] | None) -> nn.Module:
    """Build the model with its weights: by its form, or by timm, which loads them itself where no rules change it."""
    if form is None:
        import timm

        model = timm.create_model(f"local-dir:{directory}", pretrained=not ours)
    elif spec is not None:
        from ..models.build import build_model

        model = build_model(spec)
    else:
        model = form.from_spec(ours[form.key])
    if RULES in ours:
        convert(model, ours[RULES])
    if ours:
        _load_weights(model, directory / WEIGHTS)
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(str(path))
    own = model.state_dict()
    # Older folders hold a tensor that the model has under two names only once.
    given = {(own[name].data_ptr(), own[name].shape) for name in state if name in own}
    again = {name: value for name, value in own.items() if (value.data_ptr(), value.shape) in given and value.numel()}
    model.load_state_dict({name: value for name, value in again.items() if name not in state} | state)
