"""The embedded scenes: what is drawn, that it is always the same, and that no half-written set is ever used."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "sklearn", "pycocotools"):
    pytest.importorskip(_name)
from dcn_plugin.finetune import scenes  # noqa: E402
from dcn_plugin.finetune.detection.data import CocoDataModule  # noqa: E402
from dcn_plugin.finetune.digits import SPLITS, _source  # noqa: E402
from dcn_plugin.finetune.scenes import draw_scene, write_scenes  # noqa: E402
from dcn_plugin.finetune.segmentation import SegmentationDataModule  # noqa: E402

SMALL = dict(train=3, val=2, test=2)


def test_scenes_follow_from_seed_split_and_index_alone():
    image, boxes, labels, mask = draw_scene("val", 3)
    draw_scene("val", 4)
    np.random.seed(5)
    again = draw_scene("val", 3)
    assert np.array_equal(image, again[0]) and (boxes, labels) == again[1:3]
    assert np.array_equal(mask, again.mask)
    for other in (draw_scene("val", 4), draw_scene("test", 3), draw_scene("val", 3, seed=1)):
        assert not np.array_equal(image, other[0])
    # And so on every machine: the boxes and labels of one scene, as they were when the set was made.
    assert (boxes, labels) == (BOXES, LABELS)


@pytest.mark.parametrize("index", range(12))
def test_boxes_are_tight_around_ink_and_hardly_overlap(index):
    clean = dict(strokes=0, fragments=0, noise=0.0)
    image, boxes, labels, _ = draw_scene("train", index, **clean)
    assert image.shape == (128, 128) and image.dtype == np.uint8
    assert 1 <= len(boxes) == len(labels) <= 6 and set(labels) <= set(range(10))
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128
        for other in boxes[:number]:
            width = min(x2, other[2]) - max(x1, other[0])
            height = min(y2, other[3]) - max(y1, other[1])
            smaller = min((x2 - x1) * (y2 - y1), (other[2] - other[0]) * (other[3] - other[1]))
            assert max(width, 0) * max(height, 0) <= 0.1 * smaller
    # The same scene twice, once with its digits alone on black: every side of a box touches ink, none lies outside.
    rng = np.random.RandomState(index)
    canvas = np.zeros((128, 128), np.uint8)
    pixels = _source()[0][index, 0].numpy()
    ink = scenes._ink(pixels, 30, 1.0, rng.uniform(-25, 25))
    x1, y1, x2, y2 = scenes._place(rng, canvas, ink, [], 0.0)
    rows, columns = np.nonzero(canvas >= scenes.INK)
    assert (x1, y1, x2, y2) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_clutter_has_no_boxes_and_is_there():
    def ink(**changes):
        image, boxes, _, _ = draw_scene("train", 0, noise=0.0, **changes)
        inside = np.zeros((128, 128), bool)
        for x1, y1, x2, y2 in boxes:
            inside[y1:y2, x1:x2] = True
        return boxes, int(((image >= 100) & ~inside).sum())

    clean, cluttered = ink(strokes=0, fragments=0), ink()
    assert clean[0] == cluttered[0] and clean[1] == 0 and cluttered[1] > 100


def test_no_digit_is_in_two_splits(monkeypatch):
    images, labels = _source()
    seen = {split: set() for split in SPLITS}

    class Watched:
        def __getitem__(self, key):
            seen[split].add(int(key[0]))
            return images[key]

    monkeypatch.setattr(scenes, "_source", lambda: (Watched(), labels))
    for split in SPLITS:
        for index in range(30):
            draw_scene(split, index)
        first, last = SPLITS[split]
        assert len(seen[split]) > 50 and min(seen[split]) >= first and max(seen[split]) < last


@pytest.mark.parametrize("index", range(4))
def test_masks_are_the_ink_within_the_boxes(index):
    image, ((x1, y1, x2, y2),), (label,), mask = draw_scene(
        "train", index, digits=(1, 1), strokes=0, fragments=0, noise=0.0
    )
    rows, columns = np.nonzero(mask == label + 1)
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [x1, y1, x2, y2]
    assert set(np.unique(mask)) == {0, label + 1, scenes.IGNORED}
    inside = np.zeros_like(mask, bool)
    inside[y1:y2, x1:x2] = True
    assert not mask[~inside].any()
    # Ink is drawn with at least 0.65 of its brightness; what is neither ink nor edge is darker than the edge, but for
    # the background, which is below 70.
    assert (image[mask == label + 1] >= int(0.65 * scenes.INK)).all()
    assert (image[inside & (mask == 0)] < max(scenes.EDGE, 75)).all()


def test_a_written_set_is_cocos_format_and_says_what_was_drawn(tmp_path):
    root = write_scenes(tmp_path / "scenes", **SMALL, size=96, digit_size=(20, 30))
    for split, count in SMALL.items():
        whole = json.loads((root / f"annotations/instances_{split}.json").read_text())
        assert [category["name"] for category in whole["categories"]] == [str(digit) for digit in range(10)]
        assert len(whole["images"]) == count == len(list((root / "images" / split).iterdir()))
        for index, entry in enumerate(whole["images"]):
            image, boxes, labels, mask = draw_scene(split, index, size=96, digit_size=(20, 30))
            assert np.array_equal(np.asarray(Image.open(root / "images" / split / entry["file_name"])), image)
            read = Image.open(root / "masks" / split / entry["file_name"])
            assert read.mode == "P" and np.array_equal(np.asarray(read), mask)
            own = [item for item in whole["annotations"] if item["image_id"] == entry["id"]]
            assert [item["category_id"] - 1 for item in own] == labels
            for item, (x1, y1, x2, y2) in zip(own, boxes, strict=True):
                assert item["bbox"] == [x1, y1, x2 - x1, y2 - y1] and item["area"] == (x2 - x1) * (y2 - y1)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


@pytest.mark.parametrize("module", [CocoDataModule, SegmentationDataModule])
def test_a_loop_over_a_split_ends(tmp_path, module):
    data = module("digit_scenes", str(tmp_path), scenes=SMALL, in_chans=1, batch_size=1)
    data.setup("fit")
    for split, count in SMALL.items():
        assert sum(1 for _ in data._dataset(split)) == count
        assert data._dataset(split)[-1][1]["image_id"] == data._dataset(split)[count - 1][1]["image_id"]


def test_an_equal_set_is_left_alone_and_another_replaces_it(tmp_path):
    root = write_scenes(tmp_path / "scenes", **SMALL)
    stamp = (root / "scenes.json").stat().st_mtime_ns
    assert write_scenes(root, **SMALL).stat() and (root / "scenes.json").stat().st_mtime_ns == stamp
    write_scenes(root, **SMALL, limit=2)
    assert [len(list((root / "images" / split).iterdir())) for split in SMALL] == [2, 2, 2]
    write_scenes(root, **SMALL, noise=3.0)
    assert json.loads((root / "scenes.json").read_text())["options"]["noise"] == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_an_interrupted_write_leaves_nothing_that_is_used(tmp_path, monkeypatch):
    real = scenes._write_split

    def dies(folder, split, *rest):
        real(folder, split, *rest)
        if split == "val":
            raise KeyboardInterrupt

    root = write_scenes(tmp_path / "scenes", **SMALL)
    before = sorted(path.relative_to(root) for path in root.rglob("*"))
    monkeypatch.setattr(scenes, "_write_split", dies)
    for place in (root, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            write_scenes(place, **SMALL, noise=1.0)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before
    (root / "scenes.json").unlink()  # as if the power had gone while somebody copied the set
    with pytest.raises(FileExistsError, match="root.*something else"):
        write_scenes(root, **SMALL)


@pytest.mark.parametrize("there", [False, True])
def test_two_writers_at_once(tmp_path, there):
    if there:
        write_scenes(tmp_path / "scenes", **SMALL, noise=1.0)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(write_scenes, tmp_path / "scenes", **SMALL) for _ in range(4)]:
            done.result()
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    assert len(list((tmp_path / "scenes/images/train").iterdir())) == 3
    assert json.loads((tmp_path / "scenes/scenes.json").read_text())["options"]["noise"] == 12.0


# Scene 3 of the validation split.
BOXES = [[48, 43, 80, 86], [101, 41, 127, 75], [87, 0, 107, 28], [48, 82, 73, 124], [14, 18, 41, 66], [20, 76, 46, 123]]
LABELS = [9, 0, 0, 8, 2, 4]
