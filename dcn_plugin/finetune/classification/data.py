"""Image classification data by timm's names, as a Lightning data module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader, IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..._config import arguments, check_keys, check_kinds, plain, unknown
from ..command_line import at
from ..data import TunedData, check_choices
from ..digits import Digits
from ..folders import ClassFolders
from ..images import BAD_IMAGES
from .augment import check_policy
from .preprocessing import image_mode, resolve
from .samples import BadImages, ImageFiles, ImageStream, read_files_of
from .splits import check_shards, classes_of, require_root, split_path

# timm treats a prefix it does not know as a folder; here a misspelt one is an error.
_PREFIXES = ("", "folder", "tar", "torch", "hfds", "hfids", "tfds", "wds")
_ITERABLE = ("hfids", "tfds", "wds")
_ROOTLESS = ("hfds", "hfids", "tfds")  # root is where they keep downloads
_TORCH_FOLDERS = ("torch/folder", "torch/image_folder")  # class folders in torchvision's order


class ImageDataModule(TunedData):
    """Serve train, validation, test and prediction splits of a data set that timm, or this package, knows by name.

    Names: `''` or `'folder/'` (one folder per class below `root/<split>`), a tar file given as the split
    (`train_split='train.tar'`), `'wds/'` (WebDataset shards in `root`), `'torch/cifar10'`, `'hfds/...'`, `'hfids/...'`,
    `'tfds/...'`, and `'digits'` (see `Digits`). Transforms and augmentation are timm's.

    Folders and tars (`ClassFolders`): the class is the folder below the split, whatever lies between it and the image;
    hidden files and folders are left out; images with an ending that is not read are counted in a warning, and
    `dataset=dict(input_key='.png;.webp')` names the endings. A split for prediction needs no class folders. The other
    splits need the names and the order of the training split's classes, as far as the data set tells them.

    Images are read by `read_image`: turned as EXIF says, 16 bits scaled. That holds for every name but two: `'tfds/'`
    is decoded by TensorFlow, and sets that hold pixels (`'torch/cifar10'`) have neither.

    Args:
        name: name of the data set, as above.
        root: folder of the data; not needed for `'digits'`, the download cache of hub data sets.
        train_split: split to train on, as `timm.data.create_dataset` takes it.
        val_split: split for validation; None trains without validation.
        test_split: split for tests; None means `val_split`.
        predict_split: split for prediction; None means the test split. Labels are not needed there.
        batch_size: images per training batch and process.
        eval_batch_size: images per batch elsewhere; None means `batch_size`.
        num_workers: loader processes per process; 0 loads in the training process.
        num_classes: number of classes; None takes it from the data set where that knows it.
        input_size: side, (height, width) or (channels, height, width) in pixels; None means the model's own.
        mean, std, interpolation, crop_pct: preprocessing as in timm; None means the model's own.
        augment: further arguments of `timm.data.create_loader` for training, such as `dict(auto_augment=...)`, or
            `dict(no_aug=True)` for none.
        dataset: further arguments of `timm.data.create_dataset` (or of `Digits`) for every split; of folders and tars
            `class_map`, `input_key`, `input_img_mode` and `target_transform`.
        train_dataset: the same for the training split alone.
        bad_images: 'raise' stops at an unreadable image and names it; 'skip' warns and takes the next one, and
            `PredictionWriter` writes no row for it. Streams leave out instead, and only what can be decoded: the reader
            of `'wds/'` always warns of the rest and leaves it out, those of `'hfids/'` and `'tfds/'` raise what their
            library raises.

    Raises:
        ValueError, TypeError: an unknown name, key or split, or classes that do not fit together.
        FileNotFoundError: a missing root, split or shard.

    Example:
        >>> data = ImageDataModule('digits', dataset=dict(warp=True), batch_size=8, input_size=(1, 48, 48))
        >>> data.setup('fit')
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, data.num_classes
        (torch.Size([8, 1, 48, 48]), 10)
    """

    def __init__(
        self,
        name: str = "",
        root: str | None = None,
        *,
        train_split: str = "train",
        val_split: str | None = "validation",
        test_split: str | None = None,
        predict_split: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        num_classes: int | None = None,
        input_size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        augment: Mapping[str, Any] | None = None,
        dataset: Mapping[str, Any] | None = None,
        train_dataset: Mapping[str, Any] | None = None,
        bad_images: str = "raise",
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.prefix = name.partition("/")[0].lower() if "/" in name else ""
        if name not in ("", "digits") and ("/" not in name or self.prefix not in _PREFIXES):
            known = ["digits", *(f"{prefix}/" for prefix in _PREFIXES if prefix)]
            raise ValueError(unknown("data set name", name, known, "name"))
        check_choices(bad_images=(bad_images, BAD_IMAGES))
        if name != "digits" and root is None and self.prefix not in _ROOTLESS:
            raise ValueError(f"root: expected the folder of data set {name!r}, got None")
        self.name, self.root = name, root
        self.splits: dict[str, Any] = dict(
            train=train_split, val=val_split, test=val_split if test_split is None else test_split
        )
        self.splits["predict"] = self.splits["test"] if predict_split is None else predict_split
        self.bad_images = bad_images
        self.preprocessing: dict[str, Any] = dict(
            input_size=input_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct
        )
        self.augment, self.dataset_args = plain(augment or {}), plain(dataset or {})
        self.train_dataset_args = plain(train_dataset or {})
        check_keys("augment", self.augment, arguments(create_loader, *_LOADER_OWN))
        if name == "digits":
            for key, values in dict(dataset=self.dataset_args, train_dataset=self.train_dataset_args).items():
                check_keys(key, values, arguments(Digits, "split", "transform"))
        self._num_classes = num_classes
        self._class_to_idx: dict[str, int] | None = None
        self.data_config: dict[str, Any] | None = None
        self.keep_arguments(locals())

    @classmethod
    def check_config(cls, values: Mapping[str, Any]) -> None:
        super().check_config(values)
        if values.get("name") == "digits":
            for key in ("dataset", "train_dataset"):
                check_kinds(f"data.{key}.", values.get(key) or {}, Digits)

    # -- classes ------------------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in label order, or None where the data set (a stream) does not tell them."""
        if self.name == "digits":
            return list(Digits.classes)
        if self.prefix in _ITERABLE:
            return None
        dataset = self._dataset("train")
        classes = getattr(getattr(dataset, "dataset", dataset), "classes", None)
        if classes is not None:
            return [str(name) for name in classes]
        if self._class_to_idx is None:
            return None
        # A class map may give several folders one label, and may leave labels out.
        names: list[list[str]] = [[] for _ in range(max(self._class_to_idx.values()) + 1)]
        for name, label in self._class_to_idx.items():
            names[label].append(str(name))
        return [" or ".join(group) or str(label) for label, group in enumerate(names)]

    @property
    def known_class_names(self) -> list[str] | None:
        """The same without reading the training split, which prediction needs not: None where that was not read."""
        return self.class_names if self.name == "digits" or "train" in self._datasets else None

    @property
    def num_classes(self) -> int:
        """Number of classes, as given or as the training split has them."""
        if self._num_classes is not None:
            return self._num_classes
        names = self.class_names
        if names is None:
            raise ValueError(
                f"num_classes: expected a number, as data set {self.name!r} does not name its classes, got None"
            )
        return len(names)

    # -- data sets ----------------------------------------------------------------------------------------------------

    def _dataset(self, stage: str) -> Any:
        if stage in self._datasets:
            return self._datasets[stage]
        dataset = super()._dataset(stage)
        if stage == "train":
            self._class_to_idx = classes_of(dataset) or None
        for other in ("val", "test"):  # in whichever order the splits are asked for
            if other in self._datasets:
                self._compare_classes(other)
        return dataset

    def _create(self, stage: str) -> Any:
        split = self.splits[stage]
        if split is None:
            raise ValueError(f"{stage}_split: expected the name of a split, got None")
        args = self.dataset_args | (self.train_dataset_args if stage == "train" else {})
        if self.name == "digits":
            return Digits(split, **args)
        mode = args.pop("input_img_mode", None) or image_mode(self.preprocessing["input_size"])
        if self.prefix in ("", "folder", "tar") or self.name.lower() in _TORCH_FOLDERS:
            return BadImages(self._create_folder(stage, args, mode), self.bad_images)
        if self.prefix == "torch":
            dataset = create_dataset(self.name, root=self.root, split=split, **args)
            return BadImages(read_files_of(dataset, mode), self.bad_images)
        if self.prefix == "wds":
            require_root(self.root)
        common = dict(root=self.root, split=split, is_training=stage == "train", batch_size=self.batch_size)
        # TensorFlow decodes to what it is told; the others hand on images as their files have them.
        common["input_img_mode"] = mode if self.prefix == "tfds" else ""
        dataset = create_dataset(self.name, **common, **args)
        if self.prefix == "hfds":
            return BadImages(ImageFiles(dataset.reader, mode, dataset.target_transform), self.bad_images)
        if self.prefix == "wds":
            check_shards(self.root, dataset.reader.split_info.filenames)
        if self.prefix == "tfds":
            return dataset
        return ImageStream(dataset, mode, f"{self.name} {split!r}", self.bad_images)

    def _create_folder(self, stage: str, args: dict, mode: str) -> ImageFiles:
        check_keys("dataset", args, ("class_map", "input_key", "target_transform"))
        transform = args.pop("target_transform", None)
        if self.prefix == "torch":  # whose labels and endings are torchvision's
            args = {"input_key": ";".join(IMG_EXTENSIONS), "order": str, **args}
        reader = ClassFolders(
            split_path(self.root, self.splits[stage], stage), stage, **args, labelled=stage != "predict"
        )
        if stage in ("val", "test") and not args.get("class_map"):
            # Labels must mean the same in every split, whichever classes a split happens to lack.
            self._dataset("train")
            known = self._class_to_idx or {}
            if set(reader.class_to_idx) <= set(known):
                reader.class_to_idx = known
        return ImageFiles(reader, mode, transform)

    def _compare_classes(self, stage: str) -> None:
        """Raise ValueError for the first class that the training split lacks, or has under another label."""
        known, own = self._class_to_idx or {}, classes_of(self._datasets[stage])
        for name in own if known else ():
            if name not in known:
                said = f"which training split {self.splits['train']!r} lacks"
                raise ValueError(f"{stage}_split: {self.splits[stage]!r} has class {name!r}, {said}")
        for name, label in own.items() if known else ():
            if known[name] != label:
                raise ValueError(
                    f"{stage}_split: expected the order of the training split, where class {name!r} is "
                    f"{known[name]}, got {label}"
                )

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        module = self.trainer.lightning_module if self.trainer is not None else None
        self.data_config = resolve(self.preprocessing, getattr(module, "model", None))
        stages = dict(fit=("train", "val"), validate=("val",), test=("test",), predict=("predict",))[stage]
        for name in stages:
            if name == "val" and stage == "fit" and self.splits["val"] is None:
                continue
            self._dataset(name)

    def _loader(self, stage: str) -> DataLoader:
        config, dataset, training = self.data_config, self._dataset(stage), stage == "train"
        assert config is not None, "setup() has not run"
        if training and not isinstance(dataset, IterableDataset):
            self.limit_batch_size(len(dataset))
        batch_size = self.batch_size if training else self.eval_batch_size
        if training and not isinstance(dataset, IterableDataset) and len(dataset) < batch_size:
            raise ValueError(f"batch_size: expected at most the {len(dataset)} images to train on, got {batch_size}")
        # timm's prefetcher wraps the loader, and its samplers split the data themselves; Lightning needs the plain
        # DataLoader, into which it puts its own distributed sampler.
        with at(f"data (augment={self.augment!r})" if training else "data"):  # timm asserts, without a name
            loader = create_loader(
                dataset,
                batch_size=batch_size,
                is_training=training,
                use_prefetcher=False,
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
                **config,
                **(self.augment if training else {}),
            )
        if training:
            mode = self.dataset_args.get("input_img_mode") or image_mode(self.preprocessing["input_size"])
            check_policy(dataset.transform, self.augment.get("auto_augment"), mode)
        return loader

    def train_dataloader(self) -> DataLoader:
        loader = super().train_dataloader()
        if self.trainer is not None:
            self.set_epoch(self.trainer.current_epoch)
        return loader

    def set_epoch(self, epoch: int) -> None:
        """Tell a streaming training set its epoch, on which its shuffling depends."""
        dataset = self._datasets.get("train")
        if dataset is not None and hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)

    def filenames(self, stage: str = "predict") -> list[str] | None:
        """Return the file names of a split in its order, or None for a stream."""
        dataset = self._dataset(stage)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "filenames"):
            return None
        return dataset.filenames()

    def unreadable(self, stage: str = "predict") -> list[int]:
        """Return the places of the images of a split that were skipped so far as unreadable."""
        bad = getattr(self._dataset(stage), "bad", None)
        return [] if bad is None else bad.nonzero().flatten().tolist()


# Arguments of create_loader that the data module sets itself, or that need timm's own loop.
_LOADER_OWN = (
    "dataset input_size batch_size is_training mean std interpolation crop_pct crop_mode num_workers distributed "
    "collate_fn pin_memory fp16 img_dtype device use_prefetcher num_aug_repeats num_aug_splits re_split "
    "tf_preprocessing input_size_choices batch_size_choices batch_choice_weights batch_choice_seed "
    "batch_choice_schedule batch_schedule_epochs batch_schedule_spread batch_schedule_random_mix num_batches"
).split()
