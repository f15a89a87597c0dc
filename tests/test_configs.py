"""Every config of the tree builds, trains for a step, and is short."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "sklearn", "pycocotools"):
    pytest.importorskip(_name)
from detector_runs import write_coco  # noqa: E402
from mmengine.config import Config  # noqa: E402
from segmenter_runs import write_folders  # noqa: E402
from test_data import write_shards  # noqa: E402

from dcn_plugin._config import arguments, build_object  # noqa: E402
from dcn_plugin.finetune import load_config  # noqa: E402
from dcn_plugin.finetune.run import RUN_KEYS, STRATEGIES, TASKS, build  # noqa: E402
from dcn_plugin.layers import sampling_layers  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LEAVES = sorted(path for path in CONFIGS.rglob("*.py") if "_base_" not in path.parts)
DETECTORS = [path for path in LEAVES if path.parent.name == "detection"]
SEGMENTERS = [path for path in LEAVES if path.parent.name == "segmentation"]
CLASSIFIERS = [path for path in LEAVES if path not in DETECTORS + SEGMENTERS]
BASES = sorted(path for path in CONFIGS.rglob("*.py") if "_base_" in path.parts)


def names(paths):
    return [path.stem for path in paths]


def bases_of(path: Path) -> set[Path]:
    given = runpy.run_path(str(path)).get("_base_", [])
    found = {(path.parent / base).resolve() for base in ([given] if isinstance(given, str) else given)}
    return found.union(*(bases_of(base) for base in found))


def test_no_base_config_is_left_unused():
    used = set().union(*(bases_of(leaf) for leaf in LEAVES))
    assert set(BASES) <= used


@pytest.mark.parametrize("path", LEAVES + BASES, ids=names(LEAVES + BASES))
def test_config_is_short_text_style_and_has_known_keys(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 20 and not any(line.startswith(("import ", "from ", "with ")) for line in lines)
    known = set().union(*(arguments(task.module) for task in TASKS.values()))
    assert set(Config.fromfile(str(path))) <= {*RUN_KEYS, *known}


OPTIONS = {
    "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.precision": "32-true",
    "trainer.fast_dev_run": 1, "trainer.enable_progress_bar": False, "trainer.enable_model_summary": False,
    "data.batch_size": 4, "data.num_workers": 0,
}  # fmt: skip


@pytest.mark.parametrize("path", CLASSIFIERS, ids=names(CLASSIFIERS))
def test_config_builds_and_trains_a_step(path, tmp_path):
    options = dict(OPTIONS)
    plain = load_config(path)
    digits = plain["data"]["name"] == "digits"
    if digits:
        options["data.dataset.limit"] = 8
    else:
        assert plain["model"]["pretrained"] and "." in plain["model"]["name"]  # a tag says whose weights these are
        options |= {"model.pretrained": False, "data.root": str(tmp_path), "data.input_size": 64}
    if plain["data"]["name"].startswith("wds/"):
        pytest.importorskip("webdataset")
        write_shards(tmp_path)
    elif not digits:
        for split in (plain["data"]["train_split"], plain["data"]["val_split"]):
            for i, name in enumerate("ab"):
                (tmp_path / split / name).mkdir(parents=True)
                for k in range(3):
                    Image.new("RGB", (80, 70), (90 * i, 40 * k, 9)).save(tmp_path / split / name / f"{k}.png")
    trainer, module, data = build(load_config(path, options), tmp_path / "work")
    assert any("fc" in name or "head" in name for name in train_a_step(path, trainer, module, data))


def train_a_step(path, trainer, module, data):
    """Train; return the names of the parameters that moved."""
    deformable = [m for m in sampling_layers(module.model).values() if m.offset_unit != "region"]
    assert bool(deformable) == ("dcn" in path.stem or path.stem.startswith("dat"))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer.fit(module, data)
    assert trainer.global_step == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())
    return [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]


@pytest.mark.filterwarnings("ignore:.*less than a pixel")
@pytest.mark.parametrize("path", DETECTORS, ids=names(DETECTORS))
def test_detection_config_builds_and_trains_a_step(path, tmp_path):
    options = {**OPTIONS, "data.batch_size": 2}
    plain = load_config(path)
    if plain["data"]["name"] == "coco":
        assert plain["model"]["backbone"]["pretrained"] and "." in plain["model"]["backbone"]["name"]
        options |= {"model.backbone.pretrained": False, "data.root": str(tmp_path), "model.min_size": 64}
        for split in ("train", "val"):
            written = write_coco(tmp_path, name=split)
            (tmp_path / written["images"]).rename(tmp_path / plain["data"][split]["images"])
            (tmp_path / "annotations").mkdir(exist_ok=True)
            (tmp_path / written["annotations"]).rename(tmp_path / plain["data"][split]["annotations"])
    else:
        options |= {"data.root": str(tmp_path / "scenes"), "data.scenes": dict(train=4, val=2, test=2)}
    trainer, module, data = build(load_config(path, options), tmp_path / "work")
    pools = [name for name, _ in module.named_parameters() if "offset" in name and "conv_offset" not in name]
    assert bool(pools) == ("deform" in path.stem)
    moved = train_a_step(path, trainer, module, data)
    assert any("rpn.head" in name for name in moved) and any("roi_heads" in name for name in moved)


@pytest.mark.parametrize("path", SEGMENTERS, ids=names(SEGMENTERS))
def test_segmentation_config_builds_and_trains_a_step(path, tmp_path):
    options = {**OPTIONS, "data.batch_size": 2}
    plain = load_config(path)
    if plain["data"]["name"] == "folders":
        assert plain["model"]["backbone"]["pretrained"] and "." in plain["model"]["backbone"]["name"]
        options |= {"model.backbone.pretrained": False, "data.root": str(tmp_path)}
        smaller = json.loads(json.dumps(plain["data"]["augment"]).replace("480", "96"))
        options |= {"model.backbone.layers": (1, 1, 1, 1), "data.augment": smaller}
        for split in ("train", "val"):
            write_folders(tmp_path, name=split, suffix="jpg")
            given = plain["data"][split]
            (tmp_path / given["list"]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"lists/{split}.txt").rename(tmp_path / given["list"])
        for ours, theirs in (("images", given["images"]), ("masks", given["masks"])):
            (tmp_path / ours).rename(tmp_path / theirs)
    else:
        options |= {"data.root": str(tmp_path / "scenes"), "data.scenes": dict(train=4, val=2, test=2)}
    trainer, module, data = build(load_config(path, options), tmp_path / "work")
    moved = train_a_step(path, trainer, module, data)
    assert any("classifier" in name for name in moved)


def test_the_embedded_detectors_are_trained_alike():
    """They are compared with one another, so only the model may differ."""
    arms = [load_config(path) for path in DETECTORS if "digit-scenes" in path.stem]
    assert len(arms) == 4
    for arm in arms:
        assert {key: value for key, value in arm.items() if key != "model"} == {
            key: value for key, value in arms[0].items() if key != "model"
        }


def test_fsdp_strategy_by_config():
    spec = dict(type="FSDPStrategy", sharding_strategy="SHARD_GRAD_OP")
    assert type(build_object("trainer.strategy", spec, STRATEGIES)).__name__ == "FSDPStrategy"
