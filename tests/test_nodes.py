"""Fine-tuning on several nodes (agents of torchrun on this machine), and going on with other numbers of processes."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from classifier_runs import DATA, config
from tiny import ROOT, TRAINER, launch, write_config

from dcn_plugin.finetune import run


@pytest.mark.slow
def test_two_nodes_train_together_and_one_process_goes_on(tmp_path):
    work_dir = tmp_path / "work"
    flags = dict(TRAINER, devices=1, num_nodes=2, strategy="ddp", max_epochs=1)
    path = write_config(tmp_path / "nodes.py", **config(trainer=flags, data=dict(DATA, batch_size=8)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    nodes = [
        subprocess.Popen(
            [*launch, "--node-rank", str(rank), ROOT / "scripts/finetune.py", path, "--work-dir", work_dir],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert [output.count("test_top5") for output in outputs] == [1, 0]  # results are told once
    saved = torch.load(work_dir / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2  # 32 images, 2 nodes, 8 each
    # Alone: twice as many steps an epoch, from the same weights and optimizer state.
    resumed = config(trainer=dict(TRAINER, max_epochs=2), data=dict(DATA, batch_size=8))
    run(resumed, work_dir, checkpoint="auto")
    again = torch.load(work_dir / "last.ckpt", weights_only=True)
    assert (again["epoch"], again["global_step"]) == (1, 6)
    moved = [
        not torch.equal(value, again["state_dict"][name])
        for name, value in saved["state_dict"].items()
        if value.is_floating_point()
    ]
    assert any(moved) and again["optimizer_states"][0]["state"]


@pytest.mark.slow
def test_one_process_goes_on_as_two_and_as_one_again(tmp_path):
    """The optimizer's moments and the counts of epochs and steps go on; steps an epoch follow the processes."""
    work_dir = tmp_path / "work"
    data = dict(DATA, batch_size=8)
    run(config(trainer=dict(TRAINER, max_epochs=1), data=data), work_dir)
    states = [torch.load(work_dir / "last.ckpt", weights_only=True)]
    flags = dict(TRAINER, devices=2, strategy="ddp", max_epochs=2)
    path = write_config(tmp_path / "two.py", **config(trainer=flags, data=data))
    process = launch(ROOT / "scripts/finetune.py", str(path), "--work-dir", str(work_dir), "--resume")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    states.append(torch.load(work_dir / "last.ckpt", weights_only=True))
    run(config(trainer=dict(TRAINER, max_epochs=3), data=data), work_dir, checkpoint="auto")
    states.append(torch.load(work_dir / "last.ckpt", weights_only=True))
    assert [state["epoch"] for state in states] == [0, 1, 2]
    # 32 images, 8 for each process: 4 steps, then 2, then 4.
    steps = [4, 6, 10]
    assert [state["global_step"] for state in states] == steps
    for state, count in zip(states, steps, strict=True):
        moments = state["optimizer_states"][0]["state"]
        assert moments and {int(m["step"]) for m in moments.values()} == {count}
