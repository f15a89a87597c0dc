"""Images with masks of classes, as a Lightning data module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchvision.transforms import v2

from ..._config import unknown
from ..data import check_choices, check_counts
from ..images import BAD_IMAGES
from ..scenes import CLASSES
from ..seeded import SeededData, check_channels
from ..transforms import LAST, build_transforms
from .datasets import MaskedImages

# What a split has, and where it is in the embedded set.
_PARTS = dict(images="images/{}", masks="masks/{}")


class SegmentationDataModule(SeededData):
    """Serve images with masks of classes: images as a list of tensors, targets as a list of dicts (`MaskedImages`).

    Args:
        name: 'folders', or 'digit_scenes' for the embedded set, which is written below `root` and read back like any
            other (see `write_scenes`); its classes are the background and the ten digits.
        root: folder that the paths below start from. For 'digit_scenes' where the set is written; None means a folder
            of the user's cache.
        train: `dict(images=<folder>, masks=<folder>)` to train on, where `list=<text file>` may name the images to
            take, one in a line without ending, as PASCAL VOC's do; None cannot train.
        val: the same for validation; None trains without.
        test: the same for tests; None means `val`.
        predict: a folder of images; None predicts for the images of the test split.
        scenes: arguments of `write_scenes`, for 'digit_scenes'.
        class_names: names of the classes 0, 1, ...; None leaves them without.
        num_classes: number of classes, the background among them where there is one; None takes that of `class_names`.
            Masks do not tell it.
        ignore_index: what masks have where no class is right: pixels that are neither trained on nor counted.
        batch_size: images per training batch and process.
        eval_batch_size: images per batch elsewhere; None means `batch_size`.
        num_workers: loader processes per process; 0 loads in the training process.
        in_chans: 3 for RGB images, 1 for gray ones; other images are converted.
        augment: transforms of `torchvision.transforms.v2` for training, each `dict(type=<class name>, ...)`, as
            `[dict(type='RandomCrop', size=[480, 480], pad_if_needed=True)]`. Masks follow, by the nearest pixel; where
            a transform fills in pixels they have `ignore_index`.
        bad_images: 'raise' stops at an image or mask that cannot be read. 'skip' warns; training takes the next one
            instead, and elsewhere it is left out.
        limit: at most so many images of each split.

    Raises:
        ValueError, TypeError, FileNotFoundError: as `MaskedImages`; an unknown name, key or transform; no number of
            classes. Before training, the splits for validation and test are checked as well.

    Order and augmentation of the training images depend on the seed (`seed_everything`) and the epoch alone, so that a
    resumed run sees what it would have seen.

    Example:
        >>> import tempfile
        >>> few = dict(train=4, val=1, test=1)
        >>> data = SegmentationDataModule('digit_scenes', tempfile.mkdtemp(), scenes=few, in_chans=1)
        >>> data.setup('fit')
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> len(images), targets[0]['mask'].shape, data.num_classes, data.class_names[0]
        (2, torch.Size([128, 128]), 11, 'background')
    """

    def __init__(
        self,
        name: str = "folders",
        root: str | None = None,
        *,
        train: Mapping[str, str] | None = None,
        val: Mapping[str, str] | None = None,
        test: Mapping[str, str] | None = None,
        predict: str | None = None,
        scenes: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        ignore_index: int = 255,
        batch_size: int = 2,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        in_chans: int = 3,
        augment: Sequence[Mapping[str, Any]] = (),
        bad_images: str = "raise",
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        if name not in ("folders", "digit_scenes"):
            raise ValueError(unknown("data set name", name, ("folders", "digit_scenes"), "name"))
        check_counts(limit=limit)
        check_choices(bad_images=(bad_images, BAD_IMAGES))
        self._find_splits(name, root, dict(train=train, val=val, test=test), predict, scenes, _PARTS, ["list"])
        self.in_chans, self.bad_images, self.limit = check_channels(in_chans), bad_images, limit
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int) or ignore_index < 0:
            raise ValueError(f"ignore_index: expected an integer from 0 on, got {ignore_index!r}")
        self.ignore_index = ignore_index
        if class_names is not None and (isinstance(class_names, str) or not isinstance(class_names, Sequence)):
            raise TypeError(f"class_names: expected a list of names, got {class_names!r}")
        own = ["background", *CLASSES] if name == "digit_scenes" else None
        self.class_names = own if class_names is None else [str(one) for one in class_names]
        if num_classes is None and self.class_names is not None:
            num_classes = len(self.class_names)
        if type(num_classes) is not int or num_classes < 2:
            raise ValueError(f"num_classes: expected an integer of at least 2, or class_names, got {num_classes!r}")
        if self.class_names is not None and len(self.class_names) != num_classes:
            raise ValueError(f"class_names: expected {num_classes} names, got {len(self.class_names)}")
        if self.class_names is not None and len(set(self.class_names)) < num_classes:
            twice = next(one for one in self.class_names if self.class_names.count(one) > 1)
            raise ValueError(
                f"class_names: expected each name once, got {twice!r} {self.class_names.count(twice)} times"
            )
        self.num_classes = num_classes
        self.augment = build_transforms("augment", augment, ignore_index)
        self.data_config = dict(in_chans=in_chans)
        self.keep_arguments(locals())

    def _read(self, stage: str, split: Mapping[str, str]) -> MaskedImages:
        training = stage == "train"
        return MaskedImages(
            self.root / split["images"],
            self.root / split["masks"],
            self.root / split["list"] if split.get("list") else None,
            name=stage,
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            training=training,
            in_chans=self.in_chans,
            transforms=v2.Compose([*self.augment, *LAST] if training else LAST),
            bad_images=self.bad_images,
            limit=self.limit,
        )
