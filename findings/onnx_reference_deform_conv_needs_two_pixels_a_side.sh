#!/usr/bin/env bash
# onnx's reference evaluator cannot run DeformConv on a map that is one pixel high or wide, such as a sequence.
#
# Versions: onnx 1.22.0, onnxruntime 1.31.1, numpy 2.4.6, Python 3.11.
# Behaviour: DeformConv (opset 19) with a kernel of 1x1, weight 1 and offsets of zero, which gives back its input.
# Expected: the input, for every size: the definition has no rule against a side of one. onnxruntime does so.
# Seen: the input for 2x2 and 2x3; for 1x1, 1x3 and 3x1 "cannot convert float NaN to integer" from the evaluator, which scales
#   positions by the side less one. A check of exported models against it has to leave such maps out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.22.0 onnxruntime==1.31.1 numpy==2.4.6
cat > "$folder/look.py" <<'PYTHON'
import warnings

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

node = helper.make_node("DeformConv", ["x", "w", "offset"], ["y"], kernel_shape=[1, 1])
inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in ("x", "w", "offset")]
graph = helper.make_graph([node], "identity", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def evaluated(feeds):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ReferenceEvaluator(model).run(None, feeds)[0]
    except ValueError as error:
        return str(error)


for size in ((2, 2), (2, 3), (1, 1), (1, 3), (3, 1)):
    x = np.arange(1, 1 + np.prod(size), dtype=np.float32).reshape(1, 1, *size)
    feeds = {"x": x, "w": np.ones((1, 1, 1, 1), np.float32), "offset": np.zeros((1, 2, *size), np.float32)}
    ran, found = session.run(None, feeds)[0], evaluated(feeds)
    print(size, "onnxruntime:", ran.ravel().tolist(), "evaluator:", found if isinstance(found, str) else found.ravel().tolist())
    assert np.array_equal(ran, x)
    if min(size) > 1:
        assert np.array_equal(found, x)
    else:
        assert found == "cannot convert float NaN to integer", found
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
