"""onnxruntime's DeformConv (forward, float32, CPU), where onnx and an onnxruntime that has it are installed."""

from collections.abc import Callable

import torch
from torch import Tensor

try:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplementedByRuntime
except ImportError:
    onnxruntime = None


def deform_conv(tensors: dict[str, Tensor], stride: int, padding: int) -> Callable[[], Tensor] | None:
    """One call of a model that is this operator alone; its weight is a constant, as in an exported model."""
    if onnxruntime is None:
        return None
    arrays = {name: value.detach().numpy() for name, value in tensors.items()}
    weight = arrays.pop("weight")
    kernel = list(weight.shape[2:])
    node = helper.make_node(
        "DeformConv",
        ["input", "weight", "offset", "", "mask"],
        ["out"],
        kernel_shape=kernel,
        strides=[stride] * 2,
        pads=[padding] * 4,
        group=arrays["input"].shape[1] // weight.shape[1],
        offset_group=arrays["mask"].shape[1] // (kernel[0] * kernel[1]),
    )
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in arrays.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "deform_conv", inputs, [out], [numpy_helper.from_array(weight, "weight")])
    # The operator came with opset 19, and that with version 9 of the format.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would otherwise go on spinning in the turns of the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except NotImplementedByRuntime:  # before 1.25
        return None
    return lambda: torch.from_numpy(session.run(None, arrays)[0])
