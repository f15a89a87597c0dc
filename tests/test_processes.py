"""Deformable layers in two processes (gloo, CPU): gradients of DDP and FSDP2 are those of one process."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dcn_plugin.layers import DCNv2, DeformRoIPoolPack, OffsetConv

BATCH = 4


class Net(nn.Module):
    """Two deformable convolutions and a RoI pooling layer, whose offsets are not 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = DCNv2(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = DCNv2(8, 8, 3, padding=1, stride=2)
        self.pool = DeformRoIPoolPack((2, 2), 8, deform_fc_channels=16)
        self.head = nn.Linear(32, 5)
        for module in self.modules():
            if isinstance(module, OffsetConv):
                nn.init.normal_(module.conv_offset.weight, std=0.1)
        nn.init.normal_(self.pool.offset_fc[-1].weight, std=0.1)

    def forward(self, images, rois):
        maps = self.second(torch.relu(self.norm(self.first(images))))
        return self.head(self.pool(maps, rois).flatten(1))


def batch():
    torch.manual_seed(1)
    corners = torch.rand(BATCH, 2) * 3
    rois = torch.cat([torch.arange(BATCH)[:, None].float(), corners, corners + 2], 1)
    return torch.randn(BATCH, 3, 10, 12), rois


def part(rank, world):
    """The images of a process, and their regions, numbered from 0."""
    images, rois = batch()
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    rois = rois[mine].clone()
    rois[:, 0] -= mine.start
    return images[mine], rois


def gradients(net, rank=0, world=1):
    # Statistics of a part of the batch are others than those of the whole.
    net.eval()
    net(*part(rank, world)).square().mean().backward()
    found = {name.removeprefix("module."): p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def work(rank, port, how, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    net = Net()
    if how == "frozen offsets":
        for module in net.modules():
            if isinstance(module, OffsetConv):
                module.conv_offset.requires_grad_(False)
    if how == "fsdp2":
        for layer in (net.first, net.second, net.pool):
            fully_shard(layer)
        fully_shard(net)
    else:
        net = DistributedDataParallel(net)
    found = gradients(net, rank, 2)
    if rank == 0:
        torch.save(found, path)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "frozen offsets", "fsdp2"])
def test_gradients_of_two_processes_are_those_of_one(tmp_path, how):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "gradients.pt"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(work, (port, how, path), nprocs=2)
    found, alone = torch.load(path, weights_only=True), gradients(Net())
    if how == "frozen offsets":
        alone = {name: value for name, value in alone.items() if "conv_offset" not in name}
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda said, at=name: f"{at}: {said}")
        assert value.any(), name


def test_synchronised_batch_normalisation_takes_the_place_of_the_plain_one():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    assert isinstance(net.norm, nn.SyncBatchNorm) and isinstance(net.first, DCNv2)
    assert net.state_dict().keys() == Net().state_dict().keys()
    for name, value in Net().state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
