"""Deformable layers in two processes (gloo, CPU): gradients of DDP and FSDP2 are those of one process."""

import contextlib
import os
import socket
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dcn_plugin.layers import DCNv2, DeformRoIPool, DeformRoIPoolPack, OffsetConv

BATCH = 4


class Net(nn.Module):
    """Two deformable convolutions and a RoI pooling layer, whose offsets are not 0."""

    pool_offsets = True

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
        pooled = self.pool(maps, rois) if self.pool_offsets else DeformRoIPool.forward(self.pool, maps, rois)
        return self.head(pooled.flatten(1))


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


def gradients_of(net):
    found = {name.removeprefix("module."): p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def gradients(net, rank=0, world=1):
    # Statistics of a part of the batch are others than those of the whole.
    net.eval()
    net(*part(rank, world)).square().mean().backward()
    return gradients_of(net)


def shard(net):
    for layer in (net.first, net.second, net.pool):
        fully_shard(layer)
    return fully_shard(net)


def freeze_offsets(net):
    for module in net.modules():
        if isinstance(module, OffsetConv):
            module.conv_offset.requires_grad_(False)
    return net


def without_pool_offsets(net):
    """The branch is there, but nothing calls it."""
    net.pool_offsets = False
    return net


def accumulated(net, rank=0, world=1):
    """Gradients of a batch that comes in halves, of which only the last is reduced."""
    net.eval()
    images, rois = part(rank, world)
    for i in range(len(images)):
        last = i == len(images) - 1
        alone = rois[i : i + 1].clone()
        alone[:, 0] = 0
        with contextlib.nullcontext() if last or world == 1 else net.no_sync():
            (net(images[i : i + 1], alone).square().mean() / len(images)).backward()
    return gradients_of(net)


# Name -> what is done to the network before it is wrapped, how, and how its gradients are taken.
WAYS = {
    "ddp": (lambda net: net, DistributedDataParallel, gradients),
    "frozen offsets": (freeze_offsets, DistributedDataParallel, gradients),
    "frozen offsets, static graph": (freeze_offsets, partial(DistributedDataParallel, static_graph=True), gradients),
    "static graph": (lambda net: net, partial(DistributedDataParallel, static_graph=True), gradients),
    "unused offset branch": (
        without_pool_offsets, partial(DistributedDataParallel, find_unused_parameters=True), gradients
    ),
    "no_sync": (lambda net: net, DistributedDataParallel, accumulated),
    "fsdp2": (lambda net: net, shard, gradients),
}  # fmt: skip


def work(rank, port, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for how, (prepare, wrap, take) in WAYS.items():
        net = wrap(prepare(Net()))
        # Twice: a static graph is recorded in the first pass.
        take(net, rank, 2)
        net.zero_grad()
        found[how] = take(net, rank, 2)
    if rank == 0:
        torch.save(found, path)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """Gradients of each way, from one pair of processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path_factory.mktemp("processes") / "gradients.pt"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(work, (port, path), nprocs=2)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("how", WAYS)
def test_gradients_of_two_processes_are_those_of_one(of_two_processes, how):
    prepare, _, take = WAYS[how]
    found, alone = of_two_processes[how], take(prepare(Net()))
    assert found.keys() == alone.keys()
    assert any("conv_offset" in name for name in found) != ("frozen" in how)
    assert any("offset_fc" in name for name in found) != ("unused" in how)
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda said, at=name: f"{at}: {said}")
        assert value.any(), name


def test_synchronised_batch_normalisation_takes_the_place_of_the_plain_one():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    assert isinstance(net.norm, nn.SyncBatchNorm) and isinstance(net.first, DCNv2)
    assert net.state_dict().keys() == Net().state_dict().keys()
    for name, value in Net().state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
