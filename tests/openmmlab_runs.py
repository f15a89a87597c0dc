"""Published configurations on the stand-in and on other people's definitions: `python openmmlab_runs.py RESULTS.json`.

A process of its own, because the stand-in changes what mmcv's names mean. Each model makes its losses and gradients
twice from the same weights and pictures: as installed, and with mmcv's three functions replaced by torchvision's
operator and by our plain PyTorch definition of pooling. Offsets are drawn, because mmcv's start at zero.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from openmmlab.stages import Run, deformable, finite, tensors  # noqa: E402
from openmmlab_table import with_dcn  # noqa: E402

from dcn_plugin.integrations.mmcv import install  # noqa: E402
from dcn_plugin.ops import kernels_used  # noqa: E402
from dcn_plugin.reference import deform_roi_pool  # noqa: E402

CASES = {
    "ATSS with DyHead": ("mmdet", "dyhead/atss_r50_fpn_dyhead_1x_coco.py", ""),
    "Faster R-CNN with mdpool": ("mmdet", "dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py", "narrow"),
    "DeepLabv3 with DCN": ("mmseg", "deeplabv3/deeplabv3_r50-d8_4xb4-80k_ade20k-512x512.py", "DCN"),
}


def convolve(x, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, deform_groups=1) -> Tensor:
    """mmcv's modulated function: torchvision's, with the beginning of each image where offsets have another size."""
    import torchvision

    size = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip(x.shape[-2:], weight.shape[-2:], stride, padding, dilation, strict=True)
    ]

    def beginning(t: Tensor) -> Tensor:
        return t.flatten(1)[:, : t.shape[1] * size[0] * size[1]].reshape(t.shape[0], t.shape[1], *size)

    assert x.shape[1] == weight.shape[1] * groups and offset.shape[1] == 2 * deform_groups * weight[0, 0].numel()
    return torchvision.ops.deform_conv2d(
        x, beginning(offset), weight, bias, stride, padding, dilation, None if mask is None else beginning(mask)
    )


def plain(x, offset, weight, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, *rest) -> Tensor:
    return convolve(x, offset, None, weight, None, stride, padding, dilation, groups, deform_groups)


def pool(x, rois, offset, size, scale=1.0, samples=0, gamma=0.1) -> Tensor:
    """mmcv's pooling, whose offsets come as (x, y)."""
    shift = None if offset is None or not offset.numel() else offset.flip(1)
    return deform_roi_pool(
        x, rois, shift, output_size=size, spatial_scale=scale, sampling_ratio=samples, gamma=gamma
    )  # fmt: skip


@contextmanager
def other_definitions() -> Iterator[dict[str, int]]:
    """Replace mmcv's functions, and count the calls."""
    from mmcv.ops import deform_conv, deform_roi_pool, modulated_deform_conv  # noqa: F401

    places = [("deform_conv", "deform_conv2d", plain), ("modulated_deform_conv", "modulated_deform_conv2d", convolve),
              ("deform_roi_pool", "deform_roi_pool", pool)]  # fmt: skip
    calls: dict[str, int] = {}

    def counted(name: str, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls[name] = calls.get(name, 0) + 1
        return function(*args, **kwargs)

    before = []
    for module, name, function in places:
        owner = sys.modules[f"mmcv.ops.{module}"]
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, partial(counted, name, function))
    try:
        yield calls
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def step(run: Run, batch: dict) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients; samplers of proposals draw the same numbers every time."""
    torch.manual_seed(0)
    np.random.seed(0)
    run.model.zero_grad()
    loss = run.loss(batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def narrow(config: Any) -> None:
    """Few regions, because the definition is slow, and few units behind them: they are nine tenths of the detector."""
    config.model.train_cfg.rcnn.sampler.num = 16
    config.model.roi_head.bbox_roi_extractor.roi_layer.deform_fc_channels = 32
    config.model.roi_head.bbox_head.fc_out_channels = 128


CHANGES = {"": lambda config: None, "DCN": partial(with_dcn, "DCN"), "narrow": narrow}


def compare(package: str, file: str, change: str) -> dict[str, Any]:
    run = Run(package, file, CHANGES[change])
    run.build()
    run.model.train()
    # Elsewhere it would only magnify rounding: torchvision's operator moves by 6 % in a gradient of DyHead
    # when the first convolution's weights are scaled by 1 + 1e-6.
    in_backbone = any(layer.startswith("backbone.") for layer in deformable(run.model))
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name.endswith("weight") and ("offset" in name or "mask_fc" in name):
                parameter.normal_(0, 0.003)
            elif in_backbone and name.endswith("weight") and not parameter.any():
                parameter.fill_(0.1)  # norms that begin at zero hide the convolutions in front of them
    for module in run.model.modules():  # statistics of two pictures would magnify the last bits
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    batch = run.batch()
    ours, gradients = step(run, batch)
    used = sorted(kernels_used())
    with other_definitions() as calls:
        theirs, others = step(run, batch)
    far = {
        name: ((gradients[name] - other).abs().max() / other.abs().max().clamp_min(1e-6)).item()
        for name, other in others.items()
    }
    run.train_step()
    run.test_step()
    return dict(
        loss=ours, loss_of_others=theirs, worst=max(far.items(), key=lambda item: item[1]), calls=calls, kernels=used,
        same_parameters=sorted(gradients) == sorted(others), layers=len(deformable(run.model)),
        zero=[n for n, g in gradients.items() if not g.any()],
        without=[n for n, p in run.model.named_parameters() if p.requires_grad and n not in gradients],
        results=finite("results", tensors(run.results)),
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    said = install()
    results: dict[str, Any] = dict(said=said)
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            results[name] = compare(*case)
            os.chdir("/")
    Path(sys.argv[1]).write_text(json.dumps(results, default=str))


if __name__ == "__main__":
    main()
