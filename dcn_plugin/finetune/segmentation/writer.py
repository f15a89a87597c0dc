"""Predicted masks as image files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks.prediction_writer import WriteInterval

from ..masks import with_palette
from ..writer import EpochWriter


class MaskWriter(EpochWriter):
    """Write the predicted masks to a folder `masks`, each under its image's name with the ending .png.

    A file has the classes as indices of a palette, in PASCAL VOC's colours. Of two images that differ in their endings
    alone, masks have these too (`a.jpg.png`), so that no mask replaces another. Masks are written batch by batch, so
    that a long run needs no memory for all of them, and several processes write to one folder.

    Raises:
        ValueError: that folder is one of the data's images or masks, holds one or lies in one, before any prediction.
    """

    filename = "masks"

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.interval = WriteInterval("batch")
        self._names: Mapping[Any, str] = {}
        self._short: set[PurePosixPath] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        data = trainer.datamodule
        self._refuse_to_replace(data)
        self._names = data.filenames("predict") if hasattr(data, "filenames") else {}
        self._short = _without_ending(map(PurePosixPath, self._names.values()))

    def _refuse_to_replace(self, data: Any) -> None:
        """Raise ValueError where masks would be written among images or masks that are read."""
        target = (self.directory / self.filename).resolve()
        for name, folder in (data.folders() if hasattr(data, "folders") else {}).items():
            read = folder.resolve()
            # A folder to predict for is read without those below it.
            if target == read or (name != "predict" and (target in read.parents or read in target.parents)):
                raise ValueError(
                    f"directory: expected another folder for predicted masks than those of the data, got {target}, "
                    f"beside {name} in {read} (another work folder has its own)"
                )

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        for image in prediction:
            name = PurePosixPath(self._names.get(image["image_id"], str(image["image_id"])))
            path = self.directory / self.filename / f"{name.with_suffix('') if name in self._short else name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with_palette(image["mask"].cpu().numpy()).save(path)


def _without_ending(names: Iterable[PurePosixPath]) -> set[PurePosixPath]:
    """Return the names whose masks need no ending of the image's to be told from those of all others."""
    # The full name of `u.jpg` is what is left of `u.jpg.bmp`, too.
    named = list(names)
    taken = Counter([*named, *(name.with_suffix("") for name in named)])
    return {name for name in named if taken[name.with_suffix("")] == 1}
