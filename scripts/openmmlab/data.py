"""Small data sets, generated where a configuration looks for the published ones, in their layout.

A picture holds a few coloured shapes. What a data set needs is asked of its class: its names of classes, and whether it
reads COCO's JSON, Pascal VOC's XML, maps of labels or folders of classes.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

IMAGES = 2
SIZE = (192, 128)  # width, height
FIRST_ID = 1  # of COCO's annotations


def datasets_of(config: Any) -> Iterator[dict]:
    """Every data set named below a configuration; those that wrap another hold it as `dataset` or `datasets`."""
    if isinstance(config, (list, tuple)):
        for item in config:
            yield from datasets_of(item)
    elif isinstance(config, dict):
        if {"type", "pipeline"} <= config.keys() and not {"dataset", "datasets"} & config.keys():
            yield config
        for item in config.values():
            yield from datasets_of(item)


def classes_of(dataset: dict, cls: Any) -> list[str]:
    found = {**cls.METAINFO, **dataset.get("metainfo", {})}.get("classes", ())
    return [found] if isinstance(found, str) else list(found)


def place(dataset: dict, *keys: str) -> Path:
    """The folder that `data_prefix` names (by the first key it has), below `data_root`."""
    prefix = dataset.get("data_prefix", {})
    prefix = prefix if isinstance(prefix, dict) else {keys[0]: prefix}
    return Path(dataset.get("data_root") or "", next((prefix[key] for key in keys if prefix.get(key)), ""))


def scene(random: np.random.Generator, classes: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """A picture, the class of each pixel, and its shapes: class (from 0), box (x, y, w, h) and polygon."""
    width, height = SIZE
    picture = random.integers(0, 60, (height, width, 3)).astype(np.uint8)
    labels, shapes = np.zeros((height, width), np.uint8), []
    for _ in range(3):
        w, h = random.integers(36, 80), random.integers(36, 80)
        x, y, label = random.integers(0, width - w), random.integers(0, height - h), random.integers(classes)
        corners = np.array([(x, y), (x + w - 1, y), (x + w - 1, y + h - 1), (x, y + h - 1)], np.int32)
        colour = [int(90 + 160 * ((label + 1) * k % 7) / 7) for k in (1, 2, 3)]
        cv2.fillPoly(picture, [corners], colour)
        cv2.fillPoly(labels, [corners], int(label))
        shapes.append(dict(label=int(label), box=[int(x), int(y), int(w), int(h)], polygon=corners.ravel().tolist()))
    return picture, labels, shapes


def scenes(classes: int) -> Iterator[tuple[str, np.ndarray, np.ndarray, list[dict]]]:
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        yield (f"{number:012}", *scene(random, classes))


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def coco(dataset: dict, names: list[str], cls: Any) -> None:
    """COCO's instances; its stuff maps and its panoptic maps beside them, where `data_prefix` has a place for them."""
    folder, maps = place(dataset, "img", "img_path"), dataset.get("data_prefix", {}).get("seg")
    panoptic = "Panoptic" in dataset["type"]
    images, annotations, identity = [], [], FIRST_ID
    for number, (name, picture, labels, shapes) in enumerate(scenes(len(names))):
        write(folder / f"{name}.jpg", picture)
        images.append(dict(id=number, file_name=f"{name}.jpg", width=SIZE[0], height=SIZE[1]))
        segments, panoptic_map = [], np.zeros((*labels.shape, 3), np.uint8)
        for shape in shapes:
            x, y, w, h = shape["box"]
            record = dict(id=identity, category_id=shape["label"] + 1, area=w * h, bbox=shape["box"], iscrowd=0)
            segments.append(record)
            panoptic_map[y : y + h, x : x + w] = (
                0,
                identity // 256,
                identity % 256,
            )  # blue, green, red: OpenCV's order
            annotations.append(dict(record, image_id=number, segmentation=[shape["polygon"]]))
            identity += 1
        if maps:
            write(place(dataset, "seg") / f"{name}.png", panoptic_map if panoptic else labels)
        if panoptic:
            seen = {tuple(colour) for colour in panoptic_map.reshape(-1, 3)}
            segments = [s for s in segments if (0, s["id"] // 256, s["id"] % 256) in seen]
            annotations = annotations[: -len(shapes)]
            annotations.append(dict(image_id=number, file_name=f"{name}.png", segments_info=segments))
    categories = [dict(id=number + 1, name=name, isthing=int(number < 80)) for number, name in enumerate(names)]
    path = Path(dataset.get("data_root") or "", dataset["ann_file"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def voc(dataset: dict, names: list[str], cls: Any) -> None:
    """Pascal VOC's boxes: a list of pictures and an XML file for each."""
    root = Path(dataset.get("data_root") or "")
    base = root / dataset.get("data_prefix", {}).get("sub_data_root", "")
    lines = []
    for name, picture, _, shapes in scenes(len(names)):
        write(base / "JPEGImages" / f"{name}.jpg", picture)
        objects = ""
        for shape in shapes:
            x, y, w, h = shape["box"]
            corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
            objects += f"<object><name>{names[shape['label']]}</name><bndbox>{corners}</bndbox></object>"
        size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
        path = base / "Annotations" / f"{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<annotation>{size}{objects}</annotation>")
        lines.append(name)
    path = root / dataset["ann_file"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def label_maps(dataset: dict, names: list[str], cls: Any) -> None:
    """mmsegmentation's maps of labels: a picture, a PNG of the same name, and a list of names if one is asked for."""
    defaults = {name: value.default for name, value in inspect.signature(cls.__init__).parameters.items()}
    asked = {key: dataset.get(key, defaults.get(key, "")) for key in ("img_suffix", "seg_map_suffix", "ann_file")}
    first = int(dataset.get("reduce_zero_label", defaults.get("reduce_zero_label", False)) is True)
    lines = []
    for name, picture, labels, _ in scenes(len(names)):
        write(place(dataset, "img_path") / (name + (asked["img_suffix"] or ".jpg")), picture)
        write(place(dataset, "seg_map_path") / (name + (asked["seg_map_suffix"] or ".png")), labels + first)
        lines.append(name)
    if asked["ann_file"]:
        path = Path(dataset.get("data_root") or "", asked["ann_file"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))


def folders(dataset: dict, names: list[str], cls: Any) -> None:
    """A folder for each class (mmpretrain's ImageNet); the classes are as many as the data set's own."""
    root = Path(dataset.get("data_root") or "", dataset.get("split") or "")
    for number, (name, picture, _, _) in enumerate(scenes(len(names))):
        write(root / f"n{number:08}" / f"{name}.JPEG", picture)
    for number in range(IMAGES, len(names)):
        (root / f"n{number:08}").mkdir(parents=True, exist_ok=True)


def writer(cls: Any) -> Callable[[dict, list[str], Any], None] | None:
    """What writes for a class of data sets, by the first of its parents that is known."""
    known: dict[str, Callable[[dict, list[str], Any], None]] = {
        "CocoDataset": coco, "XMLDataset": voc, "BaseSegDataset": label_maps, "ImageNet": folders,
    }  # fmt: skip
    return next((known[base.__name__] for base in cls.__mro__ if base.__name__ in known), None)


def generate(config: Any, registry: Any) -> list[str]:
    """Write what the data sets of a configuration read, below the current folder, and return their types."""
    made = set()
    for dataset in datasets_of([config.get(f"{part}_dataloader") for part in ("train", "val", "test")]):
        cls = registry.get(dataset["type"])
        write_it = None if cls is None else writer(cls)
        if write_it is None:
            raise NotImplementedError(f"no generated data for {dataset['type']}")
        write_it(dataset, classes_of(dataset, cls), cls)
        made.add(dataset["type"])
    return sorted(made)
