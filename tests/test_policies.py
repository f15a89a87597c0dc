"""Augmentation policies at the ends of what they draw, on purpose: training gets there once in some hundred images."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

pytest.importorskip("timm")
pytest.importorskip("pytorch_lightning")
pytest.importorskip("mmengine")
from test_data import COLOURS, write_folder  # noqa: E402
from timm.data import create_transform  # noqa: E402

from dcn_plugin.finetune import ImageDataModule, load_config  # noqa: E402
from dcn_plugin.finetune.classification.augment import check_policy, magnitudes, operations  # noqa: E402

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "classification").glob("*.py"))
NOISE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8))


def policies() -> dict[str, str]:
    found = {}
    for path in CONFIGS:
        policy = load_config(path)["data"].get("augment", {}).get("auto_augment")
        if policy is not None:
            found[policy] = path.name
    return found


def refuses_no_bits() -> bool:
    try:
        ImageOps.posterize(NOISE, 0)
    except ValueError:
        return True
    return False


needs_refusal = pytest.mark.skipif(not refuses_no_bits(), reason="this Pillow posterizes to 0 bits, as it did until 12")


def test_the_configs_have_policies():
    assert len(policies()) == 1 and len(CONFIGS) >= 9


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("draw", [-1e9, 1e9])
@pytest.mark.parametrize("policy", policies())
def test_every_operation_of_the_configs_holds_at_both_ends(policy, draw, mode, monkeypatch):
    mean = (0.5,) * len(mode)
    transform = create_transform((len(mode), 32, 32), is_training=True, auto_augment=policy, mean=mean, std=mean)
    monkeypatch.setattr(random, "gauss", lambda mean, std: draw)  # timm clips it to its limits
    ran = []
    for operation in operations(transform):
        operation.prob = 1.0
        for sign in (0.0, 1.0):
            monkeypatch.setattr(random, "random", lambda sign=sign: sign)
            image = operation(NOISE.convert(mode))
            assert image.mode == mode and image.size == (32, 32)
        ran.append(operation.name)
    assert len(ran) == 15 and "PosterizeIncreasing" in ran


@pytest.mark.parametrize("path", [path for path in CONFIGS if "imagefolder" in path.name], ids=lambda path: path.stem)
def test_training_data_of_a_config_survives_its_ends(path, tmp_path, monkeypatch):
    write_folder(tmp_path, "train", COLOURS, count=20)
    settings = load_config(path)["data"] | dict(root=str(tmp_path), val_split=None, num_workers=0, batch_size=4)
    data = ImageDataModule(**settings | dict(input_size=16))
    data.setup("fit")
    loader = data.train_dataloader()
    monkeypatch.setattr(random, "gauss", lambda mean, std: 1e9)
    for operation in operations(data._dataset("train").transform):
        operation.prob = 1.0
    assert sum(len(labels) for _ in range(5) for _, labels in loader) == 300


# -- a user's own -----------------------------------------------------------------------------------------------------


def train(tmp_path, policy, **options):
    if not (tmp_path / "train").exists():
        write_folder(tmp_path, "train", COLOURS)
    data = ImageDataModule(
        "", str(tmp_path), val_split=None, batch_size=2, augment=dict(auto_augment=policy), **options
    )
    data.setup("fit")
    return data.train_dataloader()


@needs_refusal
@pytest.mark.parametrize("policy, magnitude, operation", [
    ("rand-m9-mstd0.5-inc1", 10, "PosterizeIncreasing"),
    ("rand-m10-inc1", 10, "PosterizeIncreasing"),
    ("rand-m2", 2, "Posterize"),
    ("v0", 2, "Posterize"),
    ("rand-m9-mstd101", 0, "Posterize"),
])  # fmt: skip
def test_a_policy_that_would_fail_is_named_before_training(tmp_path, policy, magnitude, operation):
    words = (
        f"augment: auto_augment='{policy}' draws magnitude {magnitude}, at which {operation} fails with Pillow .*bits"
    )
    with pytest.raises(ValueError, match=words + ".*'rand-m9-mstd0.5-mmax9-inc1'"):
        train(tmp_path, policy, input_size=16)


@pytest.mark.parametrize("policy", ["trivial", "rand-mstd1-w0"])
def test_a_policy_that_timm_does_not_know_is_named(tmp_path, policy):
    with pytest.raises(ValueError, match=f"data .augment=.*'auto_augment': '{policy}'.* do not fit: Asser.*Unknown"):
        train(tmp_path, policy, input_size=16)


@pytest.mark.parametrize("size", [16, (1, 16, 16)])
@pytest.mark.parametrize("policy", [
    None, "rand-m9-mstd0.5", "rand-m9-mstd0.5-mmax9-inc1", "rand-m6-mstd0.5-inc1", "rand-m7-mstd0.5-inc1",
    "augmix-m3-w3", "original", "originalr", "3a", "v0r",
])  # fmt: skip
def test_a_policy_that_holds_is_taken(tmp_path, policy, size):
    images, labels = next(iter(train(tmp_path, policy, input_size=size)))
    assert len(images) == len(labels) == 2


def test_trying_out_changes_nothing_that_training_draws():
    transform = create_transform(32, is_training=True, auto_augment="rand-m9-mstd0.5-mmax9-inc1")
    random.seed(3)
    np.random.seed(3)
    want = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    check_policy(transform, "rand-m9-mstd0.5-mmax9-inc1", "RGB")
    assert (random.random(), np.random.rand()) == want


def test_magnitudes_are_those_that_timm_draws():
    def ends(policy):
        transform = create_transform(32, is_training=True, auto_augment=policy)
        return {magnitudes(operation) for operation in operations(transform)}

    assert ends("rand-m9-mstd0.5-inc1") == {(6.5, 10.0)}
    assert ends("rand-m9-mstd0.5-mmax9-inc1") == {(6.5, 9)}
    assert ends("rand-m4") == {(4, 4)}
    assert ends("augmix-m3") == {(0.0, 3)}
    assert ends("rand-m14-mmax12") == {(12, 12)}
