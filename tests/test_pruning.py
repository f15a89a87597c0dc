"""Pruning by magnitude spares what predicts the offsets, when it is told to in the way that the documents show."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from dcn_plugin.layers import offset_parameters

timm = pytest.importorskip("timm")
SMALL = dict(name="resnet18_dcn", channels=(8, 8, 8, 8), num_classes=4)


def all_but_offsets(model):
    """What the documents write, for the whole of a model."""
    spared = offset_parameters(model)
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, p in model.named_parameters() if p.dim() > 1}
    return [(owner, name.rpartition(".")[2]) for name, owner in owners.items() if name not in spared]


def shares_gone(model):
    masks = {name: mask for name, mask in model.named_buffers() if name.endswith("weight_mask")}
    offsets = [mask.flatten() for name, mask in masks.items() if "conv_offset" in name]
    others = [mask.flatten() for name, mask in masks.items() if "conv_offset" not in name]
    return [1 - torch.cat(found).mean().item() if found else 0.0 for found in (offsets, others)]


def trained():
    """A model after some steps: its offsets' weights are small, but not zero."""
    torch.manual_seed(0)
    model = timm.create_model(SMALL["name"], **{k: v for k, v in SMALL.items() if k != "name"}, zero_init_last=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(8, 3, 32, 32)), torch.arange(8) % 4).backward()
        optimizer.step()
    return model


def test_pruning_everything_takes_the_offsets_first():
    model = trained()
    convolutions = [m for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.dim() == 4]
    prune.global_unstructured([(m, "weight") for m in convolutions], prune.L1Unstructured, amount=0.2)
    offsets, others = shares_gone(model)
    assert offsets > 0.4 and others < 0.1, "what the documents warn of"


def test_global_pruning_spares_the_offsets():
    model = trained()
    before = {name: value.clone() for name, value in model.named_parameters() if name in offset_parameters(model)}
    parameters = all_but_offsets(model)
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=0.2)
    assert len(before) == 12 and len(parameters) == 22  # of 6 deformable layers; 21 convolutions and the classifier
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())
    offsets, others = shares_gone(model)
    assert offsets == 0 and others == pytest.approx(0.2, abs=1e-3)


def test_lightnings_callback_spares_the_offsets():
    pl, finetune = pytest.importorskip("pytorch_lightning"), pytest.importorskip("dcn_plugin.finetune")
    from pytorch_lightning.callbacks import ModelPruning

    module = finetune.FinetuneModule(SMALL, optimizer=dict(lr=1e-2))
    with torch.no_grad():  # smaller than any other weight
        for name, parameter in module.model.named_parameters():
            if "conv_offset.weight" in name:
                parameter.uniform_(1e-6, 2e-6)
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=all_but_offsets(module.model), amount=0.5)
    batches = [(torch.rand(4, 3, 32, 32), torch.arange(4))] * 2
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[pruning],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    weights = {name: value for name, value in module.model.state_dict().items() if name.endswith("weight")}
    offsets = torch.cat([value.flatten() for name, value in weights.items() if "conv_offset" in name])
    others = torch.cat([v.flatten() for k, v in weights.items() if "conv_offset" not in k and v.dim() > 1])
    assert (offsets != 0).all()
    assert (others == 0).float().mean() >= 0.5
