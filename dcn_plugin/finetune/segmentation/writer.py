"""Predicted masks as image files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks.prediction_writer import WriteInterval

from ..masks import with_palette
from ..writer import EpochWriter


class MaskWriter(EpochWriter):
    """Write the predicted masks to a folder `masks`, each under its image's name with the ending .png.

    A file has the classes as indices of a palette, in PASCAL VOC's colours. Of two images that differ in their endings
    alone, masks have these too (`a.jpg.png`). Masks are written batch by batch, so that a long run needs no memory for
    all of them, and several processes write to one folder.
    """

    filename = "masks"

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.interval = WriteInterval("batch")

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
        names = trainer.datamodule.filenames("predict") if hasattr(trainer.datamodule, "filenames") else {}
        taken = Counter(PurePosixPath(name).with_suffix("") for name in names.values())
        for image in prediction:
            name = PurePosixPath(names.get(image["image_id"], f"{image['image_id']}.png"))
            stem = name.with_suffix("")
            path = self.directory / self.filename / f"{name if taken[stem] > 1 else stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with_palette(image["mask"].cpu().numpy()).save(path)
