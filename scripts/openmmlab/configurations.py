"""A published configuration read from an installed package, and what makes it small enough for a CPU without a network.

Nothing that the model computes is changed: its widths, depths and layers are the published ones. Changed are
where its first weights come from (no download), the sizes of pictures and batches, the length of the run, and
what needs a GPU (SyncBN, automatic mixed precision).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("mmdet", "mmseg", "mmpretrain")
SIDE, MANY = 160, 800  # the longer side of a picture, in pixels; where the model takes the best of many positions
SIZES = (
    "scale", "scales", "img_scale", "img_scales", "crop_size", "size", "random_size_range", "resize_scale", "pad_shape",
    "stride",
)  # fmt: skip
BATCH = 2


def folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0], ".mim", "configs")


def find(pattern: str) -> list[tuple[str, str]]:
    """Package and name of the configurations that match `package/folder/file.py`; `.py` may be left out."""
    package, _, rest = pattern.partition("/")
    if package not in PACKAGES or not rest:
        raise SystemExit(f"--config: expected {'|'.join(PACKAGES)}/folder/file.py with * and ?, got {pattern!r}")
    names = (path.relative_to(folder(package)).as_posix() for path in folder(package).rglob("*.py"))
    wanted = rest if rest.endswith(".py") else rest + ".py"
    return sorted((package, name) for name in names if fnmatch.fnmatch(name, wanted) and not name.startswith("_base_"))


def walk(value: Any, change: Callable[[dict], None]) -> None:
    """Call `change` with every dict below a value, the outer ones first."""
    if isinstance(value, dict):
        change(value)
        for item in list(value.values()):
            walk(item, change)
    elif isinstance(value, (list, tuple)):
        for item in value:
            walk(item, change)


def no_downloads(item: dict) -> None:
    """Drop weights that would be fetched; initialisers that draw numbers stay."""
    for key in ("init_cfg", "pretrained", "load_from", "teacher_ckpt"):
        found = item.get(key)
        several = found if isinstance(found, (list, tuple)) else [found]
        if key != "init_cfg":
            item.update({key: None} if key in item else {})
        elif any(isinstance(one, dict) and one.get("type") == "Pretrained" for one in several):
            item[key] = None


def for_a_cpu(item: dict) -> None:
    """SyncBN needs a process group of GPUs, AmpOptimWrapper a GPU."""
    replaced = {"SyncBN": "BN", "MMSyncBN": "BN", "AmpOptimWrapper": "OptimWrapper"}
    if isinstance(item.get("type"), str) and item["type"] in replaced:
        for key in ("loss_scale", "dtype") if item["type"] == "AmpOptimWrapper" else ():
            item.pop(key, None)
        item["type"] = replaced[item["type"]]


def smaller(size: Any, longest: int) -> Any:
    """A size in pixels, or a list of them, so that no side is longer, in multiples of 32."""
    if isinstance(size, (list, tuple)):
        if size and all(isinstance(side, int) for side in size):
            factor = longest / max(max(size), longest)
            return type(size)(size if factor == 1 else [max(32, round(side * factor / 32) * 32) for side in size])
        return type(size)(smaller(one, longest) for one in size)
    return min(size, longest) if isinstance(size, int) and not isinstance(size, bool) else size


def shrink(value: Any, longest: int) -> None:
    """Make the sizes below a part of the configuration smaller."""

    def change(item: dict) -> None:
        for key in SIZES:
            if item.get(key) is not None:
                item[key] = smaller(item[key], longest)

    walk(value, change)


def short(loader: dict | None, batch: int) -> None:
    """Load in this process, in small batches."""
    if isinstance(loader, dict):
        loader.update(num_workers=0, persistent_workers=False, batch_size=batch)
        loader.pop("prefetch_factor", None)
        loader.pop("multiprocessing_context", None)


def small(config: Any, work_dir: str) -> Any:
    """Change a configuration in place to a short run on a CPU that fetches nothing."""
    walk(config._cfg_dict, no_downloads)
    walk(config._cfg_dict, for_a_cpu)
    longest = MANY if config.model.get("num_queries", 0) >= 900 else SIDE
    for part in ("train", "val", "test"):
        short(config.get(f"{part}_dataloader"), BATCH if part == "train" else 1)
    if config.default_scope != "mmpretrain":  # whose pictures are small, and whose transformers have one size
        loaders = [config.get(f"{part}_dataloader") for part in ("train", "val", "test")]
        shrink([*loaders, config.get("tta_pipeline"), config.model.get("data_preprocessor")], longest)
    if config.default_scope == "mmseg":
        shrink([config.get("data_preprocessor"), config.model.get("test_cfg")], longest)
    train = config.train_cfg
    if "max_iters" in train or train.get("type") == "IterBasedTrainLoop":
        train.update(max_iters=2, val_interval=2)
        config.default_hooks.checkpoint.update(by_epoch=False, interval=2)
    else:
        train.update(max_epochs=1, val_interval=1)
        config.default_hooks.checkpoint.update(interval=1)
    train.pop("dynamic_intervals", None)
    if "type" in train:
        train.pop("by_epoch", None)  # light SOLOv2 says both, which MMEngine refuses
    config.default_hooks.checkpoint.pop("save_best", None)
    config.update(work_dir=work_dir, launcher="none", log_level="WARNING", resume=False)
    return config


def read(package: str, name: str, work_dir: str) -> Any:
    """Return a published configuration, made small."""
    from mmengine.config import Config

    config = Config.fromfile(folder(package) / name)
    config.setdefault("default_scope", package)
    return small(config, work_dir)
