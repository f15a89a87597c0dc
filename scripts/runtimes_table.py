"""Run small models in every runtime that is installed and print the table of docs/runtimes.md.

`python scripts/runtimes_table.py [--only onnxruntime,ncnn]`. A cell is the largest difference from the model, in parts
of the largest output, in float32 on the CPU; or what the runtime said. What is not installed gets no row.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcn_plugin.layers import DCNv2, DeformConv2d, DeformRoIPoolPack
from dcn_plugin.ops import ms_deform_attn

Args = tuple[Tensor, ...]


class Case(NamedTuple):
    model: nn.Module
    args: Args
    onnx: Path = Path()  # written once, for all that read it


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = DeformRoIPoolPack(2, 8, deform_fc_channels=8)

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        return self.pool(x, rois)


class Attention(nn.Module):
    """300 queries on two levels of a map, from boxes and raw offsets and logits, as decoders call it."""

    def forward(self, x: Tensor, offsets: Tensor, logits: Tensor, boxes: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        levels = [x, x[:, :, ::2, ::2]]
        value = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1).unflatten(2, (2, 4))
        shapes = [(height, width), ((height + 1) // 2, (width + 1) // 2)]
        return ms_deform_attn(value, shapes, offsets, logits, softmax=True, reference_points=boxes)


def on_borders(height: int, width: int) -> Tensor:
    """Offsets that take every sample of a 3x3 window (padding 1) to a place where a border rule decides."""
    places: list[Tensor] = []
    for size, taps in ((height, torch.arange(3).repeat_interleave(3)), (width, torch.arange(3).repeat(3))):
        edges = torch.tensor([-2, -1.5, -1, -1 + 2**-9, -0.5, 0, size - 1, size - 0.5, size - 2**-9, size, size + 1])
        wanted = edges[torch.randint(len(edges), (9, height, width))]
        pixels = torch.arange(size).view((-1, 1) if not places else (1, -1))
        places.append(wanted - (pixels - 1 + taps.view(9, 1, 1)))
    return torch.stack(places, 1).reshape(1, 18, height, width)


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    image, uneven = torch.randn(1, 8, 9, 11), dict(stride=(2, 1), padding=(0, 1, 2, 3), dilation=(1, 2))
    found = {
        "DCNv2": Case(DCNv2(8, 12, 3, padding=1), (image,)),
        "groups": Case(DCNv2(8, 12, (3, 2), groups=2, bias=False, **uneven), (image,)),  # type: ignore[arg-type]
        "offset groups": Case(DCNv2(8, 12, 3, padding=1, offset_groups=4), (image,)),
        "borders": Case(DeformConv2d(8, 12, 3, padding=1), (image, on_borders(9, 11), torch.rand(1, 9, 9, 11))),
        "attention": Case(
            Attention(),
            (image, torch.randn(1, 300, 2, 8, 2) * 2, torch.randn(1, 300, 2, 8), torch.rand(1, 300, 1, 4)),
        ),
        "RoI pooling": Case(Pooled(), (image, torch.tensor([[0, 1.0, 2.0, 12.0, 9.0], [0, -3.0, 4.0, 25.0, 30.0]]))),
    }
    for case in found.values():
        for name, parameter in case.model.named_parameters():
            if "offset" in name:
                nn.init.normal_(parameter, std=0.1)
        case.model.eval()
    return found


def onnx_file(case: Case) -> str:
    if not case.onnx.is_file():
        from dcn_plugin.export.onnx import export_onnx

        export_onnx(case.model, case.args, case.onnx)
    return str(case.onnx)


def arrays(case: Case) -> list[Any]:
    return [value.numpy() for value in case.args]


def names_of(path: str) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(path).graph.input]


def program(case: Case) -> torch.export.ExportedProgram:
    return torch.export.export(case.model, case.args)


def with_grid_sample(case: Case) -> torch.export.ExportedProgram:
    from dcn_plugin.export.grid_sample import grid_sample_decompositions

    table = {**torch.export.default_decompositions(), **grid_sample_decompositions()}
    return program(case).run_decompositions(table)


# -- runtimes: from a case and a folder to the output ------------------------------------------------------------------


def by_torch_export(case: Case, folder: str) -> Any:
    torch.export.save(program(case), f"{folder}/model.pt2")
    return torch.export.load(f"{folder}/model.pt2").module()(*case.args)


def by_aot_inductor(case: Case, folder: str) -> Any:
    path = torch._inductor.aoti_compile_and_package(program(case), package_path=f"{folder}/model.pt2")
    return torch._inductor.aoti_load_package(path)(*case.args)


def by_onnxruntime(case: Case, folder: str) -> Any:
    import onnxruntime

    path = onnx_file(case)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names_of(path), arrays(case), strict=True)))[0]


def by_onnx_reference(case: Case, folder: str) -> Any:
    from onnx.reference import ReferenceEvaluator

    path = onnx_file(case)
    return ReferenceEvaluator(path).run(None, dict(zip(names_of(path), arrays(case), strict=True)))[0]


def by_openvino(case: Case, folder: str) -> Any:
    import openvino

    from dcn_plugin.export.openvino import convert

    compiled = openvino.compile_model(convert(onnx_file(case)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(arrays(case))[0]


def by_openvino_alone(case: Case, folder: str) -> Any:
    import openvino

    model = openvino.Core().read_model(onnx_file(case))
    return openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(arrays(case))[0]


def by_ncnn(case: Case, folder: str) -> Any:
    from dcn_plugin.export.ncnn import export_ncnn, run_ncnn

    return run_ncnn(export_ncnn(case.model, case.args, f"{folder}/model"), case.args)[0]


def by_executorch(case: Case, folder: str) -> Any:
    from dcn_plugin.export.executorch import export_executorch, run_executorch

    return run_executorch(export_executorch(case.model, case.args, f"{folder}/model.pte"), case.args)[0]


def by_opencv(case: Case, folder: str) -> Any:
    import cv2

    path = onnx_file(case)
    net = cv2.dnn.readNetFromONNX(path)
    for name, value in zip(names_of(path), arrays(case), strict=True):
        net.setInput(value, name)
    return net.forward()


def by_mnn(case: Case, folder: str) -> Any:
    import MNN.expr
    import MNN.nn

    path = onnx_file(case)
    command = [sys.executable, "-m", "MNN.tools.mnnconvert"]
    arguments = ["-f", "ONNX", "--modelFile", path, "--MNNModel", f"{folder}/model.mnn", "--bizCode", "x"]
    said = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if not Path(f"{folder}/model.mnn").is_file():
        raise RuntimeError(what_is_wrong(said.stdout + said.stderr))
    net = MNN.nn.load_module_from_file(f"{folder}/model.mnn", names_of(path), [])
    given = []
    for value in arrays(case):
        given.append(MNN.expr.const(value.copy(), value.shape, MNN.expr.NCHW))
    return MNN.expr.convert(net.forward(given)[0], MNN.expr.NCHW).read().copy()


def by_tvm_onnx(case: Case, folder: str) -> Any:
    import onnx
    from tvm.relax.frontend.onnx import from_onnx

    return run_tvm(from_onnx(onnx.load(onnx_file(case)), keep_params_in_input=False), case)


def by_tvm_grid_sample(case: Case, folder: str) -> Any:
    from tvm.relax.frontend.torch import from_exported_program

    return run_tvm(from_exported_program(with_grid_sample(case)), case)


def run_tvm(module: Any, case: Case) -> Any:
    import tvm
    from tvm import relax

    target = tvm.target.Target("llvm")
    built = tvm.compile(relax.get_pipeline("zero")(module), target=target)
    machine = relax.VirtualMachine(built, tvm.cpu())
    found = machine["main"](*[tvm.runtime.tensor(value) for value in arrays(case)])
    return (found if hasattr(found, "numpy") else found[0]).numpy()


def by_tract(case: Case, folder: str) -> Any:
    import tract

    model = tract.onnx().load(onnx_file(case)).into_model()
    return model.into_runnable().run(arrays(case))[0].to_numpy()


def by_litert(case: Case, folder: str) -> Any:
    import litert_torch

    class Decomposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = with_grid_sample(case).module()

        def forward(self, *args: Tensor) -> Tensor:
            return self.inner(*args)

        def train(self, mode: bool = True) -> Decomposed:  # exported programs have no modes
            return self

    return litert_torch.convert(Decomposed(), case.args)(*case.args)


def by_onnx2tf(case: Case, folder: str) -> Any:
    path = onnx_file(case)
    command = ["-i", path, "-o", f"{folder}/tf", "-kat", *names_of(path)]
    said = subprocess.run([sys.executable, "-m", "onnx2tf", *command], capture_output=True, text=True)
    files = sorted(Path(folder, "tf").glob("*float32.tflite"))
    if not files:
        raise RuntimeError(what_is_wrong(said.stdout + said.stderr))
    from ai_edge_litert.interpreter import Interpreter

    reader = Interpreter(str(files[0]))
    reader.allocate_tensors()
    for detail, value in zip(reader.get_input_details(), arrays(case), strict=True):
        reader.set_tensor(detail["index"], value)
    reader.invoke()
    return reader.get_tensor(reader.get_output_details()[0]["index"])


def by_coremltools(case: Case, folder: str) -> Any:
    import coremltools

    coremltools.convert(with_grid_sample(case), convert_to="mlprogram").save(f"{folder}/model.mlpackage")
    return "written, not run"


class Runtime(NamedTuple):
    run: Callable[[Case, str], Any]
    packages: str  # as pip calls them; the first is the one that runs
    way: str


RUNTIMES = {
    "torch.export": Runtime(by_torch_export, "torch", "`torch.export.save`, `load`"),
    "aot_inductor": Runtime(by_aot_inductor, "torch", "`aoti_compile_and_package`, `aoti_load_package`"),
    "onnxruntime": Runtime(by_onnxruntime, "onnxruntime onnxscript", "`export_onnx`"),
    "onnx": Runtime(by_onnx_reference, "onnx onnxscript", "`export_onnx`, `onnx.reference`"),
    "openvino": Runtime(by_openvino, "openvino onnxscript", "`export_onnx`, `dcn_plugin.export.openvino.convert`"),
    "openvino_alone": Runtime(by_openvino_alone, "openvino onnxscript", "`export_onnx`, `read_model`"),
    "ncnn": Runtime(by_ncnn, "ncnn pnnx", "`export_ncnn`"),
    "executorch": Runtime(by_executorch, "executorch", "`export_executorch`"),
    "opencv": Runtime(by_opencv, "opencv-python onnxscript", "`export_onnx`, `cv2.dnn.readNetFromONNX`"),
    "mnn": Runtime(by_mnn, "MNN onnxscript", "`export_onnx`, `mnnconvert`"),
    "tvm_onnx": Runtime(by_tvm_onnx, "apache-tvm onnxscript", "`export_onnx`, `relax.frontend.onnx`"),
    "tvm": Runtime(by_tvm_grid_sample, "apache-tvm", "`grid_sample_decompositions`, `from_exported_program`"),
    "tract": Runtime(by_tract, "tract onnxscript", "`export_onnx`"),
    "litert": Runtime(by_litert, "litert-torch", "`grid_sample_decompositions`, `litert_torch.convert`"),
    "onnx2tf": Runtime(by_onnx2tf, "onnx2tf ai-edge-litert onnxscript", "`export_onnx`, `onnx2tf`"),
    "coremltools": Runtime(by_coremltools, "coremltools", "`grid_sample_decompositions`, `coremltools.convert`"),
}


def what_is_wrong(text: str) -> str:
    """The line of a program's output, or of an error, that says what is wrong."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    for words in (r"DeformConv|deform_|grid_?sampl|\bScan\b", r"error|not support|unsupported|unknown"):
        if found := [line for line in lines if re.search(words, line, re.I)]:
            return found[0]
    return lines[0] if lines else "no reason given"


def versions(packages: str) -> list[str] | None:
    try:
        return [importlib.metadata.version(name) for name in packages.split()]
    except importlib.metadata.PackageNotFoundError:
        return None


def cell(runtime: Runtime, case: Case) -> str:
    said = io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(said), redirect_stderr(said), torch.no_grad():
            found = runtime.run(case, folder)
            if isinstance(found, str):
                return found
            wanted = case.model(*case.args)
            found = torch.as_tensor(found)
            if found.shape != wanted.shape:
                return f"shape {list(found.shape)}, not {list(wanted.shape)}"
            return f"{float((found - wanted).abs().max() / wanted.abs().max()):.0e}"
    except Exception as error:
        return f"{type(error).__name__}: {what_is_wrong(str(error))}"[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(RUNTIMES), help="rows, separated by commas (default: all)")
    parser.add_argument("--files", type=Path, help="folder of the ONNX files, kept for a run with other packages")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in RUNTIMES]:
        parser.error(f"--only: expected some of {', '.join(RUNTIMES)}, got {', '.join(unknown)}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    files = args.files or Path(tempfile.mkdtemp())
    all_cases = {name: case._replace(onnx=files / f"{name.replace(' ', '_')}.onnx") for name, case in cases().items()}
    print(f"| row | version | way | {' | '.join(all_cases)} |\n|---|---|---|{'---|' * len(all_cases)}")
    for name in names:
        runtime = RUNTIMES[name]
        if (found := versions(runtime.packages)) is None:
            continue
        cells = [cell(runtime, case).replace("|", "/") for case in all_cases.values()]
        print(f"| {name} | {found[0]} | {runtime.way} | {' | '.join(cells)} |", flush=True)
    if args.files is None:
        shutil.rmtree(files)


if __name__ == "__main__":
    main()
