#!/usr/bin/env bash
# Lightning's BackboneFinetuning freezes the backbone for good when a run is resumed after the epoch that set it free.
#
# Versions: pytorch-lightning 2.6.6, torch 2.13.0, Python 3.11.
# Behaviour: unfreeze_backbone_at_epoch=1, two epochs, then four from that checkpoint. On resuming, the callback freezes the
#   backbone as at the start of every run, and restores its optimizer groups, but never sets requires_grad again.
# Expected: what was trainable is trainable; resumed equals uninterrupted.
# Seen: the backbone of the uninterrupted run moves in epochs 3 and 4; the resumed one moves by exactly 0, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 pytorch-lightning==2.6.6 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>"$folder/log" || { cat "$folder/log"; exit 1; }
import sys
import tempfile

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


torch.manual_seed(0)
data = DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 2), batch_size=4)


def fit(epochs, checkpoint=None):
    pl.seed_everything(0, verbose=False)
    module, saver = Classifier(), ModelCheckpoint(tempfile.mkdtemp(), filename="last")
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=1), saver],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module.backbone.weight.detach().clone(), saver.best_model_path


after_two, checkpoint = fit(2)
whole, _ = fit(4)
resumed, _ = fit(4, checkpoint)
moved = [(weight - after_two).abs().max().item() for weight in (whole, resumed)]
print(f"epochs 3 and 4 move the backbone: uninterrupted by {moved[0]:.1e}, resumed by {moved[1]:.1e}")
sys.exit(not (moved[0] > 0 and moved[1] == 0))  # status 1: the behaviour has changed
PYTHON
