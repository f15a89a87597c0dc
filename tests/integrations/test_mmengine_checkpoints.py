"""With the stand-in, `torch.load` takes what MMEngine's Runner writes, refuses all else, and as before once undone."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import pytest
import torch

pytest.importorskip("mmengine")
import mmengine.runner  # noqa: E402, F401  (imports torchao, which allows types of its own)
import numpy as np  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402

from dcn_plugin.integrations.mmcv import _checkpoints  # noqa: E402


@pytest.fixture
def allowed():
    before = torch.serialization.get_safe_globals()
    _checkpoints.begin()
    yield
    _checkpoints.end()
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.fixture
def file(tmp_path) -> str:
    """A file of the published layout."""
    hub = dict(log_scalars={"train/loss": HistoryBuffer([0.75, 0.5], [1, 1])}, runtime_info=OrderedDict(epoch=1))
    meta = dict(epoch=np.int64(3), best=np.float64(0.5), dataset_meta=dict(CLASSES=("cat",)), cfg="model = dict()")
    path = str(tmp_path / "published.pth")
    torch.save(dict(meta=meta, message_hub=hub, state_dict=OrderedDict(weight=torch.arange(3.0))), path)
    return path


def test_published_layout(file, allowed):
    from mmengine.runner import load_checkpoint

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(3))
    loaded = load_checkpoint(layer, file, map_location="cpu", strict=True)
    assert layer.weight.tolist() == [0, 1, 2]
    assert loaded["meta"]["epoch"] == 3 and loaded["meta"]["best"] == 0.5
    buffer = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert buffer.data[0].tolist() == [0.75, 0.5] and buffer.min() == 0.5 and buffer.statistics("mean") == 0.625


def test_refused_without_it_and_afterwards(file):
    for _ in range(2):
        with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer|numpy|getattr"):
            torch.load(file)
        _checkpoints.begin()
        assert torch.load(file)["meta"]["epoch"] == 3
        _checkpoints.end()


class Shell:
    def __reduce__(self):
        return getattr, (HistoryBuffer, "update")


def test_getattr_is_for_the_log_alone(tmp_path, allowed):
    torch.save(Shell(), tmp_path / "other.pth")
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        torch.load(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="name: expected a statistic of MMEngine's HistoryBuffer, got 'update' of"):
        _checkpoints._statistic(HistoryBuffer, "update")
