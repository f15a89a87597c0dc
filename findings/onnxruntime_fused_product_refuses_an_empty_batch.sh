#!/usr/bin/env bash
# onnxruntime's optimiser makes a graph refuse an empty batch that it runs without optimisation.
#
# Versions: onnxruntime 1.31.1, onnx 1.22.0, numpy 2.4.6, Python 3.11.
# Behaviour: Transpose of [N, C, Q], then MatMul with [C, C], N dynamic: what an attention layer ends in before its last linear
#   layer. By default the two become one node, FusedMatMul, which fails for N = 0.
# Expected: an empty result for an empty batch, as with ORT_DISABLE_ALL: MatMul has no rule against it.
# Seen: [2, 5, 4] for N = 2 at both levels, [0, 5, 4] for N = 0 without optimisation, "left operand cannot broadcast" with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.31.1 onnx==1.22.0 numpy==2.4.6
cat > "$folder/look.py" <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.eye(4, dtype=np.float32).ravel())
graph = helper.make_graph(
    [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "w"], ["y"]),
    ],
    "transposed_then_multiplied",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 5])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, 4])],
    [weight],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
onnx.checker.check_model(model, full_check=True)


def run(level, batch):
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    try:
        return session.run(None, {"x": np.zeros((batch, 4, 5), np.float32)})[0].shape
    except Exception as error:
        return str(error).splitlines()[0]


every, none = ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL
found = {f"{name}, batch {n}": run(level, n) for name, level in (("all", every), ("none", none)) for n in (2, 0)}
for name, what in found.items():
    print(f"optimisations: {name}: {what}")
assert found["all, batch 2"] == found["none, batch 2"] == (2, 5, 4)
assert found["none, batch 0"] == (0, 5, 4)
assert "FusedMatMul" in found["all, batch 0"] and "broadcast" in found["all, batch 0"]
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
