"""Detection data in COCO's format, as a Lightning data module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchvision.transforms import v2

from ..._config import unknown
from ..classes import Id, first_difference
from ..data import check_choices, check_counts
from ..images import BAD_IMAGES
from ..seeded import SPLITS, SeededData, check_channels
from ..transforms import LAST, build_transforms
from .datasets import CocoImages

# What a split has, and where it is in the embedded set.
_PARTS = dict(images="images/{}", annotations="annotations/instances_{}.json")


class CocoDataModule(SeededData):
    """Serve detection data in COCO's format: images as a list of tensors, targets as a list of dicts (`CocoImages`).

    Args:
        name: 'coco', or 'digit_scenes' for the embedded set, which is written in COCO's format below `root` and read
            back like any other (see `write_scenes`).
        root: folder that the paths below start from. For 'digit_scenes' where the set is written; None means a folder
            of the user's cache.
        train: `dict(images=<folder>, annotations=<JSON file>)` to train on; None cannot train.
        val: the same for validation; None trains without.
        test: the same for tests; None means `val`.
        predict: a folder of images; None predicts for the images of the test split.
        scenes: arguments of `write_scenes`, for 'digit_scenes'.
        batch_size: images per training batch and process.
        eval_batch_size: images per batch elsewhere; None means `batch_size`.
        num_workers: loader processes per process; 0 loads in the training process.
        num_classes: number of categories, if they are to be checked before any file is read; None takes the data's.
        in_chans: 3 for RGB images, 1 for gray ones; other images are converted.
        augment: transforms of `torchvision.transforms.v2` for training, each `dict(type=<class name>, ...)`, as
            `[dict(type='RandomHorizontalFlip', p=0.5)]`. Boxes follow; one that leaves the image is left out.
        empty_images: 'keep' trains on images without boxes too, 'drop' does not.
        bad_boxes: 'skip' warns of boxes less than a pixel wide or high inside their image and trains without them,
            'raise' stops at them. Evaluation takes every box as the file has it.
        bad_images: 'raise' stops at an image that cannot be read. 'skip' warns; training takes the next one instead,
            and elsewhere it is left out.
        limit: at most so many images of each split.

    Raises:
        ValueError, TypeError, FileNotFoundError: as `CocoImages`; an unknown name, key or transform; splits whose
            categories differ in id or name. Before training, the splits for validation and test are checked as well.

    Order and augmentation of the training images depend on the seed (`seed_everything`) and the epoch alone, so that a
    resumed run sees what it would have seen.

    Example:
        >>> import tempfile
        >>> data = CocoDataModule('digit_scenes', tempfile.mkdtemp(), scenes=dict(train=4, val=1, test=1), in_chans=1)
        >>> data.setup('fit')
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> len(images), images[0].shape, data.num_classes, targets[0]['boxes'].shape[1]
        (2, torch.Size([1, 128, 128]), 10, 4)
    """

    def __init__(
        self,
        name: str = "coco",
        root: str | None = None,
        *,
        train: Mapping[str, str] | None = None,
        val: Mapping[str, str] | None = None,
        test: Mapping[str, str] | None = None,
        predict: str | None = None,
        scenes: Mapping[str, Any] | None = None,
        batch_size: int = 2,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        num_classes: int | None = None,
        in_chans: int = 3,
        augment: Sequence[Mapping[str, Any]] = (),
        empty_images: str = "keep",
        bad_boxes: str = "skip",
        bad_images: str = "raise",
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        if name not in ("coco", "digit_scenes"):
            raise ValueError(unknown("data set name", name, ("coco", "digit_scenes"), "name"))
        check_counts(limit=limit)
        check_choices(
            empty_images=(empty_images, ("keep", "drop")),
            bad_boxes=(bad_boxes, ("skip", "raise")),
            bad_images=(bad_images, BAD_IMAGES),
        )
        self._find_splits(name, root, dict(train=train, val=val, test=test), predict, scenes, _PARTS)
        self.in_chans = check_channels(in_chans)
        self.empty_images, self.bad_boxes, self.bad_images, self.limit = empty_images, bad_boxes, bad_images, limit
        self.augment = build_transforms("augment", augment)
        self._num_classes = num_classes
        self.data_config = dict(in_chans=in_chans)
        self.keep_arguments(locals())

    # -- classes ------------------------------------------------------------------------------------------------------

    @property
    def category_ids(self) -> list[Id]:
        """The categories' ids in the annotation files; label l of the model is `category_ids[l - 1]`."""
        return self._any().category_ids

    @property
    def class_names(self) -> list[str]:
        """Names of the categories in the order of their labels."""
        return self._any().class_names

    @property
    def num_classes(self) -> int:
        """Number of categories, without the background."""
        return self._num_classes if self._num_classes is not None else len(self.category_ids)

    def _any(self) -> CocoImages:
        for stage in SPLITS:
            if stage in self._datasets:
                return self._datasets[stage]
        for stage in ("val", "test", "train"):  # from small to large
            if self.splits[stage] is not None:
                return self._dataset(stage)
        raise ValueError(
            "num_classes: expected a number, as without train, val and test nothing names the categories, got None"
        )

    # -- data sets ----------------------------------------------------------------------------------------------------

    def _read(self, stage: str, split: Mapping[str, str]) -> CocoImages:
        training = stage == "train"
        dataset = CocoImages(
            self.root / split["images"],
            self.root / split["annotations"],
            name=stage,
            training=training,
            in_chans=self.in_chans,
            transforms=v2.Compose([*self.augment, *_CLEAN, *LAST] if training else LAST),
            empty_images=self.empty_images,
            bad_boxes=self.bad_boxes,
            bad_images=self.bad_images,
            limit=self.limit,
        )
        if self._num_classes is not None and len(dataset.category_ids) != self._num_classes:
            raise ValueError(
                f"num_classes: expected {self._num_classes} categories, {stage}.annotations "
                f"{self.root / split['annotations']} has {len(dataset.category_ids)}"
            )
        # Labels must mean the same in every split.
        for other in SPLITS:
            known = self._datasets.get(other)
            if known is not None:
                said = first_difference(dataset.categories, f"in {stage}", known.categories, f"in {other}")
                if said is not None:
                    raise ValueError(f"{stage}.annotations: {self.root / split['annotations']}: {said}")
        return dataset


# torchvision's detectors refuse a box without area; what Sanitize takes away is less than a pixel wide or high.
_CLEAN = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
