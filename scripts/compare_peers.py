"""Ask this package, torchvision and mmcv (or its fork onedl-mmcv) the same questions, where installed: a table.

    python scripts/compare_peers.py

Each question runs in a process of its own. "right" is compared with the plain PyTorch reference in float64; "wrong"
comes with the largest error, everything else with what was said. All questions are calls that are meant to work: what
operators make of hostile values and shapes is asked of this package's own alone, in its tests.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dcn_plugin import ops, reference

Operator = Callable[..., Tensor]
PEERS = ("dcn_plugin", "torchvision", "mmcv")


def operator(name: str) -> Operator:
    """The operator of a package, called as (input, offset, weight, mask), with padding 1."""
    if name == "dcn_plugin":
        return lambda x, offset, weight, mask: ops.deform_conv2d(x, offset, weight, padding=1, mask=mask)
    if name == "torchvision":
        from torchvision.ops import deform_conv2d

        return lambda x, offset, weight, mask: deform_conv2d(x, offset, weight, padding=(1, 1), mask=mask)
    from mmcv.ops import modulated_deform_conv2d

    return lambda x, offset, weight, mask: modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, 1, 1)


def roi_operator(name: str) -> Operator:
    """The deformable RoI pooling of a package, called as (input, rois, offset), 3x3 bins of 2x2 samples."""
    if name == "dcn_plugin":
        return lambda x, rois, offset: ops.deform_roi_pool(x, rois, offset, output_size=3, sampling_ratio=2)
    if name == "torchvision":
        raise NotImplementedError("has no deformable RoI pooling")
    from mmcv.ops import deform_roi_pool

    return lambda x, rois, offset: deform_roi_pool(x, rois, offset, (3, 3), 1.0, 2, 0.1)


def truth(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return reference.deform_conv2d(x, offset, weight, None, (1, 1), (1, 1), (1, 1), mask)


def arguments(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 4, 6, 7), (2, 18, 6, 7), (3, 4, 3, 3), (2, 9, 6, 7))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def compare(found: Tensor, expected: Tensor, limit: float = 1e-6) -> str:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    return "right" if error <= limit else f"wrong: off by {error:.2g} of the largest value"


def half_precision(op: Operator, dtype: torch.dtype) -> str:
    given = arguments(dtype)
    return compare(op(*given), truth(*(t.double() for t in given)), 2e-2)


def float32_positions(op: Operator) -> str:
    x, offset, weight, mask = arguments(torch.bfloat16)
    found = op(x, offset.float(), weight, mask.float())
    return compare(found, truth(x.double(), offset.double(), weight.double(), mask.double()), 2e-2)


def autocast(op: Operator) -> str:
    given = arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        offset = torch.nn.functional.conv2d(given[0], torch.ones(18, 4, 3, 3) / 36, padding=1)  # is bfloat16 here
        found = op(given[0], offset, *given[2:])
    return compare(found, truth(given[0].double(), offset.double(), *(t.double() for t in given[2:])), 2e-2)


def gradient_penalty(op: Operator) -> str:
    def penalty(f: Operator) -> Tensor:
        given = [t.requires_grad_() for t in arguments()]
        first = torch.autograd.grad(f(*given).square().sum(), given, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), given[0])[0]

    return compare(penalty(op), penalty(truth))


def forward_mode(op: Operator) -> str:
    given = arguments()
    tangents = [torch.ones_like(t) for t in given]
    return compare(*(torch.func.jvp(f, tuple(given), tuple(tangents))[1] for f in (op, truth)))


def func_grad(op: Operator) -> str:
    return compare(*(torch.func.grad(lambda *a, f=f: f(*a).square().sum())(*arguments()) for f in (op, truth)))


def vmap(op: Operator) -> str:
    given = arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "There is a performance drop": sample by sample
        found = torch.func.vmap(op, in_dims=(0, None, None, None))(torch.stack([given[0], 2 * given[0]]), *given[1:])
    return compare(found[1], truth(2 * given[0], *given[1:]))


def channels_last(op: Operator) -> str:
    given = arguments()
    found = op(given[0].contiguous(memory_format=torch.channels_last), *given[1:])
    kept = found.is_contiguous(memory_format=torch.channels_last)
    return compare(found, truth(*given)) + ("" if kept else ", but the result is contiguous")


def compiled(op: Operator) -> str:
    given = arguments()
    return compare(torch.compile(op, fullgraph=True, backend="aot_eager")(*given), truth(*given))


def empty_batch(op: Operator) -> str:
    given = arguments()
    given = [t[:0].requires_grad_() if i != 2 else t.requires_grad_() for i, t in enumerate(given)]
    found = op(*given)
    gradients = torch.autograd.grad(found.sum(), given)
    whole = found.shape == (0, 3, 6, 7) and all(g.shape == t.shape for g, t in zip(gradients, given, strict=True))
    return "right" if whole and not gradients[2].any() else "wrong"


class Module(torch.nn.Module):
    def __init__(self, op: Operator) -> None:
        super().__init__()
        self.op = op

    def forward(self, *given: Tensor) -> Tensor:
        return self.op(*given)


def exported(op: Operator) -> str:
    given, sizes = arguments(), {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    file = io.BytesIO()
    dynamic = ((sizes, sizes, None, sizes),)
    torch.export.save(torch.export.export(Module(op), tuple(given), dynamic_shapes=dynamic), file)
    file.seek(0)
    larger = [torch.cat([t, t], 2) if i != 2 else t for i, t in enumerate(given)]
    return compare(torch.export.load(file).module()(*larger), truth(*larger))


def onnx(op: Operator) -> str:
    import onnxruntime

    given = arguments(torch.float32)
    program = torch.onnx.export(Module(op), tuple(given), dynamo=True, opset_version=19, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
    nodes = sorted({node.op_type for node in program.model.graph if "eform" in node.op_type})
    found = torch.from_numpy(session.run(None, feed)[0])
    return f"{', '.join(nodes)}: {compare(found, truth(*(t.double() for t in given)), 1e-5)}"


def roi_pooling(op: Operator) -> str:
    x, rois = arguments()[0], torch.tensor([[0, 0.5, 1, 4, 5], [1, 2, 0, 6, 3]], dtype=torch.float64)
    given = (x, rois, torch.ones(2, 2, 3, 3, dtype=torch.float64))
    return compare(op(*given), reference.deform_roi_pool(*given, output_size=(3, 3), sampling_ratio=2))


QUESTIONS: dict[str, Callable[[Operator], str]] = {
    "float16 on the CPU": lambda op: half_precision(op, torch.float16),
    "bfloat16 on the CPU": lambda op: half_precision(op, torch.bfloat16),
    "float32 offsets beside bfloat16": float32_positions,
    "autocast on the CPU": autocast,
    "second gradients (gradient penalty)": gradient_penalty,
    "forward mode (torch.func.jvp)": forward_mode,
    "torch.func.grad": func_grad,
    "torch.func.vmap without a warning": vmap,
    "channels_last in and out": channels_last,
    "torch.compile, whole graph": compiled,
    "torch.export with dynamic sizes, saved and loaded": exported,
    "torch.onnx.export, run by onnxruntime": onnx,
    "an empty batch, with gradients": empty_batch,
    "deformable RoI pooling on the CPU": roi_pooling,
}


def answer(peer: str, question: str) -> str:
    done = subprocess.run(
        [sys.executable, __file__, "--peer", peer, "--question", question], capture_output=True, text=True
    )
    if done.returncode:
        return f"no answer: status {done.returncode}"
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, help="ask one package one question, in this process")
    parser.add_argument("--question", choices=QUESTIONS)
    args = parser.parse_args()
    if args.peer:
        try:
            question = QUESTIONS[args.question]
            print(question((roi_operator if question is roi_pooling else operator)(args.peer)))
        except Exception as error:  # what is said is the answer
            said = str(error).strip().splitlines() or [""]
            print(f"raises {type(error).__name__}: {said[0][:100]}")
        return
    peers = []
    for peer in PEERS:
        try:
            operator(peer)
            peers.append(peer)
        except ImportError as error:
            print(f"{peer} is not asked: {error}")
    print("| question | " + " | ".join(peers) + " |\n" + "|---" * (len(peers) + 1) + "|")
    for name in QUESTIONS:
        print(f"| {name} | " + " | ".join(answer(peer, name) for peer in peers) + " |", flush=True)


if __name__ == "__main__":
    main()
