"""Three published configurations of mm* packages train and test a step on the stand-in, with the numbers of others."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dcn_plugin

TESTS = Path(__file__).resolve().parents[1]
NEEDED = ("mmcv", "mmdet", "mmseg", "torchvision", "ftfy")
# Configuration -> mmcv's functions that it must have called, and kernels of ours that must have served them.
EXPECTED = {
    "ATSS with DyHead": ({"modulated_deform_conv2d"}, {"deform_conv2d", "deform_conv2d_backward"}),
    "Faster R-CNN with mdpool": ({"deform_roi_pool"}, {"deform_roi_pool", "deform_roi_pool_backward"}),
    "DeepLabv3 with DCN": ({"deform_conv2d"}, {"deform_conv2d", "deform_conv2d_backward"}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """All three in one process of their own: the stand-in changes what mmcv's names mean."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    path = tmp_path_factory.mktemp("openmmlab") / "results.json"
    entries = [str(Path(dcn_plugin.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, entries)), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", TESTS / "openmmlab_runs.py", path],
        env=env, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_loss_and_gradients_are_those_of_other_definitions(results, name):
    found, (functions, kernels) = results[name], EXPECTED[name]
    assert functions <= set(found["calls"]) and kernels <= set(found["kernels"]), found
    assert found["layers"] > 0 and found["loss"] > 0
    assert found["loss"] == pytest.approx(found["loss_of_others"], rel=1e-4)
    assert found["same_parameters"] and found["worst"][1] < 2e-3, found["worst"]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_parameter_that_trains_has_a_gradient(results, name):
    assert results[name]["without"] == []
    # The pictures' regions are small: all of them are pooled from the first level.
    idle = ("roi_layers.1.", "roi_layers.2.", "roi_layers.3.")
    sampling = [p for p in results[name]["zero"] if "offset" in p or "mask_fc" in p]
    assert [p for p in sampling if not any(layer in p for layer in idle)] == []
    assert results[name]["results"] > 0  # tensors of predictions, all finite
